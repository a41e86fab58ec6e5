"""Task arithmetic and MagMax against their dense definitions, mergekit and PEFT."""

import pytest
import torch
from helpers.dense_merges import assert_close, factors, stacked
from helpers.strategies import few, random_delta, same_shape, spelt_out
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseDelta
from sparselet.errors import ArgumentError, ShapeMismatch
from sparselet.merging.methods.arithmetic import arithmetic, magmax

factor = st.integers(-4, 4).map(lambda n: n / 2)


def scaled(deltas, weights):
    """wᵢ·ΔWᵢ, dense, and the union of the masks."""
    taus = stacked(deltas) * torch.tensor(weights[: len(deltas)], dtype=torch.float64).view(-1, 1, 1)
    return taus, torch.stack([spelt_out(delta)[1] for delta in deltas]).any(0)


@few
@given(same_shape(1, 4), factors, factor)
def test_arithmetic_is_the_dense_sum(deltas, weights, scale):
    taus, union = scaled(deltas, weights)
    assert_close(arithmetic(deltas, weights[: len(deltas)], scale=scale), scale * taus.sum(0), union)


@few
@given(same_shape(1, 4), factors, factor)
def test_magmax_takes_the_largest_and_the_positive_of_equals(deltas, weights, scale):
    taus, union = scaled(deltas, weights)
    largest = taus.abs().amax(0)
    expected = torch.where((taus == largest).any(0), largest, -largest)
    assert_close(magmax(deltas, weights[: len(deltas)], scale=scale), scale * expected, union)


def test_magmax_of_opposite_values_is_positive_in_any_order():
    plus, minus = (SparseDelta((1, 2), torch.tensor([1]), torch.tensor([value])) for value in (2.0, -2.0))
    assert magmax([plus, minus], [1, 1]).values.tolist() == [2.0]
    assert magmax([minus, plus], [1, 1]).values.tolist() == [2.0]


def test_magmax_keeps_a_negative_value_that_stands_alone():
    lone = SparseDelta((1, 3), torch.tensor([0, 2]), torch.tensor([-2.0, -1.0]))
    other = SparseDelta((1, 3), torch.tensor([1, 2]), torch.tensor([-3.0, 0.5]))
    assert magmax([lone, other], [1, 1]).values.tolist() == [-2.0, -3.0, -1.0]


@pytest.mark.parametrize("method", [arithmetic, magmax])
def test_whole_tiles_stay_tiles(method):
    tiles = [random_delta((6, 12), 3, 0.5, seed) for seed in (1, 2)]
    assert method(tiles, [1, 1]).block == (3, 3)


@pytest.mark.parametrize("method", [arithmetic, magmax])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", True, None])
def test_a_scale_that_is_no_finite_number_is_refused(method, scale):
    with pytest.raises(ArgumentError, match="scale must be a finite number"):
        method([random_delta((6, 6))], [1], scale=scale)


@pytest.mark.parametrize("method", [arithmetic, magmax])
def test_other_shapes_are_refused(method):
    with pytest.raises(ShapeMismatch, match="different shapes"):
        method([random_delta((6, 6)), random_delta((6, 12))], [1, 1])


def test_arithmetic_equals_mergekits_task_arithmetic():
    api = pytest.importorskip("mergekit.merge_methods.api")
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(6, 12, generator=generator) * (torch.rand(6, 12, generator=generator) < 0.5) for _ in range(3)]
    expected = api.merge_tensors(
        [torch.zeros(6, 12), *dense], "task_arithmetic", parameters={"weight": [0.5, -1.0, 2.0], "lambda": 0.3}, base_index=0
    )
    found = arithmetic([SparseDelta.from_dense(d) for d in dense], [0.5, -1.0, 2.0], scale=0.3)
    torch.testing.assert_close(found.to_dense(), expected)


def test_arithmetic_equals_pefts_task_arithmetic():
    utils = pytest.importorskip("peft.utils.merge_utils")
    dense = [spelt_out(random_delta((6, 12), b, 0.5, s))[0].float() for b, s in ((1, 1), (2, 2), (3, 3))]
    expected = utils.task_arithmetic(dense, torch.tensor([0.5, -1.0, 2.0]))
    torch.testing.assert_close(arithmetic([SparseDelta.from_dense(d) for d in dense], [0.5, -1.0, 2.0]).to_dense(), expected)
