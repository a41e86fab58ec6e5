"""Statistics of hidden states by their definitions, and Spearman's ρ by scipy's."""

import numpy as np
import pytest
import torch
from helpers.strategies import few
from hypothesis import given
from hypothesis import strategies as st

from sparselet.activations.correlation import spearman, spearman_within
from sparselet.activations.statistics import gaussian_sparsity, outlier_channels, sparsity, without_channels


def test_each_statistic_is_its_definition():
    states = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).double()
    result = sparsity(states)
    for i, h in enumerate(states):
        p = (h**2 / (h**2).sum()).sort(descending=True).values
        size = h.abs().sort().values
        pairs = (size[:, None] - size[None, :]).abs().sum() / (2 * 40 * 40 * size.mean())
        assert result.gini[i] == pytest.approx(float(pairs))
        assert result.hoyer[i] == pytest.approx(float((40**0.5 - h.norm(1) / h.norm(2)) / (40**0.5 - 1)))
        assert (result.top5[i], result.top10[i]) == (pytest.approx(float(p[:2].sum())), pytest.approx(float(p[:4].sum())))
        assert result.effective_rank[i] == pytest.approx(float((-(p * p.log()).sum()).exp() / 40))
        assert result.channel[i] == pytest.approx(float(p[0]))
        assert result.above[i] == pytest.approx(float((h.abs() > h.abs().mean() + h.abs().std(correction=0)).double().mean()))


def test_a_gaussian_has_the_published_figures():
    null = gaussian_sparsity(2000)
    assert null["gini"] == pytest.approx(0.414, abs=2e-3)
    assert null["hoyer"] == pytest.approx(0.202, abs=5e-3)
    assert null["top10"] == pytest.approx(0.439, abs=5e-3)
    assert null["kurtosis"] == pytest.approx(3.0, abs=0.02)


def test_one_large_channel_is_found_and_can_be_left_out():
    states = torch.randn(50, 200, generator=torch.Generator().manual_seed(2))
    plain = sparsity(states).means()
    states[:, 17] = 40.0
    assert outlier_channels(states).tolist()[0] == 17 or 17 in outlier_channels(states).tolist()
    assert sparsity(states).means()["channel"] > 0.8
    rest = without_channels(states, outlier_channels(states))
    assert rest.shape == (50, 198)
    assert sparsity(rest).means()["gini"] == pytest.approx(plain["gini"], abs=0.01)


def test_the_scale_of_a_state_changes_nothing():
    states = torch.randn(4, 30, generator=torch.Generator().manual_seed(3))
    assert sparsity(states).means() == pytest.approx(sparsity(states * -7.5).means())


@given(st.integers(0, 2**16), st.integers(-6, 6), st.integers(2, 40))
@few
def test_order_signs_and_scale_of_the_channels_change_nothing(seed, power, width):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(3, width, generator=generator)
    signs = torch.randint(2, (width,), generator=generator) * 2 - 1
    other = (states * signs)[:, torch.randperm(width, generator=generator)] * 2.0**power
    first, second = sparsity(states).means(), sparsity(other).means()
    for name in first.keys() - {"kurtosis"}:  # which is about the mean, and so sees signs
        assert first[name] == pytest.approx(second[name], abs=1e-9)
    assert sparsity(-states).means()["kurtosis"] == pytest.approx(first["kurtosis"])


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_scipys(ties):
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    x, noise = random.normal(size=60), random.normal(size=60)
    y = x + noise
    if ties:
        x, y = np.round(x), np.round(y)
    result = spearman(x, y)
    assert result.rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert result.low < result.rho < result.high
    assert result == spearman(x, y)


def test_groups_that_differ_in_both_do_not_count_within():
    random = np.random.default_rng(1)
    groups = ["a"] * 100 + ["b"] * 100
    shift = np.array([0.0] * 100 + [5.0] * 100)
    x, y = random.normal(size=200) + shift, random.normal(size=200) + shift
    assert spearman(x, y).low > 0.5
    within = spearman_within(x, y, groups)
    assert within.low < 0 < within.high
    assert (within.count, spearman_within([1.0], [1.0], ["a"]).count) == (200, 0)
