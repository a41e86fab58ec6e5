"""The bootstrap interval of a mean against the normal approximation, which it must meet for many numbers."""

import numpy as np
import pytest

from sparselet.intervals import mean_interval


def test_the_interval_of_many_numbers_is_the_normal_one():
    numbers = np.random.default_rng(1).exponential(size=500)
    result = mean_interval(numbers)
    half = 1.96 * numbers.std(ddof=1) / np.sqrt(500)
    assert (result.mean, result.count) == (pytest.approx(numbers.mean()), 500)
    assert (result.low, result.high) == (
        pytest.approx(numbers.mean() - half, abs=0.02),
        pytest.approx(numbers.mean() + half, abs=0.02),
    )
    assert result == mean_interval(numbers)


def test_equal_numbers_have_no_width_and_none_have_no_mean():
    assert vars(mean_interval([2.0, 2.0])) == {"mean": 2.0, "low": 2.0, "high": 2.0, "count": 2}
    assert np.isnan(mean_interval([]).mean)
