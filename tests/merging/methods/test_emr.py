"""EMR-Merging against its dense definition: the unified delta, the experts made from it, the survey of whole models."""

import pytest
import torch
from helpers.dense_merges import factors, stacked
from helpers.strategies import few, random_delta, same_shape, spelt_out
from hypothesis import given

from sparselet import SparseDelta
from sparselet.errors import ShapeMismatch
from sparselet.merging.methods import METHODS
from sparselet.merging.methods.emr import emr, emr_experts, emr_rescalers


def dense_taus(deltas, weights):
    return stacked(deltas) * torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)


def dense_unified(taus):
    sign = taus.sum(0).sign()
    return sign * (taus * sign).clamp(min=0).amax(0)


def dense_experts(taus, rescalers=None):
    unified = dense_unified(taus)
    kept = torch.where(taus * unified > 0, unified, 0.0)
    if rescalers is None:
        own, left = (x.abs().sum(dim=(1, 2)) for x in (taus, kept))
        rescalers = torch.where(left > 0, own / left, 0.0)
    return kept * rescalers.view(-1, 1, 1)


@few
@given(same_shape(1, 4), factors)
def test_emr_is_its_dense_definition(deltas, weights):
    weights = weights[: len(deltas)]
    found, mask = spelt_out(emr(deltas, weights))
    assert torch.equal(mask, torch.stack([spelt_out(d)[1] for d in deltas]).any(0))
    assert torch.equal(found, dense_unified(dense_taus(deltas, weights)))


@few
@given(same_shape(1, 4), factors)
def test_the_experts_are_their_dense_definition_on_their_own_masks(deltas, weights):
    weights = weights[: len(deltas)]
    expected = dense_experts(dense_taus(deltas, weights))
    for found, delta, dense in zip(emr_experts(deltas, weights), deltas, expected, strict=True):
        assert torch.equal(spelt_out(found)[1], spelt_out(delta)[1])
        torch.testing.assert_close(spelt_out(found)[0], dense, rtol=1e-6, atol=1e-7)


@few
@given(same_shape(2, 2), same_shape(2, 2), factors)
def test_the_survey_sums_over_all_targets(first, second, weights):
    targets = [(first, weights[:2]), (second, weights[2:])]
    rescalers = emr_rescalers(lambda: targets, {})
    taus = [dense_taus(*target) for target in targets]
    for i in range(2):
        own = sum(t[i].abs().sum() for t in taus)
        left = sum(torch.where(t[i] * dense_unified(t) > 0, dense_unified(t), 0.0).abs().sum() for t in taus)
        assert rescalers[i] == pytest.approx(float(own / left) if left else 0.0)
    for target, dense in zip(targets, taus, strict=True):
        for found, expected in zip(
            emr_experts(*target, stats=rescalers), dense_experts(dense, torch.tensor(rescalers)), strict=True
        ):
            torch.testing.assert_close(spelt_out(found)[0], expected, rtol=1e-5, atol=1e-6)


def test_rescaled_experts_have_the_magnitude_of_the_originals():
    deltas = [random_delta((6, 12), b, 0.5, s) for b, s in ((1, 1), (2, 2), (3, 3))]
    for found, delta in zip(emr_experts(deltas, [1.0] * 3), deltas, strict=True):
        assert found.values.abs().sum().item() == pytest.approx(delta.values.abs().sum().item())


def line(*values):
    return SparseDelta((1, len(values)), torch.arange(len(values)), torch.tensor(values))


def test_the_largest_of_the_elected_sign_is_taken():
    assert emr([line(1.0, -5.0), line(3.0, 3.0), line(2.0, 3.0)], [1, 1, 1]).values.tolist() == [3.0, 3.0]


def test_a_vote_of_zero_elects_no_sign():
    deltas = [line(1.0, 2.0), line(-1.0, 1.0)]
    assert emr(deltas, [1, 1]).values.tolist() == [0.0, 2.0]
    assert emr_experts(deltas, [1, 1])[1].values.tolist() == [0.0, 2.0]


def test_an_expert_outvoted_everywhere_becomes_zero():
    assert emr_experts([line(3.0), line(-1.0)], [1, 1])[1].values.tolist() == [0.0]


def test_tiles_stay_tiles():
    tiles = [random_delta((6, 12), 3, 0.5, seed) for seed in (1, 2)]
    assert emr(tiles, [1, 1]).block == (3, 3)
    assert [expert.block for expert in emr_experts(tiles, [1, 1])] == [(3, 3), (3, 3)]


def test_emr_is_registered_with_its_survey_and_its_experts():
    assert METHODS["emr"].per_expert_stats is emr_rescalers
    assert METHODS["emr"].per_expert is emr_experts


@pytest.mark.parametrize("method", [emr, emr_experts])
def test_other_shapes_are_refused(method):
    with pytest.raises(ShapeMismatch, match="different shapes"):
        method([random_delta((6, 6)), random_delta((6, 12))], [1, 1])
