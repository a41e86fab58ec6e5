"""Averages of deltas against their dense definitions (paper, Eq. 4), and against mergekit."""

import pytest
import torch
from helpers.dense_merges import assert_close, factors
from helpers.strategies import assert_is, few, random_delta, same_shape, spelt_out
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseDelta
from sparselet.errors import ArgumentError, ShapeMismatch
from sparselet.merging import overlap, uniform


def stacked(deltas):
    dense, masks = zip(*map(spelt_out, deltas), strict=True)
    return torch.stack(dense), torch.stack(masks)


@few
@given(same_shape(1, 4), factors)
def test_overlap_is_the_dense_sum_over_the_count_of_masks(deltas, weights):
    dense, masks = stacked(deltas)
    weights = weights[: len(deltas)]
    expected = (dense * torch.tensor(weights).view(-1, 1, 1)).sum(0) / masks.sum(0).clamp(min=1)
    assert_close(overlap(deltas, weights), expected, masks.any(0))


@few
@given(same_shape(1, 4))
def test_uniform_is_the_dense_mean(deltas):
    dense, masks = stacked(deltas)
    assert_close(uniform(deltas, [1.0] * len(deltas)), dense.mean(0), masks.any(0))


@few
@given(same_shape(2, 4), st.lists(st.integers(1, 5).map(lambda n: n / 2), min_size=4, max_size=4))
def test_uniform_with_weights_is_the_dense_weighted_mean(deltas, weights):
    dense, masks = stacked(deltas)
    weights = torch.tensor(weights[: len(deltas)])
    expected = (dense * weights.view(-1, 1, 1)).sum(0) / weights.sum()
    assert_close(uniform(deltas, weights.tolist()), expected, masks.any(0))


@few
@given(same_shape(1, 1))
def test_one_expert_is_itself_to_the_last_bit(deltas):
    for method in (overlap, uniform):
        merged = method(deltas, [1.0])
        assert_is(merged, *spelt_out(deltas[0]))
        assert merged.block == deltas[0].block or merged.nnz == 0


def test_an_entry_selected_with_value_zero_counts():
    one, zero = (SparseDelta((1, 2), torch.tensor([0]), torch.tensor([value])) for value in (1.0, 0.0))
    assert overlap([one, zero], [1, 1]).values.tolist() == [0.5]
    assert overlap([zero, zero], [1, 1]).nnz == 1


@pytest.mark.parametrize("method", [overlap, uniform])
@pytest.mark.parametrize(("block_size", "block"), [(3, (3, 3)), ("row", (1, 12)), ("column", (6, 1))])
def test_blocks_of_one_kind_stay_blocks_and_others_become_entries(method, block_size, block):
    tiles, other_tiles, other_block = (random_delta((6, 12), b, 0.5, s) for b, s in ((block_size, 1), (block_size, 2), (2, 3)))
    empty = SparseDelta.empty((6, 12))
    assert method([tiles, other_tiles, empty], [1, 1, 1]).block == block
    assert method([tiles, other_block], [1, 1]).block == (1, 1)
    assert method([empty, empty], [1, 1]).nnz == 0


@pytest.mark.parametrize("method", [overlap, uniform])
def test_half_precision_experts_are_summed_in_float32(method):
    low = SparseDelta((1, 1), torch.tensor([0]), torch.tensor([256.0], dtype=torch.bfloat16))
    high = SparseDelta((1, 1), torch.tensor([0]), torch.tensor([1.0], dtype=torch.bfloat16))
    merged = method([low, high], [1, 1])
    assert merged.values.dtype == torch.float32
    assert merged.values.tolist() == [128.5]


def test_more_masks_than_a_byte_can_count():
    deltas = [SparseDelta((1, 1), torch.tensor([0]), torch.tensor([float(i)])) for i in range(300)]
    assert overlap(deltas, [1.0] * 300).values.tolist() == [149.5]


def test_overlap_equals_mergekits_ram_with_epsilon_zero():
    api = pytest.importorskip("mergekit.merge_methods.api")
    dense = [spelt_out(random_delta((6, 12), b, 0.5, s))[0].float() for b, s in ((1, 1), (2, 2), (3, 3))]
    expected = api.merge_tensors([torch.zeros(6, 12), *dense], "ram", parameters={"epsilon": 0.0}, base_index=0)
    found = overlap([SparseDelta.from_dense(d) for d in dense], [1, 1, 1])
    torch.testing.assert_close(found.to_dense(), expected)


def test_uniform_refuses_weights_that_sum_to_zero():
    with pytest.raises(ArgumentError, match="uniform divides by the sum of the weights, which is 0"):
        uniform([random_delta((6, 12))] * 2, [1, -1])


@pytest.mark.parametrize("method", [overlap, uniform])
def test_deltas_of_different_shapes_are_refused(method):
    with pytest.raises(ShapeMismatch, match="different shapes"):
        method([random_delta((6, 12)), random_delta((12, 6))], [1, 1])
