"""Operations on masked entries: read, write, gradient, selection. `reference` defines them."""

import importlib
import math

import torch
from torch import Tensor

from sparselet.kernels import reference
from sparselet.kernels.bands import banded_weight_gradient, line_gradient
from sparselet.kernels.choice import choose, writes_in_one_pass
from sparselet.kernels.reference import (
    ENTRY,
    Block,
    all_finite,
    as_blocks,
    block_entries,
    block_of,
    block_sum,
    gather,
    selected,
    values_shape,
    weight_gradient,
    write,
)
from sparselet.kernels.select import digit_counts, digit_of_rank, kth_largest, number_of

TRITON = "sparselet.kernels.triton"  # imported when used: triton may not be installed

__all__ = [
    "ENTRY",
    "Block",
    "add_and_write",
    "add_at",
    "all_finite",
    "as_blocks",
    "block_entries",
    "block_of",
    "block_sum",
    "digit_counts",
    "digit_of_rank",
    "gather",
    "kth_largest",
    "masked_weight_gradient",
    "number_of",
    "selected",
    "values_shape",
    "weight_gradient",
    "write",
]


def masked_weight_gradient(
    x: Tensor, grad_output: Tensor, blocks: Tensor, block: Block = ENTRY, transposed: bool = False
) -> Tensor:
    """`reference.masked_weight_gradient`, by the fastest version (`choice.choose`). blocks: ascending."""
    inputs, outputs = x.shape[-1], grad_output.shape[-1]
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    chosen = choose(shape, math.prod(x.shape[:-1]), len(blocks), block, x.device)
    if chosen == "triton":
        triton = importlib.import_module(TRITON)
        if block == ENTRY:
            return triton.entry_gradient(x, grad_output, blocks, transposed)
        return triton.tile_gradient(x, grad_output, blocks, block[0], transposed)
    version = {"bands": banded_weight_gradient, "lines": line_gradient, "dense": reference.masked_weight_gradient}[chosen]
    return version(x, grad_output, blocks, block, transposed)


def add_and_write(weight: Tensor, blocks: Tensor, displaced: Tensor, values: Tensor) -> None:
    """`reference.add_and_write`, in one pass if Triton is chosen (`choice.writes_in_one_pass`)."""
    version = importlib.import_module(TRITON) if writes_in_one_pass(weight.device) else reference
    version.add_and_write(weight, blocks, displaced, values)


def add_at(base: Tensor, blocks: Tensor, values: Tensor) -> Tensor:
    """`base` [rows, columns] with `values` added at the blocks, as a new tensor: summed in the wider dtype, rounded once.

    values: [n], or [n, h, w].
    """
    total, block = base.clone(memory_format=torch.contiguous_format), block_of(values)
    plain = base.device.type == "cpu" and not writes_in_one_pass(base.device)
    if plain and block != ENTRY and 1 not in block:
        columns = base.shape[1] // block[1]
        tiles, places = as_blocks(total, block), (blocks.long() // columns, blocks.long() % columns)
        tiles[places] = (tiles[places] + values).to(base.dtype)
    elif plain and block == ENTRY and base.dtype == values.dtype:
        total.view(-1).index_add_(0, blocks, values)  # one pass, where reading and writing take three
    else:
        add_and_write(total, blocks, reference.gather(base, blocks, block), values)
    return total
