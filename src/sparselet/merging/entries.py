"""Several deltas of one target, entry by entry: the sums that merge methods are made of.

All sums are float32 whatever the deltas' dtype, and are added in the order given.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.errors import ShapeMismatch


def common_units(deltas: Sequence[SparseDelta]) -> list[SparseDelta]:
    """The deltas with one kind of mask: as they are if all have the same block size, else spelt out as entries.

    A delta without entries fits any kind. Raises ShapeMismatch.
    """
    shapes = {delta.shape for delta in deltas}
    if len(shapes) != 1:
        raise ShapeMismatch(f"deltas of one target have different shapes: {sorted(shapes)}.")
    blocks = {delta.block_size for delta in deltas if delta.nnz}
    if len(blocks) != 1:
        return [delta.expand() for delta in deltas]
    (block,) = blocks
    tile = (block, block) if block > 1 else ()
    return [
        d if d.block_size == block else SparseDelta(d.shape, d.indices, d.values.new_empty(0, *tile), block) for d in deltas
    ]


def weighted_sum(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ·ΔWᵢ over all units of the target, float32 [units], or [units, B, B] for tiles. deltas: on common units."""
    first = deltas[0]
    total = torch.zeros(first.units, *first.values.shape[1:], device=first.values.device)
    for delta, weight in zip(deltas, weights, strict=True):
        values = delta.values.float()
        if len(delta.indices) == delta.units:
            total.add_(values, alpha=weight)
        else:
            total.index_add_(0, delta.indices, values, alpha=weight)
    return total


def mask_count(deltas: Sequence[SparseDelta]) -> Tensor:
    """Σ Mᵢ, how many masks select each unit, uint8 [units] (int32 for more than 255 deltas). deltas: on common units."""
    first = deltas[0]
    dtype = torch.uint8 if len(deltas) <= 255 else torch.int32
    count = torch.zeros(first.units, dtype=dtype, device=first.values.device)
    one = torch.ones(max(len(delta.indices) for delta in deltas), dtype=dtype, device=count.device)
    for delta in deltas:
        if len(delta.indices) == delta.units:
            count.add_(1)
        else:
            count.index_add_(0, delta.indices, one[: len(delta.indices)])
    return count


def per_unit(numbers: Tensor, like: Tensor) -> Tensor:
    """`numbers` [n] shaped to multiply or divide `like`, [n] or [n, B, B]."""
    return numbers.reshape(-1, *(1 for _ in like.shape[1:]))
