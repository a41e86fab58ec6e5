"""Core isolation against its dense definition, and SLERP against mergekit's and its geometry."""

import math

import pytest
import torch
from helpers.dense_merges import assert_close, distinct, factors, full_deltas, largest, normal, stacked
from helpers.strategies import few, random_delta, spelt_out
from hypothesis import given
from hypothesis import strategies as st
from mergekit.merge_methods.slerp import slerp as mergekit_slerp

from sparselet import SparseAdapter, SparseDelta, merge
from sparselet.errors import ArgumentError, DensityOutOfRange
from sparselet.merging.methods.cpi import cpi, slerp_coefficients

densities = st.sampled_from([0.01, 0.2, 0.5, 1.0])


def slerp(a, b, share):
    """Shoemake's formula on dense vectors; linear where they are nearly parallel, or one is 0."""
    lengths = a.norm() * b.norm()
    cosine = float((a * b).sum() / lengths) if lengths else 1.0
    if abs(cosine) > 0.9995:
        return (1 - share) * a + share * b
    angle = math.acos(cosine)
    return (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)


def defined(x, weights, core):
    """The definition on dense tensors: x, core of shape [experts, rows, columns]."""
    tau = x * torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    outside = ~core.any(0)
    rest = tau[-1] * outside
    for count, i in enumerate(range(len(x) - 2, -1, -1), 2):
        rest = slerp(rest, tau[i] * outside, 1 / count)
    earlier = core[:-1].any(0)
    mean = (tau[:-1] * core[:-1]).sum(0) / core[:-1].sum(0).clamp_min(1)
    return torch.where(earlier, mean, torch.where(core[-1], tau[-1], rest))


@few
@given(distinct(1, 4), factors, densities, st.sampled_from(["size", "nonzeros"]))
def test_cpi_is_the_dense_definition(deltas, weights, density, density_of):
    weights, x = weights[: len(deltas)], stacked(deltas)
    core = torch.stack([largest(part, density, density_of) for part in x]) != 0
    found = cpi(deltas, weights, density=density, density_of=density_of)
    assert_close(found, defined(x, weights, core), torch.stack([spelt_out(delta)[1] for delta in deltas]).any(0))


@few
@given(st.lists(distinct(3, 3), min_size=1, max_size=3), densities)
def test_cores_are_ranked_over_all_targets(targets, density):
    adapters = [SparseAdapter({f"layers.{t}.q": deltas[i] for t, deltas in enumerate(targets)}) for i in range(3)]
    merged = merge(adapters, "cpi", [1.0, 0.5, 2.0], density=density)
    flat = torch.stack([torch.cat([stacked(deltas)[i].flatten() for deltas in targets]) for i in range(3)])
    core = torch.stack([largest(part, density, "size") for part in flat]) != 0
    sizes = [deltas[0].size for deltas in targets]
    for t, part in enumerate(core.split(sizes, dim=1)):
        x = stacked(targets[t])
        expected = defined(x, [1.0, 0.5, 2.0], part.view(x.shape))
        torch.testing.assert_close(spelt_out(merged[f"layers.{t}.q"])[0], expected, rtol=1e-5, atol=1e-6)


@few
@given(st.integers(2, 40), st.integers(0, 99), st.sampled_from([0.0, 1.0, 30.0]))
def test_two_vectors_are_interpolated_as_mergekit_does(size, seed, common):
    a, b = (torch.randn(size, generator=torch.Generator().manual_seed(2 * seed + i)).double() + common for i in range(2))
    first, second = slerp_coefficients(torch.stack([a, b]) @ torch.stack([a, b]).T)
    expected = mergekit_slerp(torch.tensor([0.5], dtype=torch.float64), b[None], a[None])[0]
    torch.testing.assert_close(first * a + second * b, expected, rtol=1e-6, atol=1e-7)


def test_unit_vectors_stay_on_the_sphere_and_opposite_ones_cancel():
    first, second = slerp_coefficients(torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    assert first == second == pytest.approx(math.sqrt(0.5))
    assert slerp_coefficients(torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)) == [0.5, 0.5]
    assert slerp_coefficients(torch.zeros(3, 3, dtype=torch.float64)) == pytest.approx([1 / 3] * 3)


def test_cores_are_kept_to_the_bit_and_the_base_is_the_last():
    first, base = full_deltas(2)
    core = largest(stacked([first])[0], 0.1, "size") != 0
    own = (largest(stacked([base])[0], 0.1, "size") != 0) & ~core
    merged = cpi([first, base], [1.0, 1.0], density=0.1).to_dense()
    assert torch.equal(merged[core], first.to_dense()[core])
    assert torch.equal(merged[own], base.to_dense()[own])
    assert not torch.equal(merged, cpi([base, first], [1.0, 1.0], density=0.1).to_dense())


def test_a_random_core_has_the_size_of_the_largest_and_follows_the_seed():
    deltas = [normal(random_delta((10, 20), 1, 0.5, seed), seed) for seed in range(2)]
    results = [cpi(deltas, [1.0, 1.0], density=0.1, core="random", seed=seed).to_dense() for seed in (1, 1, 2)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    kept = (results[0] == deltas[0].to_dense()) & (results[0] != 0)
    assert int(kept.sum()) == 20


@pytest.mark.parametrize(
    ("parameters", "error"),
    [({"density": 0.0}, DensityOutOfRange), ({"core": "small"}, ArgumentError), ({"seed": -1}, ArgumentError)],
)
def test_parameters_out_of_range_are_refused(parameters, error):
    with pytest.raises(error, match=next(iter(parameters))):
        cpi([SparseDelta.empty((2, 2))], [1.0], **parameters)
