"""Several deltas of one target, entry by entry: the sums that merge methods are made of.

All sums are float32 whatever the deltas' dtype, and are added in the order given.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.errors import ShapeMismatch

WHOLE = 2**20  # units of a target that are never too many to be spelt out
CROWD = 16  # units of a target for each that is selected, up to which they are spelt out
LINE = 2**20  # units of a row of a compact target


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


def is_thin(deltas: Sequence[SparseDelta]) -> bool:
    """Whether the target has so many more units than the deltas select that sums over all of them would be for nothing."""
    return deltas[0].units > max(WHOLE, CROWD * sum(len(delta.indices) for delta in deltas))


@dataclass(frozen=True)
class Places:
    """Where the units of compact deltas lie in their target: unit i is unit `units`[i] there, or i without them."""

    shape: tuple[int, int]
    block_size: int
    units: Tensor | None

    def of(self, chosen: Tensor) -> Tensor:
        """The places [n] of the chosen units, int64 [n]."""
        return chosen if self.units is None else self.units.index_select(0, chosen).long()

    def delta(self, chosen: Tensor, values: Tensor) -> SparseDelta:
        """The target's delta on the chosen units, int64 [n] ascending. values: [n], or [n, B, B]."""
        return SparseDelta(self.shape, self.of(chosen), values, self.block_size)


def compact(deltas: Sequence[SparseDelta]) -> tuple[list[SparseDelta], Places]:
    """The deltas as if their target had no more units than they select together, where it has many more; else as they are.

    Sums over all units then take the memory of the entries, whatever size the target is said to have. The compact deltas' own
    shape means nothing. deltas: on common units.
    """
    (shape, block), units = (deltas[0].shape, deltas[0].block_size), None
    if is_thin(deltas):
        units = torch.unique(torch.cat([delta.indices for delta in deltas]))
        columns = max(1, min(len(units), LINE))
        small = (-(-max(1, len(units)) // columns) * block, columns * block)
        deltas = [SparseDelta(small, torch.searchsorted(units, d.indices), d.values, block) for d in deltas]
    return list(deltas), Places(shape, block, units)


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
