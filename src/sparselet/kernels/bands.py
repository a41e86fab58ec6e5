"""The masked weight gradient by bands of rows: one product per band, with the columns that the mask selects in the band.

For tiles a band is one row of tiles, and every computed entry is needed: density · the work of the dense product. For entries a
band is `HEIGHT` rows, which together select 1 − (1 − density)^HEIGHT of the columns: few only at a low density. Whole rows, or
columns, are one product. No tensor of the weight's size is created. Where the products are small one thread computes them all.
"""

import contextlib

import torch
from torch import Tensor

from sparselet.kernels.reference import ENTRY, Block, values_shape
from sparselet.kernels.threads import one_thread

HEIGHT = 16
WAIT = 2**20  # multiplications that a thread could have done while threads wait for one another in a product


def banded_weight_gradient(
    x: Tensor, grad_output: Tensor, blocks: Tensor, block: Block = ENTRY, transposed: bool = False
) -> Tensor:
    """`reference.masked_weight_gradient` of entries or tiles, in another order of summation. blocks: ascending."""
    above, beside = (x, grad_output) if transposed else (grad_output, x)  # ∂L/∂W = aboveᵀ · beside
    rows = above.reshape(-1, above.shape[-1]).t().contiguous()  # [rows, tokens]
    columns = beside.reshape(-1, beside.shape[-1]).t().contiguous()
    if not len(blocks):
        return rows.new_empty(values_shape(0, block))
    return _entries(rows, columns, blocks) if block == ENTRY else _tiles(rows, columns, blocks, block[0])


def line_gradient(x: Tensor, grad_output: Tensor, blocks: Tensor, block: Block, transposed: bool = False) -> Tensor:
    """`reference.masked_weight_gradient` of whole rows (1, columns), or columns (rows, 1), by the product of these alone."""
    sides = [side.reshape(-1, side.shape[-1]) for side in ((x, grad_output) if transposed else (grad_output, x))]
    masked, whole = sides if block[0] == 1 else sides[::-1]
    return (masked.index_select(1, blocks).t() @ whole).view(-1, *block)


def _tiles(rows: Tensor, columns: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    per_row = len(columns) // block_size
    tokens = columns.shape[1]
    tiles = columns.view(per_row, block_size * tokens)  # a tile's columns lie together
    where = blocks % per_row
    result = rows.new_empty(len(blocks), block_size, block_size)
    bands = _bands(blocks, per_row)
    with _threads(block_size, len(blocks) * block_size / len(bands), tokens):
        for band, start, end in bands:
            chosen = tiles.index_select(0, where[start:end]).view((end - start) * block_size, tokens)
            product = rows[band * block_size : (band + 1) * block_size] @ chosen.t()
            result[start:end] = product.view(block_size, end - start, block_size).transpose(0, 1)
    return result


def _entries(rows: Tensor, columns: Tensor, blocks: Tensor) -> Tensor:
    blocks, width = blocks.long(), len(columns)
    band_of = blocks // (HEIGHT * width)
    needed, place = torch.unique(band_of * width + blocks % width, return_inverse=True)
    firsts = torch.searchsorted(needed, torch.arange(-(-len(rows) // HEIGHT) + 1, device=blocks.device) * width).tolist()
    within = blocks // width % HEIGHT
    result = rows.new_empty(len(blocks))
    bands = _bands(blocks, HEIGHT * width)
    with _threads(HEIGHT, len(needed) / len(bands), columns.shape[1]):
        for band, start, end in bands:
            first, last = firsts[band], firsts[band + 1]
            chosen = columns.index_select(0, needed[first:last] % width)
            product = rows[band * HEIGHT : (band + 1) * HEIGHT] @ chosen.t()
            at = within[start:end] * (last - first) + place[start:end] - first
            torch.index_select(product.view(-1), 0, at, out=result[start:end])
    return result


def _threads(height: int, columns: float, tokens: int) -> contextlib.AbstractContextManager[None]:
    """Within it products of a band of this height with so many columns are computed by one thread, if more would be slower."""
    saved = height * columns * tokens * (1 - 1 / torch.get_num_threads())
    return one_thread() if saved < WAIT else contextlib.nullcontext()


def _bands(blocks: Tensor, size: int) -> list[tuple[int, int, int]]:
    """The bands of `size` blocks that hold any: number of the band, first and last + 1 of its `blocks`."""
    present, counts = torch.unique_consecutive(blocks // size, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return list(zip(present.tolist(), [0, *ends[:-1]], ends, strict=True))
