"""Model Stock against its formula and mergekit."""

import pytest
import torch
from helpers.dense_merges import factors
from helpers.strategies import few, random_delta, same_shape, spelt_out
from hypothesis import given

from sparselet import SparseDelta
from sparselet.errors import ShapeMismatch
from sparselet.merging.methods.model_stock import model_stock


def dense_model_stock(taus):
    """The formula on dense float64 [N, entries]."""
    count = len(taus)
    if count == 1:
        return taus[0]
    pairs = [(i, j) for i in range(count) for j in range(i)]
    norms = taus.norm(dim=1)
    cosine = sum(float(taus[i] @ taus[j] / (norms[i] * norms[j])) if norms[i] * norms[j] > 0 else 0.0 for i, j in pairs)
    cosine /= len(pairs)
    divisor = 1 + (count - 1) * cosine
    return (count * cosine / divisor if abs(divisor) > 1e-6 else 0.0) * taus.mean(0)


@few
@given(same_shape(1, 4), factors)
def test_model_stock_is_its_dense_formula(deltas, weights):
    weights = weights[: len(deltas)]
    dense, masks = zip(*map(spelt_out, deltas), strict=True)
    taus = torch.stack([w * d.reshape(-1) for w, d in zip(weights, dense, strict=True)])
    found, mask = spelt_out(model_stock(deltas, weights))
    assert torch.equal(mask, torch.stack(masks).any(0))
    torch.testing.assert_close(found.reshape(-1), dense_model_stock(taus), rtol=1e-5, atol=1e-6)


def alike(count, seed=0):
    """Dense deltas at acute angles."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(6, 12, generator=generator)
    return [shared + torch.randn(6, 12, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_equals_mergekits(count):
    api = pytest.importorskip("mergekit.merge_methods.api")
    dense = alike(count)
    expected = api.merge_tensors([torch.zeros(6, 12), *dense], "model_stock", base_index=0)
    found = model_stock([SparseDelta.from_dense(d) for d in dense], [1.0] * count)
    torch.testing.assert_close(found.to_dense(), expected)


def test_small_deltas_are_merged_as_large_ones():
    """mergekit takes the product of two norms for at least 1e-6, so that small deltas look as if at right angles."""
    dense = alike(3)
    large, small = (model_stock([SparseDelta.from_dense(d * s) for d in dense], [1.0] * 3).to_dense() for s in (1.0, 2.0**-20))
    assert torch.equal(large * 2.0**-20, small)


def test_equal_experts_are_kept_and_opposite_ones_dropped():
    delta = random_delta((6, 6), 1, 0.5, 3)
    torch.testing.assert_close(model_stock([delta] * 3, [1.0] * 3).values, delta.values)
    assert not model_stock([delta, delta.scale(-1)], [1, 1]).values.any()


def test_experts_that_share_no_entry_are_at_right_angles():
    one, other = (SparseDelta((1, 2), torch.tensor([i]), torch.tensor([1.0])) for i in (0, 1))
    assert model_stock([one, other], [1, 1]).values.tolist() == [0, 0]


def test_a_weight_of_0_makes_an_expert_zero():
    one, other = (SparseDelta.from_dense(d) for d in alike(2))
    assert not model_stock([one, other], [1.0, 0.0]).values.any()


def test_other_shapes_are_refused():
    with pytest.raises(ShapeMismatch, match="different shapes"):
        model_stock([random_delta((6, 6)), random_delta((6, 12))], [1, 1])
