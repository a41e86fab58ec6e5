"""Every operation on masked entries, defined in plain torch. Faster versions must equal these.

A mask is a sorted 1-D integer tensor of *block* ids. A block is a rectangle (h, w) of the weight [rows, columns], h dividing
rows and w columns: an entry (1, 1), a tile (B, B), a whole row (1, columns) or a whole column (rows, 1). Blocks are numbered
row by row. Values have shape [n] for entries, [n, h, w] for other blocks.
"""

import math

import torch
from torch import Tensor

Block = tuple[int, int]
ENTRY: Block = (1, 1)


def block_of(values: Tensor) -> Block:
    """The block (h, w) of values, [n] or [n, h, w]."""
    return (values.shape[1], values.shape[2]) if values.ndim == 3 else ENTRY


def values_shape(count: int, block: Block) -> tuple[int, ...]:
    """The shape of the values of `count` blocks."""
    return (count,) if block == ENTRY else (count, *block)


def gather(weight: Tensor, blocks: Tensor, block: Block = ENTRY) -> Tensor:
    """Copy the masked entries of `weight` [rows, columns] into a new tensor, [n] or [n, h, w], of its dtype."""
    if block == ENTRY:
        return weight.reshape(-1).index_select(0, blocks)
    if block == (weight.shape[0], 1):
        return weight.index_select(1, blocks).t().contiguous().unsqueeze(2)
    return weight.reshape(-1, block[1]).index_select(0, _runs(blocks, weight.shape[1], block)).view(-1, *block)


def write(weight: Tensor, blocks: Tensor, values: Tensor) -> None:
    """Overwrite the masked entries of the contiguous `weight` [rows, columns] in place, casting to its dtype."""
    block, values = block_of(values), values.to(weight.dtype)
    if block == ENTRY:
        weight.view(-1).index_copy_(0, blocks.long(), values)
    elif block == (weight.shape[0], 1):
        weight.index_copy_(
            1, blocks.long(), values.squeeze(2).t().contiguous()
        )  # several times as fast as of a transposed view
    else:
        runs = _runs(blocks, weight.shape[1], block)
        weight.view(-1, block[1]).index_copy_(0, runs, values.reshape(-1, block[1]))


def add_and_write(weight: Tensor, blocks: Tensor, displaced: Tensor, values: Tensor) -> None:
    """weight[blocks] = displaced + values, in place: added in the wider of both dtypes, rounded once.

    weight: contiguous [rows, columns]. displaced, values: [n], or [n, h, w].
    """
    write(weight, blocks, displaced + values)


def weight_gradient(x: Tensor, grad_output: Tensor, transposed: bool = False) -> Tensor:
    """∂L/∂W of `y = x Wᵀ` (W [out, in]), or of `y = x W` (W [in, out]) when `transposed`.

    x [..., in], grad_output [..., out], of one dtype. Returns a tensor of W's shape in that dtype.
    """
    x = x.reshape(-1, x.shape[-1])
    grad_output = grad_output.reshape(-1, grad_output.shape[-1])
    return x.t() @ grad_output if transposed else grad_output.t() @ x


def masked_weight_gradient(
    x: Tensor, grad_output: Tensor, blocks: Tensor, block: Block = ENTRY, transposed: bool = False
) -> Tensor:
    """The entries of `weight_gradient` under a mask, [n] or [n, h, w]: the dense product, then a gather."""
    return gather(weight_gradient(x, grad_output, transposed), blocks, block)


def block_sum(entries: Tensor, block: Block) -> Tensor:
    """Sum of `entries` [rows, columns] over each block, as a flat tensor of rows·columns / (h·w) numbers."""
    return entries.reshape(-1) if block == ENTRY else as_blocks(entries, block).sum(dim=(2, 3)).reshape(-1)


def all_finite(numbers: Tensor) -> bool:
    """Whether no number is NaN or infinite. A finite sum has finite terms only, and is many times faster to check."""
    return math.isfinite(numbers.sum().item()) or bool(torch.isfinite(numbers).all())


def selected(marks: Tensor) -> Tensor:
    """The places [n] at which `marks` [blocks] is not 0, ascending, int64."""
    if marks.device.type != "cpu":
        return marks.nonzero().squeeze(1)
    return torch.from_numpy((marks.numpy() != 0).nonzero()[0])  # numpy's, of bool: many times as fast as torch's


def as_blocks(matrix: Tensor, block: Block) -> Tensor:
    """A view [rows/h, columns/w, h, w] of `matrix` [rows, columns]: block (r, c) holds rows r·h… and columns c·w…."""
    (rows, columns), (h, w) = matrix.shape, block
    return matrix.view(rows // h, h, columns // w, w).permute(0, 2, 1, 3)


def block_entries(blocks: Tensor, shape: tuple[int, int], block: Block) -> Tensor:
    """Flat entry ids of the given blocks, int64 [n, h, w], in the order of a block's own rows and columns."""
    runs = _runs(blocks, shape[1], block).view(-1, block[0], 1)
    return runs * block[1] + torch.arange(block[1], device=blocks.device)


def _runs(blocks: Tensor, columns: int, block: Block) -> Tensor:
    """The rows of the given blocks, as places in the weight cut into runs of w entries; int64 [n·h]."""
    (h, w), blocks = block, blocks.long()
    per_row = columns // w
    first = blocks // per_row * (h * per_row) + blocks % per_row
    return (first[:, None] + torch.arange(h, device=blocks.device) * per_row).reshape(-1)
