"""Operations on masked entries: read, write, gradient, selection. `reference` defines them."""

import importlib
import math

import torch
from torch import Tensor

from sparselet.kernels import reference
from sparselet.kernels.bands import banded_weight_gradient
from sparselet.kernels.choice import choose, writes_in_one_pass
from sparselet.kernels.reference import all_finite, as_tiles, gather, selected, tile_entries, tile_sum, weight_gradient, write
from sparselet.kernels.select import digit_counts, digit_of_rank, kth_largest, number_of

TRITON = "sparselet.kernels.triton"  # imported when used: triton may not be installed

__all__ = [
    "add_and_write",
    "add_at",
    "all_finite",
    "as_tiles",
    "digit_counts",
    "digit_of_rank",
    "gather",
    "kth_largest",
    "masked_weight_gradient",
    "number_of",
    "selected",
    "tile_entries",
    "tile_sum",
    "weight_gradient",
    "write",
]


def masked_weight_gradient(
    x: Tensor, grad_output: Tensor, blocks: Tensor, block_size: int = 1, transposed: bool = False
) -> Tensor:
    """`reference.masked_weight_gradient`, by the fastest version (`choice.choose`). blocks: ascending."""
    inputs, outputs = x.shape[-1], grad_output.shape[-1]
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    chosen = choose(shape, math.prod(x.shape[:-1]), len(blocks), block_size, x.device)
    if chosen == "triton":
        triton = importlib.import_module(TRITON)
        if block_size == 1:
            return triton.entry_gradient(x, grad_output, blocks, transposed)
        return triton.tile_gradient(x, grad_output, blocks, block_size, transposed)
    version = banded_weight_gradient if chosen == "bands" else reference.masked_weight_gradient
    return version(x, grad_output, blocks, block_size, transposed)


def add_and_write(weight: Tensor, blocks: Tensor, displaced: Tensor, values: Tensor, block_size: int = 1) -> None:
    """`reference.add_and_write`, in one pass if Triton is chosen (`choice.writes_in_one_pass`)."""
    version = importlib.import_module(TRITON) if writes_in_one_pass(weight.device) else reference
    version.add_and_write(weight, blocks, displaced, values, block_size)


def add_at(base: Tensor, blocks: Tensor, values: Tensor, block_size: int = 1) -> Tensor:
    """`base` [rows, columns] with `values` added at the blocks, as a new tensor: summed in the wider dtype, rounded once.

    values: [n], or [n, B, B] for tiles.
    """
    total = base.clone(memory_format=torch.contiguous_format)
    plain = base.device.type == "cpu" and not writes_in_one_pass(base.device)
    if plain and block_size > 1:
        columns = base.shape[1] // block_size
        tiles, places = as_tiles(total, block_size), (blocks.long() // columns, blocks.long() % columns)
        tiles[places] = (tiles[places] + values).to(base.dtype)
    elif plain and base.dtype == values.dtype:
        total.view(-1).index_add_(0, blocks, values)  # one pass, where reading and writing take three
    else:
        add_and_write(total, blocks, reference.gather(base, blocks, block_size), values, block_size)
    return total
