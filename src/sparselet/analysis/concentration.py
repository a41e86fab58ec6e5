"""How far a change's energy Σx² concentrates in few entries, beside what a Gaussian or a Laplace draw of any size would show.

All statistics are of magnitudes; they do not change with scale, order or sign. N counts all entries, zeros included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp, sqrt
from statistics import NormalDist

import numpy as np

from sparselet.analysis.histogram import Histogram

CARRIED = (0.5, 0.9, 0.99)  # fractions of the energy
TOP = (0.001, 0.01, 0.1)  # fractions of the entries
POINTS = 65  # of a Lorenz curve


@dataclass(frozen=True)
class Concentration:
    """Statistics of N numbers x, sorted by magnitude.

    entries: N. energy: Σx². carrying: for each fraction of the energy, the smallest fraction of the entries that carries it.
    top: for each fraction of the entries, the fraction of the energy in the largest of them. gini: of |x|,
    1 − Σ nₖ(Lₖ₋₁ + Lₖ)/N over the Lorenz curve L. hoyer: (√N − ‖x‖₁/‖x‖₂)/(√N − 1) (Hoyer 2004). zeros: fraction exactly 0.
    lorenz: at 65 points, [fraction of the largest entries, fraction of the energy].
    """

    entries: int
    energy: float
    carrying: dict[float, float]
    top: dict[float, float]
    gini: float
    hoyer: float
    zeros: float
    lorenz: list[tuple[float, float]] = field(repr=False)


def concentration(histogram: Histogram) -> Concentration:
    """The statistics of a histogram's numbers; of no energy at all, everything is spread evenly: gini 0, hoyer 0."""
    n, energy = histogram.count, histogram.energy
    counts, energies = histogram.counts[::-1], histogram.energies[::-1]  # the largest first
    filled = counts > 0
    entries = np.concatenate([[0.0], np.cumsum(counts[filled]) / max(1, n)])
    carried = np.concatenate([[0.0], np.cumsum(energies[filled]) / energy]) if energy else entries
    return Concentration(
        entries=n,
        energy=energy,
        carrying={share: float(np.interp(share, carried, entries)) for share in CARRIED},
        top={share: float(np.interp(share, entries, carried)) for share in TOP},
        gini=_gini(histogram.counts, histogram.sums),
        hoyer=_hoyer(n, float(histogram.sums.sum()), energy),
        zeros=float(histogram.counts[0] / max(1, n)),
        lorenz=[(float(x), float(np.interp(x, entries, carried))) for x in np.linspace(0, 1, POINTS)],
    )


def gini(values: Sequence[float] | np.ndarray) -> float:
    """The Gini coefficient of numbers ≥ 0: 0 where all are equal, near 1 where one has everything."""
    numbers = np.sort(np.asarray(values, np.float64))
    return _gini(np.ones(len(numbers)), numbers)


def _gini(counts: np.ndarray, sums: np.ndarray) -> float:
    """counts, sums: of groups that ascend in their mean."""
    total = sums.sum()
    if not total:
        return 0.0
    lorenz = np.concatenate([[0.0], np.cumsum(sums) / total])
    return float(1 - (counts / counts.sum() * (lorenz[:-1] + lorenz[1:])).sum())


def _hoyer(n: int, total: float, energy: float) -> float:
    return (sqrt(n) - total / sqrt(energy)) / (sqrt(n) - 1) if energy and n > 1 else 0.0


# What numbers drawn independently would show, whatever their scale.


@dataclass(frozen=True)
class Null:
    """The same statistics of infinitely many draws of one distribution."""

    carrying: dict[float, float]
    top: dict[float, float]
    gini: float
    hoyer: float
    lorenz: list[tuple[float, float]] = field(repr=False)


def gaussian_null() -> Null:
    """Of a Gaussian: the energy above t is 2(tφ(t) + Q(t)), of 2Q(t) of the entries; Gini √2 − 1, Hoyer 1 − √(2/π)."""
    normal = NormalDist()

    def energy_of(fraction: float) -> float:
        t = normal.inv_cdf(1 - fraction / 2)
        return 2 * t * normal.pdf(t) + fraction

    return _null(energy_of, sqrt(2) - 1, 1 - sqrt(2 / np.pi))


def laplace_null() -> Null:
    """Of a Laplace: the energy above t is e⁻ᵗ(t² + 2t + 2)/2, of e⁻ᵗ of the entries; Gini 1/2, Hoyer 1 − 1/√2."""

    def energy_of(fraction: float) -> float:
        t = -np.log(fraction)
        return exp(-t) * (t * t + 2 * t + 2) / 2

    return _null(energy_of, 0.5, 1 - 1 / sqrt(2))


def _null(energy_of: Callable[[float], float], gini: float, hoyer: float) -> Null:
    inside = [(float(x), energy_of(float(x))) for x in np.linspace(0, 1, POINTS)[1:-1]]
    lorenz = [(0.0, 0.0), *inside, (1.0, 1.0)]
    return Null(_inverted(energy_of), {p: energy_of(p) for p in TOP}, gini, hoyer, lorenz)


def _inverted(energy_of: Callable[[float], float]) -> dict[float, float]:
    """By bisection, the fraction of entries that carries each of CARRIED."""
    carrying = {}
    for share in CARRIED:
        low, high = 1e-12, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if energy_of(middle) >= share else (middle, high)
        carrying[share] = high
    return carrying
