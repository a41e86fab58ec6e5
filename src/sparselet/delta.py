"""`SparseDelta`: the change of one target, and its algebra."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparselet import kernels
from sparselet.errors import (
    AbsurdShape,
    BadDtype,
    BadShape,
    BlockSizeError,
    DuplicateIndex,
    IndexOutOfBounds,
    ShapeMismatch,
    UnsortedIndices,
)
from sparselet.io.memory import require_memory
from sparselet.kernels import ENTRY, Block

BlockSize = int | Literal["row", "column"]

MAX_SIDE = 2**26  # the largest vocabulary is near 2**20
MAX_ENTRIES = 2**38  # a terabyte of float32: beyond any weight of any model
# Limits of a target whose entries are all written out. The widest models are 20,480 wide, and their largest weights have
# 262,144 rows of 12,288 numbers.
DENSE_NARROW, DENSE_WIDE, DENSE_ENTRIES = 2**15, 2**20, 2**32


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """ΔW of one 2-D target, stored at its mask only.

    shape: (rows, columns) of the target's parameter as the base model stores it: (out, in) for `nn.Linear`, (in, out)
        for GPT-2's `Conv1D`.
    indices: int32 [n] (int64 where the target has more than 2³¹ − 1 blocks), ascending and unique: the selected blocks,
        numbered row by row.
    values: floating, [n] for an element mask; [n, h, w] for a mask of rectangles of h rows and w columns, which divide the
        target's: tiles [n, B, B], whole rows [n, 1, columns], whole columns [n, rows, 1]. A selected entry may be exactly 0 and
        stays selected.

    Raises BadShape, AbsurdShape, BadDtype, BlockSizeError, IndexOutOfBounds, UnsortedIndices, DuplicateIndex.
    """

    shape: tuple[int, int]
    indices: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", check_shape(self.shape))
        if not self.values.is_floating_point():
            raise BadDtype(f"values must be floating, got {self.values.dtype}.")
        if self.indices.dtype not in (torch.int32, torch.int64):
            raise BadDtype(f"indices must be int32 or int64, got {self.indices.dtype}.")
        blocks = self.indices.ndim == 1 and self.values.ndim in (1, 3) and len(self.indices) == len(self.values)
        if not blocks or tuple(self.values.shape[1:]) == kernels.ENTRY:
            raise BadShape(
                f"indices {list(self.indices.shape)} and values {list(self.values.shape)} do not belong together; "
                "expected [n], and [n] for entries or [n, h, w] for larger blocks."
            )
        if 0 in self.block or self.shape[0] % self.block[0] or self.shape[1] % self.block[1]:
            raise BlockSizeError(
                f"blocks of {_product(self.block)} do not divide the sides of a target of {_product(self.shape)}."
            )
        check_indices(self.indices, self.blocks)
        object.__setattr__(self, "indices", self.indices.to(index_dtype(self.blocks)))

    @classmethod
    def from_dense(cls, dense: Tensor, mask: Tensor | None = None, block_size: BlockSize = 1) -> "SparseDelta":
        """Keep the entries of `dense` [rows, columns] under `mask`; without one, the entries that are not 0.

        mask: bool, of dense's shape (a block is kept if any of its entries is), or [rows/h, columns/w], one per block (h, w).
        block_size: 1 for entries, B for tiles of B×B, "row" or "column".
        Raises BadShape, BlockSizeError, ShapeMismatch.
        """
        shape = check_shape(tuple(dense.shape))
        block = block_for(block_size, shape)
        grid = (dense.shape[0] // block[0], dense.shape[1] // block[1])
        if mask is None:
            mask = dense != 0
        if mask.dtype != torch.bool or tuple(mask.shape) not in (tuple(dense.shape), grid):
            raise ShapeMismatch(
                f"mask must be bool of shape {list(dense.shape)} or {list(grid)}, got {mask.dtype} {list(mask.shape)}."
            )
        if tuple(mask.shape) != grid:
            mask = kernels.as_blocks(mask.contiguous(), block).any(dim=-1).any(dim=-1)
        blocks = mask.reshape(-1).nonzero().squeeze(1)
        return cls(shape, blocks, kernels.gather(dense.contiguous(), blocks, block))

    @classmethod
    def empty(cls, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> "SparseDelta":
        """The delta that changes nothing: an element mask without entries."""
        return cls(shape, torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=dtype))

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """ΔW as a dense tensor of `shape`, zero outside the mask, in `dtype` (default: that of the values).

        Raises NotEnoughMemory.
        """
        _require_room(self, (dtype or self.values.dtype).itemsize)
        dense = torch.zeros(self.shape, dtype=dtype or self.values.dtype, device=self.values.device)
        kernels.write(dense, self.indices, self.values)
        return dense

    def mask(self) -> Tensor:
        """The mask as a dense bool tensor of `shape`. Raises NotEnoughMemory."""
        _require_room(self, 1)
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        kernels.write(mask, self.indices, torch.ones_like(self.values, dtype=torch.bool))
        return mask

    @property
    def size(self) -> int:
        """Entries of the target, selected or not."""
        return self.shape[0] * self.shape[1]

    @property
    def block(self) -> Block:
        """Rows and columns of a block: (1, 1) for an element mask, (B, B) for tiles."""
        return kernels.block_of(self.values)

    @property
    def blocks(self) -> int:
        """The number of blocks that a mask of such blocks chooses from: entries of the target, or its tiles, rows, columns."""
        return self.size // math.prod(self.block)

    @property
    def nnz(self) -> int:
        """Selected entries, whatever their value."""
        return self.values.numel()

    @property
    def density(self) -> float:
        """Selected fraction of the target's entries."""
        return self.nnz / self.size

    def expand(self) -> "SparseDelta":
        """The same delta with an element mask: each block is replaced by its entries."""
        if self.block == ENTRY:
            return self
        # A block's rows are runs of entries; only the runs need sorting.
        runs = kernels.block_entries(self.indices, self.shape, self.block).reshape(-1, self.block[1])
        order = runs[:, 0].argsort()
        values = self.values.reshape(-1, self.block[1]).index_select(0, order)
        return SparseDelta(self.shape, runs.index_select(0, order).reshape(-1), values.reshape(-1))

    def restrict(self, mask: "SparseDelta | Tensor") -> "SparseDelta":
        """Keep only the entries that are also in `mask`: another delta's mask, or a dense bool tensor of `shape`.

        Blocks stay blocks when the other mask has the same blocks; otherwise the result has an element mask.
        Raises ShapeMismatch.
        """
        if isinstance(mask, Tensor):
            mask = SparseDelta.from_dense(torch.zeros(mask.shape), mask)
        delta, mask = self._on_common_blocks(mask)
        kept = torch.isin(delta.indices, mask.indices, assume_unique=True)
        return SparseDelta(delta.shape, delta.indices[kept], delta.values[kept])

    def overlap(self, delta: "SparseDelta") -> int:
        """The number of entries that both masks select. Raises ShapeMismatch."""
        first, second = self._on_common_blocks(delta)
        shared = torch.isin(first.indices, second.indices, assume_unique=True).sum().item()
        return int(shared) * math.prod(first.block)

    def scale(self, factor: float) -> "SparseDelta":
        """factor · ΔW, with the same mask and dtype."""
        return SparseDelta(self.shape, self.indices, self.values * factor)

    def to(self, target: torch.dtype | torch.device | str) -> "SparseDelta":
        """The same delta with values of another dtype, or on another device."""
        values = self.values.to(target)
        return SparseDelta(self.shape, self.indices.to(values.device), values)

    def __add__(self, delta: "SparseDelta") -> "SparseDelta":
        """The sum of both changes; its mask is the union of both masks. Raises ShapeMismatch."""
        first, second = self._on_common_blocks(delta)
        union = torch.unique(torch.cat([first.indices, second.indices]))
        dtype = torch.promote_types(first.values.dtype, second.values.dtype)
        total = torch.zeros((len(union), *first.values.shape[1:]), dtype=dtype, device=first.values.device)
        for term in (first, second):
            total[torch.searchsorted(union, term.indices)] += term.values.to(dtype)
        return SparseDelta(first.shape, union, total)

    def __mul__(self, factor: float) -> "SparseDelta":
        return self.scale(factor)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        mask = "element" if self.block == ENTRY else f"block {_product(self.block)}"
        return f"SparseDelta({_product(self.shape)}, {mask}, nnz {self.nnz}, density {self.density:.4g})"

    def _on_common_blocks(self, delta: "SparseDelta") -> tuple["SparseDelta", "SparseDelta"]:
        if self.shape != delta.shape:
            raise ShapeMismatch(f"one delta has shape {list(self.shape)}, the other {list(delta.shape)}.")
        return (self, delta) if self.block == delta.block else (self.expand(), delta.expand())


