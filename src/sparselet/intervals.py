"""Means with bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MEAN_DRAWS = 2000


@dataclass(frozen=True)
class MeanInterval:
    """The mean of `count` numbers and the ends of its 95 % interval, NaN of no numbers."""

    mean: float
    low: float
    high: float
    count: int


def mean_interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> MeanInterval:
    """The percentile bootstrap over the numbers, 2,000 times with replacement (Efron & Tibshirani 1993, §13). The interval of a
    paired comparison is that of the differences."""
    numbers = np.asarray(values, np.float64)
    if not len(numbers):
        return MeanInterval(np.nan, np.nan, np.nan, 0)
    drawn = np.random.default_rng(seed).integers(len(numbers), size=(MEAN_DRAWS, len(numbers)))
    low, high = np.quantile(numbers[drawn].mean(axis=1), (0.025, 0.975))
    return MeanInterval(float(numbers.mean()), float(low), float(high), len(numbers))
