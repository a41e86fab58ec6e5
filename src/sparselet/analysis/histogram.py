"""Magnitudes counted in bins of 0.4 %: what statistics of concentration are computed from, one target in memory at a time."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# A float32 without its sign, cut to 8 bits of exponent and 8 of fraction: a bin is at most 2⁻⁸ of its lower edge wide.
SHIFT = 15
BINS = 2 ** (31 - SHIFT)
COUNTED_TOGETHER = 2**18  # numbers


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts, Σ|x| and Σx² of numbers by magnitude; bins ascend, and bin 0 holds the zeros.

    counts: int64 [BINS]. sums, energies: float64 [BINS]. Statistics take the numbers of one bin as equal, which changes them by
    less than 1 part in 10⁵, since sums and energies are exact.
    """

    counts: np.ndarray
    sums: np.ndarray
    energies: np.ndarray

    @classmethod
    def empty(cls) -> "Histogram":
        """Of no numbers."""
        return cls(np.zeros(BINS, np.int64), np.zeros(BINS), np.zeros(BINS))

    @classmethod
    def of(cls, values: Tensor, zeros: int = 0) -> "Histogram":
        """Of `values`, any shape, and of `zeros` numbers that are 0 beside them."""
        counts, sums, energies = np.zeros(BINS, np.int64), np.zeros(BINS), np.zeros(BINS)
        for band in values.detach().reshape(-1).split(COUNTED_TOGETHER):
            magnitudes = band.to(torch.float32).abs().contiguous().cpu()
            bins = (magnitudes.view(torch.int32) >> SHIFT).numpy()
            numbers = magnitudes.numpy().astype(np.float64)
            counts += np.bincount(bins, minlength=BINS)
            sums += np.bincount(bins, weights=numbers, minlength=BINS)
            energies += np.bincount(bins, weights=numbers * numbers, minlength=BINS)
        counts[0] += zeros
        return cls(counts, sums, energies)

    def __add__(self, other: "Histogram") -> "Histogram":
        return Histogram(self.counts + other.counts, self.sums + other.sums, self.energies + other.energies)

    def without_zeros(self, count: int) -> "Histogram":
        """With so many zeros fewer."""
        counts = self.counts.copy()
        counts[0] -= count
        return Histogram(counts, self.sums, self.energies)

    @property
    def count(self) -> int:
        """How many numbers, zeros included."""
        return int(self.counts.sum())

    @property
    def energy(self) -> float:
        """Σx²."""
        return float(self.energies.sum())
