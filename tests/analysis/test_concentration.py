"""Statistics of concentration: closed forms on draws, and numbers spelt out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparselet.analysis.concentration import concentration, gaussian_null, gini, laplace_null
from sparselet.analysis.histogram import Histogram


def spelt_out(values):
    """The statistics by sorting all numbers."""
    x = np.sort(np.abs(np.asarray(values, np.float64)))[::-1]
    n, energy = len(x), np.cumsum(x * x) / (x * x).sum()
    ranks = np.arange(1, n + 1)
    return {
        "carrying": [float(np.searchsorted(energy, share) + 1) / n for share in (0.5, 0.9, 0.99)],
        "top": [energy[max(1, round(share * n)) - 1] for share in (0.001, 0.01, 0.1)],
        "gini": float((2 * (ranks * x[::-1]).sum() / x.sum() - (n + 1)) / n),
        "hoyer": (np.sqrt(n) - x.sum() / np.sqrt((x * x).sum())) / (np.sqrt(n) - 1),
    }


@pytest.mark.parametrize("draw", ["gaussian", "laplace", "sparse"])
def test_the_statistics_are_those_of_the_sorted_numbers(draw):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(200_000, generator=generator)
    if draw == "laplace":
        values = values.sign() * -torch.rand(200_000, generator=generator).log()
    if draw == "sparse":
        values *= torch.rand(200_000, generator=generator) < 0.1
    result, expected = concentration(Histogram.of(values)), spelt_out(values)
    assert list(result.carrying.values()) == pytest.approx(expected["carrying"], rel=2e-3)
    assert list(result.top.values()) == pytest.approx(expected["top"], rel=2e-3)
    assert result.gini == pytest.approx(expected["gini"], abs=1e-4)
    assert result.hoyer == pytest.approx(expected["hoyer"], abs=1e-6)
    assert result.zeros == pytest.approx(float((values == 0).float().mean()))


def test_the_nulls_are_their_published_figures():
    gaussian, laplace = gaussian_null(), laplace_null()
    assert [round(100 * share, 1) for share in gaussian.carrying.values()] == [12.4, 44.5, 73.5]
    assert [round(100 * share, 1) for share in laplace.carrying.values()] == [6.9, 33.2, 64.7]
    assert [round(100 * share, 1) for share in gaussian.top.values()] == [1.3, 8.4, 43.9]
    assert (round(gaussian.gini, 3), round(gaussian.hoyer, 3)) == (0.414, 0.202)


@pytest.mark.parametrize("null", ["gaussian", "laplace"])
def test_draws_show_their_null_within_sampling_error(null):
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(1_000_000, generator=generator)
    if null == "laplace":
        values = -torch.rand(1_000_000, generator=generator).log()
    result, expected = concentration(Histogram.of(values)), (gaussian_null() if null == "gaussian" else laplace_null())
    for share, fraction in expected.carrying.items():
        assert result.carrying[share] == pytest.approx(fraction, rel=0.01)
    for share, energy in expected.top.items():
        assert result.top[share] == pytest.approx(energy, rel=0.02)
    assert result.gini == pytest.approx(expected.gini, abs=1e-3)
    assert result.hoyer == pytest.approx(expected.hoyer, abs=1e-3)
    assert [y for _, y in result.lorenz] == pytest.approx([y for _, y in expected.lorenz], abs=5e-3)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=50), st.integers(-8, 8), st.randoms())
def test_scale_order_and_signs_change_nothing(numbers, power, random):
    values = torch.tensor(numbers, dtype=torch.float32)
    values[values.abs() < 1e-20] = 0  # their squares would underflow
    other = values[torch.tensor(random.sample(range(len(numbers)), len(numbers)))] * 2.0**power
    other *= torch.tensor([random.choice([-1, 1]) for _ in numbers])
    first, second = concentration(Histogram.of(values)), concentration(Histogram.of(other))
    assert first.gini == pytest.approx(second.gini, abs=1e-9)
    assert first.hoyer == pytest.approx(second.hoyer, abs=1e-9)
    assert list(first.carrying.values()) == pytest.approx(list(second.carrying.values()), abs=1e-9)


def test_histograms_of_parts_add_up_to_that_of_the_whole():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    parts = Histogram.of(values[:300], zeros=5) + Histogram.of(values[300:]) + Histogram.empty()
    whole = Histogram.of(torch.cat([values, torch.zeros(5)]))
    assert concentration(parts).carrying == pytest.approx(concentration(whole).carrying)
    assert parts.count == 1005


def test_a_change_of_nothing_is_spread_evenly():
    result = concentration(Histogram.of(torch.zeros(10)))
    assert (result.gini, result.hoyer, result.zeros) == (0.0, 0.0, 1.0)


def test_one_entry_of_many_has_everything():
    values = torch.zeros(10_000)
    values[7] = -2.0
    result = concentration(Histogram.of(values))
    assert result.hoyer == pytest.approx(1.0)
    assert result.carrying[0.99] <= 1e-4
    assert gini([0.0, 0.0, 0.0, 1.0]) == pytest.approx(0.75)
