"""Multi-SLERP and the Karcher mean against dense vectors on the sphere, and mergekit."""

import math

import pytest
import torch
from helpers.strategies import few, random_delta, same_shape, spelt_out
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseDelta
from sparselet.errors import ArgumentError, ShapeMismatch
from sparselet.merging.methods.sphere import karcher, multislerp

positive = st.lists(st.integers(1, 6).map(lambda n: n / 2), min_size=4, max_size=4)


def flat(deltas):
    return torch.stack([spelt_out(delta)[0].reshape(-1) for delta in deltas])


def shares(weights):
    weights = torch.tensor(weights, dtype=torch.float64)
    return weights / weights.sum()


def blocks(vectors):
    norms = vectors.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, vectors / norms, torch.zeros_like(vectors))


def pull(mean, directions, alphas):
    """Σ αᵢ·log_μ(uᵢ), spelt out."""
    result = torch.zeros_like(mean)
    for direction, alpha in zip(directions, alphas, strict=True):
        angle = math.acos(max(-1.0, min(1.0, float(mean @ direction))))
        if direction.any() and 1e-6 < angle < math.pi - 1e-6:
            result += alpha * angle / math.sin(angle) * (direction - math.cos(angle) * mean)
    return result


def assert_is_dense(delta, deltas, expected):
    found, mask = spelt_out(delta)
    assert torch.equal(mask, torch.stack([spelt_out(d)[1] for d in deltas]).any(0))
    torch.testing.assert_close(found.reshape(-1), expected, rtol=1e-5, atol=1e-6)


@few
@given(same_shape(1, 4), positive)
def test_multislerp_is_the_mean_direction_at_the_mean_length(deltas, weights):
    alphas, vectors = shares(weights[: len(deltas)]), flat(deltas)
    mean = alphas @ blocks(vectors)
    expected = (alphas @ vectors.norm(dim=1)) * mean / mean.norm() if mean.norm() > 1e-6 else alphas @ vectors
    assert_is_dense(multislerp(deltas, weights[: len(deltas)]), deltas, expected)


@few
@given(same_shape(1, 4), positive)
def test_karcher_is_the_iteration_on_dense_vectors(deltas, weights):
    alphas, vectors = shares(weights[: len(deltas)]), flat(deltas)
    mean = alphas @ blocks(vectors)
    if mean.norm() > 1e-6:
        mean /= mean.norm()
        for _ in range(10):
            step = pull(mean, blocks(vectors), alphas)
            if step.norm() <= 1e-5:
                break
            mean = torch.cos(step.norm()) * mean + torch.sin(step.norm()) * step / step.norm()
        expected = (alphas @ vectors.norm(dim=1)) * mean
    else:
        expected = alphas @ vectors
    assert_is_dense(karcher(deltas, weights[: len(deltas)]), deltas, expected)


@few
@given(same_shape(2, 4), positive)
def test_at_the_karcher_mean_the_experts_pull_evenly(deltas, weights):
    alphas, vectors = shares(weights[: len(deltas)]), flat(deltas)
    found = spelt_out(karcher(deltas, weights[: len(deltas)], max_iter=200, tol=1e-9))[0].reshape(-1)
    if (alphas @ blocks(vectors)).norm() > 0.1:
        assert pull(found / found.norm(), blocks(vectors), alphas).norm() < 1e-5


def test_of_two_experts_karcher_is_slerp():
    one, other = (SparseDelta((1, 2), torch.tensor([0, 1]), torch.tensor(v)) for v in ([1.0, 0.0], [0.0, 1.0]))
    for share in (0.1, 0.5, 0.8):
        found = karcher([one, other], [1 - share, share], max_iter=100, tol=1e-12).to_dense()[0]
        torch.testing.assert_close(found, torch.tensor([math.cos(share * math.pi / 2), math.sin(share * math.pi / 2)]))


