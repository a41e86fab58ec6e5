"""The reference kernels against dense autograd in float64."""

import math

import pytest
import torch

from sparselet import kernels
from sparselet.delta import block_for

LEADING = {"matrix": (5,), "three dimensions": (2, 3), "one token": (1,), "one token of one row": (1, 1), "nothing": (0,)}
OUT, IN = 6, 12


def dense_gradient(x, grad_output, transposed):
    weight = torch.randn(*((IN, OUT) if transposed else (OUT, IN)), dtype=torch.float64, requires_grad=True)
    y = x @ weight if transposed else torch.nn.functional.linear(x, weight)
    y.backward(grad_output)
    return weight.grad


@pytest.fixture(params=LEADING.values(), ids=LEADING)
def batch(request):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*request.param, side, dtype=torch.float64, generator=generator) for side in (IN, OUT))


@pytest.mark.parametrize("transposed", [False, True])
def test_weight_gradient_is_autograds(batch, transposed):
    torch.testing.assert_close(kernels.weight_gradient(*batch, transposed), dense_gradient(*batch, transposed))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block_size", [1, 2, 3, 6, "row", "column"])
@pytest.mark.parametrize("kept", ["none", "some", "all"])
def test_masked_weight_gradient_is_autograds_at_the_mask(batch, transposed, block_size, kept):
    dense = dense_gradient(*batch, transposed)
    h, w = block = block_for(block_size, dense.shape)
    count = dense.numel() // (h * w)
    blocks = {"none": torch.arange(0), "some": torch.arange(0, count, 2), "all": torch.arange(count)}[kept]
    found = kernels.masked_weight_gradient(*batch, blocks, block, transposed)
    assert found.shape == kernels.values_shape(len(blocks), block)
    for i, value in zip(blocks.tolist(), found, strict=True):
        row, column = i // (dense.shape[1] // w) * h, i % (dense.shape[1] // w) * w
        torch.testing.assert_close(value.reshape(h, w), dense[row : row + h, column : column + w])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_keeps_the_inputs_dtype(dtype):
    x, grad_output = torch.ones(2, IN, dtype=dtype), torch.ones(2, OUT, dtype=dtype)
    assert kernels.weight_gradient(x, grad_output).dtype == dtype
    assert kernels.masked_weight_gradient(x, grad_output, torch.tensor([1])).dtype == dtype


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("block_size", [1, 2, 3, "row", "column"])
def test_gather_undoes_write_and_write_touches_nothing_else(block_size, index_dtype):
    weight = torch.arange(72.0).view(OUT, IN)
    before = weight.clone()
    block = block_for(block_size, (OUT, IN))
    blocks = torch.tensor([0, 3, 5], dtype=index_dtype)
    displaced = kernels.gather(weight, blocks, block)
    assert block == (1, 1) or torch.equal(displaced, kernels.as_blocks(weight, block).flatten(0, 1)[blocks.long()])
    values = -1 - torch.rand_like(displaced)
    kernels.write(weight, blocks, values)
    assert torch.equal(kernels.gather(weight, blocks, block), values)
    assert int((weight != before).sum()) == values.numel()
    kernels.write(weight, blocks, displaced)
    assert torch.equal(weight, before)


def test_gather_copies():
    weight = torch.zeros(OUT, IN)
    for block in ((1, 1), (2, 2), (1, IN), (OUT, 1), (2, 3)):
        kernels.gather(weight, torch.arange(4), block).fill_(1.0)
    assert not weight.any()


def test_write_casts_to_the_weights_dtype():
    weight = torch.zeros(2, 2, dtype=torch.bfloat16)
    kernels.write(weight, torch.tensor([1]), torch.tensor([1 / 3]))
    assert weight[0, 1] == torch.tensor(1 / 3).bfloat16()


@pytest.mark.parametrize("block_size", [1, 2, 3, 6, "row", "column"])
def test_block_entries_are_the_flat_ids_that_gather_reads(block_size):
    ids = torch.arange(72).view(OUT, IN)
    block = block_for(block_size, (OUT, IN))
    blocks = torch.arange(72 // math.prod(block))
    expected = kernels.gather(ids, blocks, block).view(-1, *block)
    assert torch.equal(kernels.block_entries(blocks.int(), (OUT, IN), block), expected)


def test_block_entries_do_not_wrap_in_a_target_beyond_int32():
    shape = (2**20, 2**14)
    for block in ((16, 16), (1, 2**14), (2**20, 1)):
        last = math.prod(shape) // math.prod(block) - 1
        assert kernels.block_entries(torch.tensor([last], dtype=torch.int32), shape, block).max() == 2**34 - 1


@pytest.mark.parametrize("block_size", [1, 2, 3, "row", "column"])
def test_block_sum_adds_the_entries_of_each_block(block_size):
    for matrix in (torch.arange(72.0).view(OUT, IN), torch.arange(72.0).view(IN, OUT).t()):
        h, w = block = block_for(block_size, matrix.shape)
        rows, columns = (range(0, side, step) for side, step in zip(matrix.shape, block, strict=True))
        expected = [matrix[r : r + h, c : c + w].sum() for r in rows for c in columns]
        assert kernels.block_sum(matrix, block).tolist() == expected


def test_as_blocks_is_a_view():
    matrix = torch.zeros(OUT, IN)
    kernels.as_blocks(matrix, (3, 3))[1, 2] = 1.0
    assert matrix[3:, 6:9].all()
    assert matrix.sum() == 9


@pytest.mark.parametrize("block_size", [1, 2, 4, "row", "column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("contiguous", [True, False])
def test_added_values_are_those_of_the_dense_sum_rounded_once(block_size, dtype, contiguous):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 12, generator=generator).to(dtype)
    base = base if contiguous else base.t().contiguous().t()
    block = block_for(block_size, (8, 12))
    blocks = torch.randperm(96 // math.prod(block), generator=generator)[:5].sort().values.to(torch.int32)
    shape = kernels.values_shape(5, block)
    values = torch.randn(shape, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    dense = torch.zeros(8, 12, dtype=values.dtype)
    kernels.write(dense, blocks, values)
    before = base.clone()
    assert torch.equal(kernels.add_at(base, blocks, values), (base.to(values.dtype) + dense).to(dtype))
    assert torch.equal(base, before)
