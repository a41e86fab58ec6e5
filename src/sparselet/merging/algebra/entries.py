"""Sums over several deltas of one target, entry by entry.

All sums are float32 for deltas of any dtype, and are added in the order of the deltas.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.errors import ShapeMismatch
from sparselet.kernels import values_shape

SMALL_TARGET = 2**20  # blocks; targets up to this size are always summed densely
MAX_BLOCKS_PER_SELECTED = 16  # blocks of a target per selected block, up to which it is summed densely
COMPACT_COLUMNS = 2**20  # blocks in a row of a compact target


def common_blocks(deltas: Sequence[SparseDelta]) -> list[SparseDelta]:
    """The deltas with one block: unchanged if they share it, else expanded to single entries.

    A delta without entries has any block. Raises ShapeMismatch.
    """
    shapes = {delta.shape for delta in deltas}
    if len(shapes) != 1:
        raise ShapeMismatch(f"deltas of one target have different shapes: {sorted(shapes)}.")
    blocks = {delta.block for delta in deltas if delta.nnz}
    if len(blocks) != 1:
        return [delta.expand() for delta in deltas]
    empty = values_shape(0, *blocks)
    return [d if d.block in blocks else SparseDelta(d.shape, d.indices, d.values.new_empty(empty)) for d in deltas]


def is_very_sparse(deltas: Sequence[SparseDelta]) -> bool:
    """Whether the deltas select so few of the target's blocks that dense sums over the target would waste memory."""
    return deltas[0].blocks > max(SMALL_TARGET, MAX_BLOCKS_PER_SELECTED * sum(len(delta.indices) for delta in deltas))


@dataclass(frozen=True)
class BlockPositions:
    """The positions of compact deltas' blocks in the target: block i is the target's block `blocks`[i], or i if None."""

    shape: tuple[int, int]
    blocks: Tensor | None

    def in_target(self, chosen: Tensor) -> Tensor:
        """The target's ids of the chosen blocks, int64 [n]. chosen: int64 [n]."""
        return chosen if self.blocks is None else self.blocks.index_select(0, chosen).long()

    def delta(self, chosen: Tensor, values: Tensor) -> SparseDelta:
        """The target's delta on the chosen blocks. chosen: int64 [n], ascending. values: [n], or [n, h, w]."""
        return SparseDelta(self.shape, self.in_target(chosen), values)


def compact(deltas: Sequence[SparseDelta]) -> tuple[list[SparseDelta], BlockPositions]:
    """The deltas renumbered over the blocks that any of them selects, if these are few; else unchanged.

    Dense sums then take memory in proportion to the selected entries, not to the target. The shape of compact deltas has no
    meaning. deltas: of one block (`common_blocks`).
    """
    shape, (h, w), blocks = deltas[0].shape, deltas[0].block, None
    if is_very_sparse(deltas):
        blocks = torch.unique(torch.cat([delta.indices for delta in deltas]))
        columns = max(1, min(len(blocks), COMPACT_COLUMNS))
        small = (-(-max(1, len(blocks)) // columns) * h, columns * w)
        deltas = [SparseDelta(small, torch.searchsorted(blocks, d.indices), d.values) for d in deltas]
    return list(deltas), BlockPositions(shape, blocks)


def weighted_sum(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ·ΔWᵢ over all blocks of the target, float32 [blocks], or [blocks, h, w]. deltas: of one block."""
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
    """Σ Mᵢ, how many masks select each block, uint8 [blocks] (int32 for more than 255 deltas). deltas: of one block."""
    first = deltas[0]
    dtype = torch.uint8 if len(deltas) <= 255 else torch.int32
    count = torch.zeros(first.blocks, dtype=dtype, device=first.values.device)
    ones = torch.ones(max(len(delta.indices) for delta in deltas), dtype=dtype, device=count.device)
    for delta in deltas:
        if len(delta.indices) == delta.blocks:
            count.add_(1)
        else:
            count.index_add_(0, delta.indices, ones[: len(delta.indices)])
    return count


def per_block(numbers: Tensor, like: Tensor) -> Tensor:
    """`numbers` [n] shaped to multiply or divide `like`, [n] or [n, h, w]."""
    return numbers.reshape(-1, *(1 for _ in like.shape[1:]))