def index_dtype(blocks: int) -> torch.dtype:
    """int32, or int64 for a target with more blocks than int32 can number."""
    return torch.int32 if blocks <= 2**31 - 1 else torch.int64


def check_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """`shape` as (rows, columns). Raises BadShape unless it is two positive integers, AbsurdShape if it is too large."""
    if len(shape) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in shape):
        raise BadShape(f"a target has two positive sides, got {list(shape)}.")
    if max(shape) > MAX_SIDE or shape[0] * shape[1] > MAX_ENTRIES:
        raise AbsurdShape(f"shape {list(shape)} is larger than any target ({MAX_SIDE} a side, {MAX_ENTRIES} entries).")
    return shape[0], shape[1]


def check_dense_shape(shape: tuple[int, int], name: str) -> None:
    """Raise AbsurdShape if a target is too large to be written out in full: larger than the weights of any model."""
    narrow, wide = sorted(shape)
    if narrow > DENSE_NARROW or wide > DENSE_WIDE or narrow * wide > DENSE_ENTRIES:
        raise AbsurdShape(
            f"{name}: every entry of a target of {list(shape)} would be written out, which is more than any model's weights "
            f"({DENSE_NARROW} by {DENSE_WIDE}, {DENSE_ENTRIES} entries)."
        )


