"""Rank correlation with an interval, pooled and within groups."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_DRAWS = 1000
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
    random = np.random.default_rng(seed)
    rho, draws = 0.0, np.zeros(BOOTSTRAP_DRAWS)
    for a, b in parts:
        share = len(a) / sizes.sum()
        counts = random.multinomial(len(a), np.full(len(a), 1 / len(a)), size=BOOTSTRAP_DRAWS)
        rho += share * float(_rho(a, b, np.ones((1, len(a)), np.int64))[0])
        draws += share * _rho(a, b, counts)
    low, high = np.quantile(draws, CONFIDENCE)
    return Correlation(rho, float(low), float(high), int(sizes.sum()))


def _rho(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the ranks in each of several samples, which take pair i counts[sample, i] times."""
    a, b = _centred_ranks(x, counts), _centred_ranks(y, counts)
    product, scale = (counts * a * b).sum(1), np.sqrt((counts * a * a).sum(1) * (counts * b * b).sum(1))
    return np.divide(product, scale, out=np.zeros(len(counts)), where=scale > 0)


def _centred_ranks(x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Ranks, ties at their mean, minus the mean rank: what lies before a number and half of what equals it."""
    order = np.argsort(x, kind="stable")
    ascending = x[order]
    until = np.concatenate([np.zeros((len(counts), 1)), np.cumsum(counts[:, order], axis=1)], axis=1)
    first, last = np.searchsorted(ascending, ascending), np.searchsorted(ascending, ascending, side="right")
    ranks = np.empty(counts.shape)
    ranks[:, order] = (until[:, first] + until[:, last]) / 2
    return ranks - counts.sum(1, keepdims=True) / 2
