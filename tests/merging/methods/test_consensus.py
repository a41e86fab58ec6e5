"""Consensus merging and TALL masks against their dense definitions."""

import pytest
import torch
from helpers.dense_merges import factors, stacked
from helpers.strategies import few, random_delta, same_shape, spelt_out
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseDelta
from sparselet.errors import ArgumentError, ShapeMismatch
from sparselet.merging.methods import METHODS
from sparselet.merging.methods.arithmetic import arithmetic
from sparselet.merging.methods.consensus import consensus, consensus_experts

lambdas = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 4.0]), min_size=4, max_size=4)


def dense_masks(deltas, weights, mask_lambda):
    """τ_MTL [rows, columns], and the TALL masks [N, rows, columns], in float64."""
    taus = stacked(deltas) * torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    together = taus.sum(0)
    return together, (taus.abs() >= torch.tensor(mask_lambda).view(-1, 1, 1) * (together - taus).abs()) & (taus != 0)


@few
@given(same_shape(2, 4), factors, lambdas, st.integers(1, 2))
def test_consensus_is_its_dense_definition(deltas, weights, mask_lambda, k):
    weights, mask_lambda = weights[: len(deltas)], mask_lambda[: len(deltas)]
    together, masks = dense_masks(deltas, weights, mask_lambda)
    found, mask = spelt_out(consensus(deltas, weights, k=k, mask_lambda=mask_lambda, scale=0.5))
    assert torch.equal(found, 0.5 * together * (masks.sum(0) >= k))
    assert torch.equal(mask, masks.sum(0) >= k)


@few
@given(same_shape(1, 4), factors, lambdas)
def test_the_experts_are_their_dense_definition_on_their_own_masks(deltas, weights, mask_lambda):
    weights, mask_lambda = weights[: len(deltas)], mask_lambda[: len(deltas)]
    together, masks = dense_masks(deltas, weights, mask_lambda)
    experts = consensus_experts(deltas, weights, mask_lambda=mask_lambda, scale=0.5)
    for found, delta, mask in zip(experts, deltas, masks, strict=True):
        assert torch.equal(spelt_out(found)[1], spelt_out(delta)[1])
        assert torch.equal(spelt_out(found)[0], 0.5 * together * mask)


@few
@given(same_shape(1, 4), factors)
def test_with_one_vote_and_no_threshold_consensus_is_task_arithmetic(deltas, weights):
    weights = weights[: len(deltas)]
    found = consensus(deltas, weights, k=1, mask_lambda=0.0, scale=0.3).to_dense()
    torch.testing.assert_close(found, arithmetic(deltas, weights, scale=0.3).to_dense())


def line(*values):
    return SparseDelta((1, len(values)), torch.arange(len(values)), torch.tensor(values))


def test_what_one_task_alone_wants_is_dropped():
    # general: both want it; selfish: the first; catastrophic: three small ones that sum far from each
    deltas = [line(2.0, 5.0, 1.0), line(2.0, 0.1, 1.0), line(2.0, 0.1, 1.0)]
    assert consensus(deltas, [1, 1, 1], mask_lambda=0.5).indices.tolist() == [0, 2]
    assert consensus(deltas, [1, 1, 1], mask_lambda=0.5, k=1).indices.tolist() == [0, 1, 2]
    assert consensus(deltas, [1, 1, 1], mask_lambda=0.6).nnz == 0


def test_one_threshold_for_all_is_that_threshold_for_each():
    deltas = [random_delta((6, 12), b, 0.5, s) for b, s in ((1, 1), (2, 2), (3, 3))]
    one, each = (consensus(deltas, [1.0] * 3, mask_lambda=m).to_dense() for m in (0.3, [0.3] * 3))
    assert torch.equal(one, each)


def test_tiles_of_the_experts_stay_tiles():
    tiles = [random_delta((6, 12), 3, 0.5, seed) for seed in (1, 2)]
    assert [expert.block for expert in consensus_experts(tiles, [1, 1])] == [(3, 3), (3, 3)]


def test_consensus_is_registered_with_its_experts():
    assert METHODS["consensus"].per_expert is consensus_experts


@pytest.mark.parametrize("method", [consensus, consensus_experts])
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"mask_lambda": -0.1}, "mask_lambda must be at least 0, got -0.1"),
        ({"mask_lambda": [0.1, float("nan")]}, "mask_lambda must be a finite number"),
        ({"mask_lambda": "0.4"}, "mask_lambda must be a finite number"),
        ({"scale": None}, "scale must be a finite number"),
    ],
)
def test_parameters_out_of_range_are_refused(method, parameters, message):
    with pytest.raises(ArgumentError, match=message):
        method([SparseDelta.empty((1, 1))] * 2, [1.0, 1.0], **parameters)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "2"])
def test_k_that_is_no_count_is_refused(k):
    with pytest.raises(ArgumentError, match="k must be an integer of at least 1"):
        consensus([SparseDelta.empty((1, 1))] * 2, [1.0, 1.0], k=k)


def test_more_votes_than_experts_are_refused_once_there_is_something_to_merge():
    with pytest.raises(ArgumentError, match="k is 2, but there is 1 expert to select an entry"):
        consensus([line(1.0)], [1.0])
    with pytest.raises(ArgumentError, match="k is 3, but there are 2 experts to select an entry"):
        consensus([line(1.0)] * 2, [1.0, 1.0], k=3)
    assert consensus([SparseDelta.empty((1, 1))] * 2, [1.0, 1.0], k=3).nnz == 0


@pytest.mark.parametrize("method", [consensus, consensus_experts])
def test_a_wrong_number_of_thresholds_is_refused(method):
    with pytest.raises(ArgumentError, match="2 experts need as many mask_lambda, or one for all; got 3"):
        method([line(1.0)] * 2, [1.0, 1.0], mask_lambda=[0.1] * 3)
    method([SparseDelta.empty((1, 1))] * 2, [1.0, 1.0], mask_lambda=[0.1] * 3)


@pytest.mark.parametrize("method", [consensus, consensus_experts])
def test_other_shapes_are_refused(method):
    with pytest.raises(ShapeMismatch, match="different shapes"):
        method([random_delta((6, 6)), random_delta((6, 12))], [1, 1])
