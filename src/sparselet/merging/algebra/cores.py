"""Cores: the entries of a change that moved most, which core isolation overwrites and freezes."""

import torch

from sparselet.delta import SparseDelta
from sparselet.merging.algebra.sampling import content_generator
from sparselet.merging.algebra.trim import Bounds, within

CORES = ("largest", "random")


def core_of(delta: SparseDelta, bounds: Bounds, core: str, seed: int) -> SparseDelta:
    """The entries with magnitudes in `bounds` ("largest"), or as many of the non-zero ones at random ("random", a control).

    Returns an element mask with the values of `delta`. Random draws depend on the seed and the content alone.
    """
    largest = within(delta, *bounds)
    if core == "largest":
        return largest
    entries = within(delta, 0.0)
    drawn = torch.randperm(entries.nnz, generator=content_generator(seed, entries))[: largest.nnz].sort().values
    return SparseDelta(entries.shape, entries.indices[drawn], entries.values[drawn])
