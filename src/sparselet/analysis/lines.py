"""How a change's energy lies over the rows, columns and attention heads of a target, beside its entries in random order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparselet.analysis.concentration import gini

PERMUTED = 2**18  # entries; of a larger target the random order is that of a sample of them


@dataclass(frozen=True)
class Lines:
    """Gini coefficients of the energies of rows, columns and heads, and what they are when the entries are permuted.

    head_shares: each head's fraction of the target's energy. heads, shuffled_heads: None where the target has no heads.
    """

    rows: float
    columns: float
    shuffled_rows: float
    shuffled_columns: float
    heads: float | None = None
    shuffled_heads: float | None = None
    head_shares: tuple[float, ...] = ()


def lines(change: Tensor, generator: torch.Generator, heads: tuple[int, int] | None = None) -> Lines:
    """change: dense. heads: the axis that heads lie on (0 rows, 1 columns), and how many lines of it each has.

    The null is one random permutation of all entries, which keeps their magnitudes; of more than 2¹⁸ entries it is a sample of
    them, drawn with replacement, in as many whole rows and columns as it fills.
    """
    rows, columns = change.shape
    by_line = [_energies(change, 1), _energies(change, 0)]
    if change.numel() <= PERMUTED:
        order = torch.randperm(change.numel(), generator=generator)
    else:
        order = torch.randint(change.numel(), (PERMUTED,), generator=generator)
    drawn = change.reshape(-1)[order].float().square()
    shuffled = [_folded(drawn, columns, rows), _folded(drawn, rows, columns)]
    by_row, by_column, by_random_row, by_random_column = (gini(energies.numpy()) for energies in (*by_line, *shuffled))
    numbers = (by_row, by_column, by_random_row, by_random_column)
    if heads is None:
        return Lines(*numbers)
    axis, size = heads
    own, random = (_folded(energies[axis], size, len(by_line[axis]) // size) for energies in (by_line, shuffled))
    shares = own / own.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return Lines(*numbers, gini(own.numpy()), gini(random.numpy()), tuple(shares.tolist()))


def _energies(change: Tensor, axis: int) -> Tensor:
    """Σ over `axis` of the squares, without a copy of the change; summed in float32, to about 5 digits."""
    return torch.linalg.vector_norm(change, dim=axis, dtype=torch.float32).double().square()


def _folded(energies: Tensor, size: int, most: int) -> Tensor:
    """Sums of `size` numbers at a time, of at most `most` groups."""
    count = min(most, len(energies) // size)
    return energies[: count * size].view(count, size).sum(1, dtype=torch.float64)
