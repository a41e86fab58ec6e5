"""Every operation on masked entries, defined in plain torch. Faster versions must equal these.

A mask is a sorted 1-D integer tensor of *block* ids: flat row-major entries of the weight when `block_size` is 1,
flat row-major tiles of `block_size × block_size` otherwise. Values have shape [n] for entries, [n, B, B] for tiles.
"""

import math

import torch
from torch import Tensor


def gather(weight: Tensor, blocks: Tensor, block_size: int = 1) -> Tensor:
    """Copy the masked entries of `weight` [rows, columns] into a new tensor, [n] or [n, B, B], of its dtype."""
    if block_size == 1:
        return weight.reshape(-1).index_select(0, blocks)
    runs = _runs(blocks, weight.shape[1], block_size)
    return weight.reshape(-1, block_size).index_select(0, runs).view(-1, block_size, block_size)


def write(weight: Tensor, blocks: Tensor, values: Tensor, block_size: int = 1) -> None:
    """Overwrite the masked entries of the contiguous `weight` [rows, columns] in place, casting to its dtype."""
    values = values.to(weight.dtype)
    if block_size == 1:
        weight.view(-1).index_copy_(0, blocks.long(), values)
    else:
        runs = _runs(blocks, weight.shape[1], block_size)
        weight.view(-1, block_size).index_copy_(0, runs, values.reshape(-1, block_size))


def add_and_write(weight: Tensor, blocks: Tensor, displaced: Tensor, values: Tensor, block_size: int = 1) -> None:
    """weight[blocks] = displaced + values, in place: added in the wider of both dtypes, rounded once.

    weight: contiguous [rows, columns]. displaced, values: [n], or [n, B, B] for tiles.
    """
    write(weight, blocks, displaced + values, block_size)


def weight_gradient(x: Tensor, grad_output: Tensor, transposed: bool = False) -> Tensor:
    """∂L/∂W of `y = x Wᵀ` (W [out, in]), or of `y = x W` (W [in, out]) when `transposed`.

    x [..., in], grad_output [..., out], of one dtype. Returns a tensor of W's shape in that dtype.
    """
    x = x.reshape(-1, x.shape[-1])
    grad_output = grad_output.reshape(-1, grad_output.shape[-1])
    return x.t() @ grad_output if transposed else grad_output.t() @ x


def masked_weight_gradient(
    x: Tensor, grad_output: Tensor, blocks: Tensor, block_size: int = 1, transposed: bool = False
) -> Tensor:
    """The entries of `weight_gradient` under a mask, [n] or [n, B, B]: the dense product, then a gather."""
    return gather(weight_gradient(x, grad_output, transposed), blocks, block_size)


def tile_sum(entries: Tensor, block_size: int) -> Tensor:
    """Sum of `entries` [rows, columns] over each tile, as a flat tensor of rows·columns / B² numbers."""
    if block_size == 1:
        return entries.reshape(-1)
    return as_tiles(entries, block_size).sum(dim=(2, 3)).reshape(-1)


def all_finite(numbers: Tensor) -> bool:
    """Whether no number is NaN or infinite. A finite sum has finite terms only, and is many times faster to check."""
    return math.isfinite(numbers.sum().item()) or bool(torch.isfinite(numbers).all())


def selected(marks: Tensor) -> Tensor:
    """The places [n] at which `marks` [blocks] is not 0, ascending, int64."""
    if marks.device.type != "cpu":
        return marks.nonzero().squeeze(1)
    return torch.from_numpy((marks.numpy() != 0).nonzero()[0])  # numpy's, of bool: many times as fast as torch's


def as_tiles(matrix: Tensor, block_size: int) -> Tensor:
    """A view [rows/B, columns/B, B, B] of `matrix` [rows, columns]: tile (r, c) holds rows r·B… and columns c·B…."""
    rows, columns = matrix.shape
    return matrix.view(rows // block_size, block_size, columns // block_size, block_size).permute(0, 2, 1, 3)


def tile_entries(blocks: Tensor, shape: tuple[int, int], block_size: int) -> Tensor:
    """Flat entry ids of the given tiles, int64 [n, B, B], in the order of a tile's own rows and columns."""
    runs = _runs(blocks, shape[1], block_size).view(-1, block_size, 1)
    return runs * block_size + torch.arange(block_size, device=blocks.device)


def _runs(blocks: Tensor, columns: int, block_size: int) -> Tensor:
    """The rows of the given tiles, as places in the weight cut into runs of `block_size` entries; int64 [n·B]."""
    per_row = columns // block_size
    blocks = blocks.long()
    first = blocks // per_row * (block_size * per_row) + blocks % per_row
    return (first[:, None] + torch.arange(block_size, device=blocks.device) * per_row).reshape(-1)
