"""Several deltas of one target, entry by entry: the sums that merge methods are made of.

All sums are float32 whatever the deltas' dtype, and are added in the order given.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.errors import ShapeMismatch

WHOLE = 2**20  # blocks of a target that are never too many to be spelt out
CROWD = 16  # blocks of a target for each that is selected, up to which they are spelt out
LINE = 2**20  # blocks of a row of a compact target


def common_blocks(deltas: Sequence[SparseDelta]) -> list[SparseDelta]:
    """The deltas with one kind of mask: as they are if all have the same block size, else spelt out as entries.

    A delta without entries fits any kind. Raises ShapeMismatch.
    """
    shapes = {delta.shape for delta in deltas}
    if len(shapes) != 1:
        raise ShapeMismatch(f"deltas of one target have different shapes: {sorted(shapes)}.")
    sides = {delta.block_size for delta in deltas if delta.nnz}
    if len(sides) != 1:
        return [delta.expand() for delta in deltas]
    (side,) = sides
    tile = (side, side) if side > 1 else ()
    return [d if d.block_size == side else SparseDelta(d.shape, d.indices, d.values.new_empty(0, *tile), side) for d in deltas]


def is_thin(deltas: Sequence[SparseDelta]) -> bool:
    """Whether the target has so many more blocks than the deltas select that sums over all of them would be for nothing."""
    return deltas[0].blocks > max(WHOLE, CROWD * sum(len(delta.indices) for delta in deltas))


@dataclass(frozen=True)
class Places:
    """Where the blocks of compact deltas lie in their target: block i is block `blocks`[i] there, or i without them."""

    shape: tuple[int, int]
    block_size: int
    blocks: Tensor | None

    def of(self, chosen: Tensor) -> Tensor:
        """The places [n] of the chosen blocks, int64 [n]."""
        return chosen if self.blocks is None else self.blocks.index_select(0, chosen).long()

    def delta(self, chosen: Tensor, values: Tensor) -> SparseDelta:
        """The target's delta on the chosen blocks, int64 [n] ascending. values: [n], or [n, B, B]."""
        return SparseDelta(self.shape, self.of(chosen), values, self.block_size)


def compact(deltas: Sequence[SparseDelta]) -> tuple[list[SparseDelta], Places]:
    """The deltas as if their target had no more blocks than they select together, where it has many more; else as they are.

    Sums over all blocks then take the memory of the entries, whatever size the target is said to have. The compact deltas' own
    shape means nothing. deltas: on common blocks.
    """
    (shape, side), blocks = (deltas[0].shape, deltas[0].block_size), None
    if is_thin(deltas):
        blocks = torch.unique(torch.cat([delta.indices for delta in deltas]))
        columns = max(1, min(len(blocks), LINE))
        small = (-(-max(1, len(blocks)) // columns) * side, columns * side)
        deltas = [SparseDelta(small, torch.searchsorted(blocks, d.indices), d.values, side) for d in deltas]
    return list(deltas), Places(shape, side, blocks)


def weighted_sum(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ·ΔWᵢ over all blocks of the target, float32 [blocks], or [blocks, B, B] for tiles. deltas: on common blocks."""
    first = deltas[0]
    total = torch.zeros(first.blocks, *first.values.shape[1:], device=first.values.device)
    for delta, weight in zip(deltas, weights, strict=True):
        values = delta.values.float()
        if len(delta.indices) == delta.blocks:
            total.add_(values, alpha=weight)
        else:
            total.index_add_(0, delta.indices, values, alpha=weight)
    return total


def mask_count(deltas: Sequence[SparseDelta]) -> Tensor:
    """Σ Mᵢ, how many masks select each block, uint8 [blocks] (int32 for more than 255 deltas). deltas: on common blocks."""
    first = deltas[0]
    dtype = torch.uint8 if len(deltas) <= 255 else torch.int32
    count = torch.zeros(first.blocks, dtype=dtype, device=first.values.device)
    one = torch.ones(max(len(delta.indices) for delta in deltas), dtype=dtype, device=count.device)
    for delta in deltas:
        if len(delta.indices) == delta.blocks:
            count.add_(1)
        else:
            count.index_add_(0, delta.indices, one[: len(delta.indices)])
    return count


def per_block(numbers: Tensor, like: Tensor) -> Tensor:
    """`numbers` [n] shaped to multiply or divide `like`, [n] or [n, B, B]."""
    return numbers.reshape(-1, *(1 for _ in like.shape[1:]))
