"""`SparseDelta`: the change of one target, and its algebra."""

import math
from dataclasses import dataclass

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
    indices: int32 [n] (int64 where the target has more than 2³¹ − 1 blocks), ascending and unique. Flat row-major
        entries when `block_size` is 1, flat row-major tiles otherwise.
    values: floating, [n], or [n, block_size, block_size] for tiles. A selected entry may be exactly 0 and stays
        selected.
    block_size: 1 for an element mask, B for a mask of non-overlapping B×B tiles of the parameter.

    Raises BadShape, AbsurdShape, BadDtype, BlockSizeError, IndexOutOfBounds, UnsortedIndices, DuplicateIndex.
    """

    shape: tuple[int, int]
    indices: Tensor
    values: Tensor
    block_size: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", check_shape(self.shape))
        check_block_size(self.block_size, self.shape)
        if not self.values.is_floating_point():
            raise BadDtype(f"values must be floating, got {self.values.dtype}.")
        if self.indices.dtype not in (torch.int32, torch.int64):
            raise BadDtype(f"indices must be int32 or int64, got {self.indices.dtype}.")
        tile = (self.block_size, self.block_size) if self.block_size > 1 else ()
        if self.indices.ndim != 1 or tuple(self.values.shape) != (*self.indices.shape, *tile):
            raise BadShape(
                f"indices {list(self.indices.shape)} and values {list(self.values.shape)} do not belong together; "
                f"expected [n] and {['n', *tile]}."
            )
        check_indices(self.indices, self.blocks)
        object.__setattr__(self, "indices", self.indices.to(index_dtype(self.blocks)))

    @classmethod
    def from_dense(cls, dense: Tensor, mask: Tensor | None = None, block_size: int = 1) -> "SparseDelta":
        """Keep the entries of `dense` [rows, columns] under `mask`; without one, the entries that are not 0.

        mask: bool, of dense's shape (a tile is kept if any of its entries is), or [rows/B, columns/B], one per tile.
        Raises BadShape, BlockSizeError, ShapeMismatch.
        """
        check_block_size(block_size, check_shape(tuple(dense.shape)))
        grid = (dense.shape[0] // block_size, dense.shape[1] // block_size)
        if mask is None:
            mask = dense != 0
        if mask.dtype != torch.bool or tuple(mask.shape) not in (tuple(dense.shape), grid):
            raise ShapeMismatch(
                f"mask must be bool of shape {list(dense.shape)} or {list(grid)}, got {mask.dtype} {list(mask.shape)}."
            )
        if tuple(mask.shape) != grid:
            mask = kernels.as_tiles(mask.contiguous(), block_size).any(dim=-1).any(dim=-1)
        blocks = mask.reshape(-1).nonzero().squeeze(1)
        return cls((dense.shape[0], dense.shape[1]), blocks, kernels.gather(dense.contiguous(), blocks, block_size), block_size)

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
        kernels.write(dense, self.indices, self.values, self.block_size)
        return dense

    def mask(self) -> Tensor:
        """The mask as a dense bool tensor of `shape`. Raises NotEnoughMemory."""
        _require_room(self, 1)
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        kernels.write(mask, self.indices, torch.ones_like(self.values, dtype=torch.bool), self.block_size)
        return mask

    @property
    def size(self) -> int:
        """Entries of the target, selected or not."""
        return self.shape[0] * self.shape[1]

    @property
    def blocks(self) -> int:
        """The number of blocks that a mask of this block size chooses from: entries of the target, or its tiles."""
        return self.size // self.block_size**2

    @property
    def nnz(self) -> int:
        """Selected entries, whatever their value."""
        return self.values.numel()

    @property
    def density(self) -> float:
        """Selected fraction of the target's entries."""
        return self.nnz / self.size

    def expand(self) -> "SparseDelta":
        """The same delta with an element mask: each tile is replaced by its entries."""
        if self.block_size == 1:
            return self
        # A tile's rows are runs of entries; only the runs need sorting.
        runs = kernels.tile_entries(self.indices, self.shape, self.block_size).reshape(-1, self.block_size)
        order = runs[:, 0].argsort()
        values = self.values.reshape(-1, self.block_size).index_select(0, order)
        return SparseDelta(self.shape, runs.index_select(0, order).reshape(-1), values.reshape(-1))

    def restrict(self, mask: "SparseDelta | Tensor") -> "SparseDelta":
        """Keep only the entries that are also in `mask`: another delta's mask, or a dense bool tensor of `shape`.

        Tiles stay tiles when the other mask has the same tiles; otherwise the result has an element mask.
        Raises ShapeMismatch.
        """
        if isinstance(mask, Tensor):
            mask = SparseDelta.from_dense(torch.zeros(mask.shape), mask)
        delta, mask = self._on_common_blocks(mask)
        kept = torch.isin(delta.indices, mask.indices, assume_unique=True)
        return SparseDelta(delta.shape, delta.indices[kept], delta.values[kept], delta.block_size)

    def overlap(self, delta: "SparseDelta") -> int:
        """The number of entries that both masks select. Raises ShapeMismatch."""
        first, second = self._on_common_blocks(delta)
        shared = torch.isin(first.indices, second.indices, assume_unique=True).sum().item()
        return int(shared) * first.block_size**2

    def scale(self, factor: float) -> "SparseDelta":
        """factor · ΔW, with the same mask and dtype."""
        return SparseDelta(self.shape, self.indices, self.values * factor, self.block_size)

    def to(self, target: torch.dtype | torch.device | str) -> "SparseDelta":
        """The same delta with values of another dtype, or on another device."""
        values = self.values.to(target)
        return SparseDelta(self.shape, self.indices.to(values.device), values, self.block_size)

    def __add__(self, delta: "SparseDelta") -> "SparseDelta":
        """The sum of both changes; its mask is the union of both masks. Raises ShapeMismatch."""
        first, second = self._on_common_blocks(delta)
        union = torch.unique(torch.cat([first.indices, second.indices]))
        dtype = torch.promote_types(first.values.dtype, second.values.dtype)
        total = torch.zeros((len(union), *first.values.shape[1:]), dtype=dtype, device=first.values.device)
        for term in (first, second):
            total[torch.searchsorted(union, term.indices)] += term.values.to(dtype)
        return SparseDelta(first.shape, union, total, first.block_size)

    def __mul__(self, factor: float) -> "SparseDelta":
        return self.scale(factor)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        mask = "element" if self.block_size == 1 else f"block {self.block_size}"
        return f"SparseDelta({self.shape[0]}×{self.shape[1]}, {mask}, nnz {self.nnz}, density {self.density:.4g})"

    def _on_common_blocks(self, delta: "SparseDelta") -> tuple["SparseDelta", "SparseDelta"]:
        if self.shape != delta.shape:
            raise ShapeMismatch(f"one delta has shape {list(self.shape)}, the other {list(delta.shape)}.")
        return (self, delta) if self.block_size == delta.block_size else (self.expand(), delta.expand())


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


def check_block_size(block_size: int, shape: tuple[int, int], name: str | None = None) -> None:
    """Raise BlockSizeError unless `block_size` is positive and divides both sides; the message names sizes that fit."""
    target = f"{name} {list(shape)}" if name else f"shape {list(shape)}"
    if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
        raise BlockSizeError(f"block_size must be a positive integer, got {block_size!r}.")
    if shape[0] % block_size or shape[1] % block_size:
        common = math.gcd(*shape)
        small = [b for b in range(1, math.isqrt(common) + 1) if common % b == 0]
        fits = sorted({*small, *(common // b for b in small)})
        raise BlockSizeError(
            f"block_size {block_size} does not divide the sides of {target}. Sizes that fit: {', '.join(map(str, fits))}."
        )


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
