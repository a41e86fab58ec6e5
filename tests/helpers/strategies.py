"""Random deltas for the algebra tests, and what they mean spelt out tile by tile."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from sparselet import SparseDelta

SHAPES = ((6, 6), (6, 12), (12, 6))  # blocks of 1, 2, 3 and 6 divide them all
BLOCKS = (1, 2, 3, 6)
DENSITIES = (0.0, 0.1, 0.5, 1.0)

few = settings(max_examples=40, deadline=None, derandomize=True)


def random_delta(
    shape: tuple[int, int], block_size: int = 1, density: float = 0.3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> SparseDelta:
    """A delta of small multiples of 1/4, so that sums are exact; some selected entries are 0."""
    generator = torch.Generator().manual_seed(seed)
    blocks = shape[0] * shape[1] // block_size**2
    indices = (torch.rand(blocks, generator=generator) < density).nonzero().squeeze(1)
    tile = (block_size, block_size) if block_size > 1 else ()
    values = torch.randint(-4, 5, (len(indices), *tile), generator=generator) / 4
    return SparseDelta(shape, indices, values.to(dtype), block_size)


@st.composite
def deltas(draw: st.DrawFn, shape: tuple[int, int] | None = None, block_size: int | None = None) -> SparseDelta:
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
    side = delta.block_size
    for block, value in zip(delta.indices.tolist(), delta.values, strict=True):
        row, column = (index * side for index in divmod(block, delta.shape[1] // side))
        dense[row : row + side, column : column + side] = value.double()
        mask[row : row + side, column : column + side] = True
    return dense, mask


def assert_is(delta: SparseDelta, dense: Tensor, mask: Tensor) -> None:
    """The delta holds exactly these values at exactly this mask."""
    values, selected = spelt_out(delta)
    assert torch.equal(selected, mask)
    assert torch.equal(values, dense.double())


def tile_sums(matrix: Tensor, block_size: int) -> Tensor:
    """The sum over each non-overlapping tile of `matrix`, row by row."""
    rows, columns = (range(0, side, block_size) for side in matrix.shape)
    return torch.stack([matrix[r : r + block_size, c : c + block_size].sum() for r in rows for c in columns])
