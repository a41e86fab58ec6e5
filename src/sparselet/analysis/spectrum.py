"""The rank of a change: how many directions carry it, beside what independent entries of any one distribution would show."""

from dataclasses import dataclass
from math import exp, sqrt

import torch
from torch import Tensor

BAND_ENTRIES = 2**18  # of a target that are looked at together


@dataclass(frozen=True)
class Spectrum:
    """Of ΔW [rows, columns] with singular values σ.

    stable_rank: Σσ²/σ₁². effective_rank: exp(−Σ p ln p), p = σ²/Σσ² (Roy & Vetterli 2007, of energies). energies: σ², float32,
    descending.
    """

    stable_rank: float
    effective_rank: float
    energies: Tensor


def spectrum(change: Tensor) -> Spectrum:
    """By the eigenvalues of the smaller Gram matrix; ranks of a change that is 0 are 0. change: dense."""
    energies = torch.linalg.eigvalsh(gram(change)).flip(0).clamp_min_(0)
    total = energies.double().sum()
    if not total:
        return Spectrum(0.0, 0.0, energies)
    p = energies.double() / total
    return Spectrum(float(total / energies[0]), float(torch.special.entr(p).sum().exp()), energies)


def random_ranks(rows: int, columns: int) -> tuple[float, float]:
    """Stable and effective rank of a large matrix of independent entries with mean 0 and one variance.

    With m ≤ n the two sides: σ₁² → (√m + √n)² of Σσ² = mn (Marchenko & Pastur 1967), and the effective
    rank → m·e^(−m/2n) (Page 1993).
    """
    m, n = sorted((rows, columns))
    return m * n / (sqrt(m) + sqrt(n)) ** 2, m * exp(-m / (2 * n))


def gram(change: Tensor) -> Tensor:
    """ΔW ΔWᵀ or ΔWᵀ ΔW, whichever is smaller, band by band. change: dense; products are in float32."""
    wide = change.shape[0] <= change.shape[1]
    side = min(change.shape)
    total = torch.zeros(side, side)
    for band in change.split(max(1, BAND_ENTRIES // side), dim=1 if wide else 0):
        part = band.float()
        total += part @ part.T if wide else part.T @ part
    return total
