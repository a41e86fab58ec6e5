"""Random deltas for the algebra tests, and what they mean spelt out block by block."""

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from sparselet import SparseDelta
from sparselet.delta import BlockSize, block_for
from sparselet.kernels import values_shape

SHAPES = ((6, 6), (6, 12), (12, 6))  # tiles of 2, 3 and 6 divide them all
BLOCKS = (1, 2, 3, 6, "row", "column")
DENSITIES = (0.0, 0.1, 0.5, 1.0)

few = settings(max_examples=40, deadline=None, derandomize=True)


def random_delta(
    shape: tuple[int, int], block_size: BlockSize = 1, density: float = 0.3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> SparseDelta:
    """A delta of small multiples of 1/4, so that sums are exact; some selected entries are 0."""
    generator = torch.Generator().manual_seed(seed)
    block = block_for(block_size, shape)
    indices = (torch.rand(math.prod(shape) // math.prod(block), generator=generator) < density).nonzero().squeeze(1)
    values = torch.randint(-4, 5, values_shape(len(indices), block), generator=generator) / 4
    return SparseDelta(shape, indices, values.to(dtype))


@st.composite
def deltas(draw: st.DrawFn, shape: tuple[int, int] | None = None, block_size: BlockSize | None = None) -> SparseDelta:
    return random_delta(
        shape or draw(st.sampled_from(SHAPES)),
        block_size or draw(st.sampled_from(BLOCKS)),
        draw(st.sampled_from(DENSITIES)),
        draw(st.integers(0, 2**16)),
    )


@st.composite
def same_shape(draw: st.DrawFn, smallest: int = 2, largest: int = 2) -> list[SparseDelta]:
    """Several deltas of one shape; their block sizes and densities differ."""
    shape = draw(st.sampled_from(SHAPES))
    return draw(st.lists(deltas(shape), min_size=smallest, max_size=largest))


def spelt_out(delta: SparseDelta) -> tuple[Tensor, Tensor]:
    """ΔW in float64 and its mask, dense, written one block at a time."""
    dense = torch.zeros(delta.shape, dtype=torch.float64)
    mask = torch.zeros(delta.shape, dtype=torch.bool)
    h, w = delta.block
    for block, value in zip(delta.indices.tolist(), delta.values, strict=True):
        row, column = block // (delta.shape[1] // w) * h, block % (delta.shape[1] // w) * w
        dense[row : row + h, column : column + w] = value.double()
        mask[row : row + h, column : column + w] = True
    return dense, mask


def assert_is(delta: SparseDelta, dense: Tensor, mask: Tensor) -> None:
    """The delta holds exactly these values at exactly this mask."""
    values, selected = spelt_out(delta)
    assert torch.equal(selected, mask)
    assert torch.equal(values, dense.double())


def block_sums(matrix: Tensor, block_size: BlockSize) -> Tensor:
    """The sum over each block of `matrix`, row by row."""
    h, w = block_for(block_size, (matrix.shape[0], matrix.shape[1]))
    rows, columns = range(0, matrix.shape[0], h), range(0, matrix.shape[1], w)
    return torch.stack([matrix[r : r + h, c : c + w].sum() for r in rows for c in columns])