def cloud(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(6, 12, generator=generator)
    return [(shared + torch.randn(6, 12, generator=generator)) * (i + 1) for i in range(count)]


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp_equals_mergekits(count, normalize):
    api = pytest.importorskip("mergekit.merge_methods.api")
    dense, weights = cloud(count), [1.0, 0.5, 2.0, 0.25, 3.0][:count]
    parameters = {"weight": weights, "normalize_weights": normalize}
    expected = api.merge_tensors([torch.zeros(6, 12), *dense], "multislerp", parameters=parameters, base_index=0)
    found = multislerp([SparseDelta.from_dense(d) for d in dense], weights, normalize_weights=normalize)
    torch.testing.assert_close(found.to_dense(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("max_iter", [0, 1, 2, 20])
def test_karcher_equals_mergekits(count, max_iter):
    api = pytest.importorskip("mergekit.merge_methods.api")
    generator = torch.Generator().manual_seed(1)
    dense = [torch.randn(6, 12, generator=generator) * (i + 1) for i in range(count)]
    expected = api.merge_tensors(dense, "karcher", parameters={"max_iter": max_iter})
    found = karcher([SparseDelta.from_dense(d) for d in dense], [1.0] * count, max_iter=max_iter)
    torch.testing.assert_close(found.to_dense(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [multislerp, karcher])
def test_directions_that_cancel_are_averaged_plainly(method):
    one = random_delta((6, 6), 1, 0.5, 3)
    merged = method([one, one.scale(-3)], [1.0, 1.0])
    torch.testing.assert_close(merged.values, -one.values)
    assert torch.equal(merged.values, method([one.scale(-3), one], [1.0, 1.0]).values)
    assert method([one, one.scale(-1), one, one.scale(-1)], [1.0] * 4).values.abs().max() == 0


def test_a_direction_opposite_to_the_mean_does_not_pull():
    one = SparseDelta((1, 2), torch.tensor([0]), torch.tensor([1.0]))
    merged = karcher([one, one.scale(-1)], [3.0, 1.0])
    assert merged.values.tolist() == [1.0]


@pytest.mark.parametrize("method", [multislerp, karcher])
def test_a_zero_delta_counts_for_the_length_only(method):
    one, zero = random_delta((6, 6), 1, 0.5, 3), SparseDelta.empty((6, 6))
    torch.testing.assert_close(method([one, zero], [1.0, 1.0]).values, one.values / 2)
    assert method([zero, zero, zero], [1.0] * 3).nnz == 0
    assert not method([one.scale(0)] * 3, [1.0] * 3).values.any()


@pytest.mark.parametrize("method", [multislerp, karcher])
def test_short_deltas_have_a_direction_too(method):
    """mergekit's Karcher mean leaves out deltas shorter than tol."""
    dense = cloud(3)
    large, small = (method([SparseDelta.from_dense(d * s) for d in dense], [1.0] * 3).to_dense() for s in (1.0, 2.0**-40))
    torch.testing.assert_close(small * 2.0**40, large)


def test_weights_of_any_size_give_the_same_direction():
    deltas = [SparseDelta.from_dense(d) for d in cloud(3)]
    large, small = (multislerp(deltas, [w] * 3, normalize_weights=False).to_dense() for w in (1.0, 2.0**-40))
    torch.testing.assert_close(small * 2.0**40, large)
    assert not multislerp(deltas, [0.0] * 3, normalize_weights=False).values.any()


def test_two_experts_that_cancel_without_normalization_are_zero():
    one = random_delta((6, 6), 1, 0.5, 3)
    assert not multislerp([one, one], [1.0, -1.0], normalize_weights=False).values.any()


@pytest.mark.parametrize("method", [multislerp, karcher])
@pytest.mark.parametrize("weights", [[1.0, -1.0, 0.0], [0.1, 0.2, -0.3], [0.0, 0.0, 0.0]])
def test_weights_that_sum_to_0_are_refused(method, weights):
    with pytest.raises(ArgumentError, match=f"{method.__name__} divides by the sum of the weights, which is 0"):
        method([random_delta((6, 6), 1, 0.5, seed) for seed in range(3)], weights)


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        (multislerp, {"normalize_weights": 1}, "normalize_weights must be true or false, got 1"),
        (karcher, {"max_iter": -1}, "max_iter must be an integer of at least 0, got -1"),
        (karcher, {"max_iter": 1.5}, "max_iter must be an integer"),
        (karcher, {"max_iter": True}, "max_iter must be an integer"),
        (karcher, {"tol": -1e-5}, "tol must be at least 0"),
        (karcher, {"tol": float("nan")}, "tol must be a finite number"),
    ],
)
def test_parameters_out_of_range_are_refused(method, parameters, message):
    with pytest.raises(ArgumentError, match=message):
        method([SparseDelta.empty((1, 1))] * 2, [1.0, 1.0], **parameters)


@pytest.mark.parametrize("method", [multislerp, karcher])
def test_other_shapes_are_refused(method):
    with pytest.raises(ShapeMismatch, match="different shapes"):
        method([random_delta((6, 6)), random_delta((6, 12))], [1, 1])
