"""Sign election and the disjoint mean, against their dense definition."""

import itertools

import pytest
import torch
from helpers.dense_merges import assert_close, elected_mean, factors, stacked
from helpers.strategies import few, random_delta, same_shape, spelt_out
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseDelta
from sparselet.errors import ArgumentError, ShapeMismatch
from sparselet.merging.algebra.election import disjoint_mean, require_election

elections = st.sampled_from(["sum", "weighted", "count"])
means = st.sampled_from(["count", "weights"])


def at_zero(*values):
    """One delta an expert with a single entry; None for an expert that does not select it."""
    made = [torch.tensor([] if v is None else [v]) for v in values]
    return [SparseDelta((1, 1), torch.zeros(len(v), dtype=torch.int32), v) for v in made]


@few
@given(same_shape(1, 4), factors, elections, means)
def test_the_disjoint_mean_is_the_dense_one(deltas, weights, elect, mean):
    deltas, weights = [d.expand() for d in deltas], weights[: len(deltas)]
    mask = torch.stack([spelt_out(d)[1] for d in deltas]).any(0)
    expected = elected_mean(stacked(deltas), weights, elect, mean, 0.5)
    assert_close(disjoint_mean(deltas, weights, elect=elect, mean=mean, scale=0.5), expected, mask)


@few
@given(same_shape(1, 1), elections, means)
def test_one_delta_with_weight_one_is_itself_and_with_its_negative_weight_cancels(deltas, elect, mean):
    delta = deltas[0].expand()
    alone = disjoint_mean([delta], [1.0], elect=elect, mean=mean)
    assert torch.equal(alone.to_dense(), delta.to_dense())
    assert not disjoint_mean([delta, delta], [1.0, -1.0], elect=elect, mean=mean).values.any()


@few
@given(same_shape(2, 4), factors, elections, means, st.randoms(use_true_random=False))
def test_order_does_not_matter(deltas, weights, elect, mean, random):
    pairs = list(zip((d.expand() for d in deltas), weights, strict=False))
    first = disjoint_mean(*zip(*pairs, strict=True), elect=elect, mean=mean)
    again = disjoint_mean(*zip(*random.sample(pairs, len(pairs)), strict=True), elect=elect, mean=mean)
    torch.testing.assert_close(first.to_dense(), again.to_dense())


@pytest.mark.parametrize("order", itertools.permutations([2.0**24, 1.0, -(2.0**24)]))
def test_a_close_vote_does_not_depend_on_the_order(order):
    merged = disjoint_mean(at_zero(*order), [1.0] * 3)  # in float32 the 1 would be lost beside 2²⁴
    assert merged.values.tolist() == pytest.approx([2.0**23])


def test_the_ways_to_elect_differ_and_are_symmetric_in_sign():
    for sign in (1, -1):
        deltas = at_zero(*(sign * v for v in (1.0, 1.0, -3.0)))
        for elect, weights, expected in (
            ("sum", [1, 1, 1], -3.0),
            ("count", [1, 1, 1], 1.0),
            ("sum", [9, 1, 1], -3.0),
            ("weighted", [9, 1, 1], (9 + 1) / 2),
            ("weighted", [1, 1, -1], (1 + 1 + 3) / 3),
            ("sum", [1, 1, -1], 3.0),
        ):
            found = disjoint_mean(deltas, [float(w) for w in weights], elect=elect)
            assert found.values.tolist() == pytest.approx([sign * expected])


@pytest.mark.parametrize("elect", ["sum", "weighted", "count"])
def test_a_zero_vote_elects_no_sign(elect):
    merged = disjoint_mean(at_zero(2.0, -2.0), [1.0, 1.0], elect=elect)
    assert merged.nnz == 1
    assert merged.values.tolist() == [0.0]


def test_an_entry_that_one_delta_does_not_select_has_no_vote_and_no_share():
    assert disjoint_mean(at_zero(2.0, None, 0.0), [1.0, 1.0, 1.0]).values.tolist() == [2.0]


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.6, 0.8, -1.4], [1e-9, -1e-9], [0.0, 0.0]])
def test_weights_that_sum_to_zero_make_the_entry_zero(weights):
    deltas = at_zero(*(float(i + 1) for i in range(len(weights))))
    assert disjoint_mean(deltas, weights, mean="weights").values.tolist() == [0.0]


def test_small_weights_are_not_taken_for_zero():
    assert disjoint_mean(at_zero(1.0, 3.0), [1e-9, 1e-9], mean="weights").values.tolist() == pytest.approx([2.0])


def test_half_precision_is_averaged_in_float32():
    deltas = [d.to(torch.bfloat16) for d in at_zero(256.0, 1.0)]
    merged = disjoint_mean(deltas, [1.0, 1.0])
    assert (merged.values.dtype, merged.values.tolist()) == (torch.float32, [128.5])


def test_more_deltas_than_a_byte_counts():
    merged = disjoint_mean(at_zero(*[1.0] * 256), [1.0] * 256)
    assert merged.values.tolist() == [1.0]


def test_nothing_selected_stays_nothing_and_shapes_must_agree():
    assert disjoint_mean([SparseDelta.empty((2, 3))] * 2, [1.0, 1.0]).nnz == 0
    with pytest.raises(ShapeMismatch, match="different shapes"):
        disjoint_mean([random_delta((6, 12)), random_delta((12, 6))], [1.0, 1.0])


@pytest.mark.parametrize(
    ("elect", "mean", "message"),
    [
        ("majority", "count", "elect must be one of sum, weighted, count, got 'majority'"),
        ("sum", "uniform", "mean must be one of count, weights, got 'uniform'"),
    ],
)
def test_other_choices_are_refused(elect, mean, message):
    with pytest.raises(ArgumentError, match=message):
        require_election(elect, mean)
