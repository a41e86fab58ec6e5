"""The rank of a change: how many directions carry it, and how its energy lies over rows and columns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparselet.analysis.concentration import gini


@dataclass(frozen=True)
class Spectrum:
    """Of ΔW [rows, columns] with singular values σ.

    stable_rank: Σσ²/σ₁². effective_rank: exp(−Σ p ln p), p = σ²/Σσ² (Roy & Vetterli 2007, of energies). energies: σ²,
    descending.
    """

    stable_rank: float
    effective_rank: float
    energies: Tensor


def spectrum(change: Tensor) -> Spectrum:
    """By the eigenvalues of the smaller Gram matrix, in float64; ranks of a change that is 0 are 0. change: dense."""
    matrix = change.double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    energies = torch.linalg.eigvalsh(gram).flip(0).clamp_min_(0)
    total = energies.sum()
    if not total:
        return Spectrum(0.0, 0.0, energies)
    p = energies / total
    return Spectrum(float(total / energies[0]), float(torch.special.entr(p).sum().exp()), energies)


@dataclass(frozen=True)
class Lines:
    """Gini coefficients of the energies of rows and of columns, and what they are when the entries are shuffled."""

    rows: float
    columns: float
    shuffled_rows: float
    shuffled_columns: float


def lines(change: Tensor, generator: torch.Generator) -> Lines:
    """change: dense. The shuffle is one random permutation of all entries, which keeps their magnitudes."""
    energies = change.float().square()
    shuffled = energies.reshape(-1)[torch.randperm(energies.numel(), generator=generator)].view_as(energies)
    return Lines(*(gini(matrix.sum(axis).numpy()) for matrix in (energies, shuffled) for axis in (1, 0)))
