"""Random drops that depend only on a seed and a delta's content."""

import hashlib
import struct

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.kernels import selected

RESCALE_CHOICES = ("density", "norm", "none")


def content_generator(seed: int, delta: SparseDelta) -> torch.Generator:
    """A generator seeded by SHA-256 of the seed, the shape, and the entries as flat indices and float32 values.

    The order of the experts, the process, the thread and the layout (blocks or entries, dtype of the values) have no effect.
    Equal deltas get equal draws, so that with weights 1 and −1 they still cancel. seed: in [0, 2⁶³).
    """
    delta = delta.expand()
    digest = hashlib.sha256(struct.pack("<qqq", seed, *delta.shape))
    for part in (delta.indices, delta.values.float()):
        digest.update(part.detach().cpu().contiguous().numpy().data)
    return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "little"))


def drop_randomly(delta: SparseDelta, probability: float | Tensor, *, seed: int, rescale: str) -> SparseDelta:
    """Keep each entry of `delta` with its probability, independently, and rescale those kept.

    delta: an element mask. probability: one for all entries, or float [n], one each; in [0, 1].
    rescale: "density" divides an entry by its probability, so that its expectation stays; "norm" multiplies all by one factor
        that restores the ℓ1 norm (a delta without kept entries stays empty); "none" changes nothing.
    Returns an element mask of the entries kept, values float32.
    """
    drawn = torch.rand(delta.nnz, generator=content_generator(seed, delta)).to(delta.values.device)
    kept = selected(drawn < probability)
    values = delta.values.float().index_select(0, kept)
    if rescale == "density":
        values = values / (probability.index_select(0, kept) if isinstance(probability, Tensor) else probability)
    elif rescale == "norm":
        before, after = (v.abs().sum(dtype=torch.float64) for v in (delta.values, values))
        values = values * float(before / after)
    return SparseDelta(delta.shape, delta.indices.index_select(0, kept), values)
