"""Rank correlation with an interval, pooled and within groups."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_DRAWS = 2000
CONFIDENCE = (0.025, 0.975)


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ, the ends of its 95 % bootstrap interval, and how many pairs it is of."""

    rho: float
    low: float
    high: float
    count: int


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, seed: int = 0) -> Correlation:
    """Pearson's correlation of the ranks, ties at their mean rank (Spearman 1904); 0 where one side is constant.

    The interval is a percentile bootstrap over pairs. x, y: [n], n ≥ 3.
    """
    return _correlation([(np.asarray(x, np.float64), np.asarray(y, np.float64))], seed)


def spearman_within(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, groups: Sequence[str], seed: int = 0
) -> Correlation:
    """The mean of the groups' correlations, weighted by their sizes: what is left when groups differ in both x and y.

    The bootstrap draws pairs within each group. Groups with fewer than 3 pairs are left out.
    """
    a, b, names = np.asarray(x, np.float64), np.asarray(y, np.float64), np.asarray(groups)
    parts = [(a[names == name], b[names == name]) for name in dict.fromkeys(groups)]
    return _correlation([part for part in parts if len(part[0]) >= 3], seed)


def _correlation(parts: list[tuple[np.ndarray, np.ndarray]], seed: int) -> Correlation:
    sizes = np.array([len(a) for a, _ in parts], np.float64)
    if not len(sizes):
        return Correlation(0.0, 0.0, 0.0, 0)

    def of(samples: list[tuple[np.ndarray, np.ndarray]]) -> float:
        return float(np.average([_rho(a, b) for a, b in samples], weights=sizes))

    random = np.random.default_rng(seed)
    draws = []
    for _ in range(BOOTSTRAP_DRAWS):
        chosen = [random.integers(0, len(a), len(a)) for a, _ in parts]
        draws.append(of([(a[i], b[i]) for (a, b), i in zip(parts, chosen, strict=True)]))
    low, high = np.quantile(draws, CONFIDENCE)
    return Correlation(of(parts), float(low), float(high), int(sizes.sum()))


def _rho(x: np.ndarray, y: np.ndarray) -> float:
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale else 0.0


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties at their mean."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]