def _require_room(delta: SparseDelta, bytes_an_entry: int) -> None:
    if delta.values.device.type == "cpu":
        require_memory(delta.size * bytes_an_entry, f"a dense tensor of {list(delta.shape)}")


def _product(sides: tuple[int, int]) -> str:
    return f"{sides[0]}×{sides[1]}"


def block_name(block: Block, shape: tuple[int, int]) -> str:
    """The kind of blocks of a mask, in words: rows and columns are those of the target as it is stored."""
    lines = {(1, shape[1]): "whole rows", (shape[0], 1): "whole columns", ENTRY: "single entries"}
    return lines.get(block, f"tiles of {_product(block)}")


def common_block_size(blocks: Iterable[Block]) -> int | None:
    """1 or B where all blocks are entries or B×B tiles, 1 where they differ; None for rows or columns, and for no blocks."""
    sides = {block[0] if block[0] == block[1] else None for block in blocks} or {None}
    return sides.pop() if len(sides) == 1 else 1


def check_block_size(block_size: BlockSize) -> None:
    """Raise BlockSizeError unless `block_size` is a positive integer, "row" or "column"."""
    if block_size not in ("row", "column") and (type(block_size) is not int or block_size < 1):
        raise BlockSizeError(f"block_size must be a positive integer, 'row' or 'column', got {block_size!r:.60}.")


def block_for(block_size: BlockSize, shape: tuple[int, int], transposed: bool = False, name: str | None = None) -> Block:
    """The block (h, w) of a target [rows, columns]: B×B, or one whole output row ("row") or input column ("column").

    transposed: the target is stored [in, out], so that an output row of it is a stored column.
    Raises BlockSizeError if B does not divide both sides; the message names sizes that fit.
    """
    check_block_size(block_size)
    if isinstance(block_size, str):
        return (1, shape[1]) if (block_size == "row") != transposed else (shape[0], 1)
    if shape[0] % block_size or shape[1] % block_size:
        target = f"{name} {list(shape)}" if name else f"shape {list(shape)}"
        common = math.gcd(*shape)
        small = [b for b in range(1, math.isqrt(common) + 1) if common % b == 0]
        fits = [*sorted({*small, *(common // b for b in small)}), "row", "column"]
        raise BlockSizeError(
            f"block_size {block_size} does not divide the sides of {target}. Sizes that fit: {', '.join(map(str, fits))}."
        )
    return block_size, block_size


def check_indices(indices: Tensor, blocks: int) -> None:
    """Raise unless `indices` [n] ascend strictly and lie in [0, blocks)."""
    if indices.numel() == 0:
        return
    flat = indices.cpu().numpy()  # numpy's comparisons are several times as fast as torch's
    wrong = flat[1:] <= flat[:-1]
    lowest, highest = (flat.min(), flat.max()) if wrong.any() else (flat[0], flat[-1])
    if lowest < 0 or highest >= blocks:
        raise IndexOutOfBounds(f"index {lowest if lowest < 0 else highest} lies outside the target, which has {blocks} blocks.")
    if wrong.any():
        at = int(wrong.argmax())
        if flat[at] == flat[at + 1]:
            raise DuplicateIndex(f"index {flat[at]} occurs twice (positions {at} and {at + 1}).")
        raise UnsortedIndices(f"indices must ascend, but position {at} holds {flat[at]} and position {at + 1} {flat[at + 1]}.")
