"""Parts of a change by magnitude or chance: what `graft` puts into the base model to see which part is enough."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.masks import blocks_to_keep, check_density, top_k

OUTLIER_FRACTION = 0.001  # of the entries, which `top_without_largest` leaves out


def graft(delta: SparseDelta, part: str, fraction: float, generator: torch.Generator) -> SparseDelta:
    """One part of a change, by entries: k = max(1, round(fraction · n)) of the n in its mask.

    Of a change that is dense n is the target's size; of a sparse expert, whose mask is imposed, the parts are of that mask.

    part: a name of PARTS. generator: for the random ones. Raises KeyError for another name, DensityOutOfRange.
    """
    entries = delta.expand()
    if not entries.nnz:
        check_density(fraction)
        return entries
    count = blocks_to_keep(check_density(fraction), entries.nnz)
    return PARTS[part](entries, count, generator)


def _top(delta: SparseDelta, count: int, generator: torch.Generator) -> SparseDelta:
    """The k largest by |Δ|."""
    return _at(delta, top_k(delta.values.abs(), count))


def _bottom(delta: SparseDelta, count: int, generator: torch.Generator) -> SparseDelta:
    """The k smallest by |Δ| of those in the mask."""
    return _at(delta, top_k(-delta.values.abs(), count))


def _random(delta: SparseDelta, count: int, generator: torch.Generator) -> SparseDelta:
    """k at random."""
    return _at(delta, torch.randperm(delta.nnz, generator=generator)[:count].sort().values)


def _rescaled(delta: SparseDelta, count: int, generator: torch.Generator) -> SparseDelta:
    """k at random, times n/k, so that the expected change is the whole one (as DARE, Yu et al. 2024)."""
    return _random(delta, count, generator).scale(delta.nnz / count)


def _without_largest(delta: SparseDelta, count: int, generator: torch.Generator) -> SparseDelta:
    """The k largest that come after the largest 0.1 % of the entries."""
    largest = blocks_to_keep(OUTLIER_FRACTION, delta.nnz)
    inside = top_k(delta.values.abs(), min(delta.nnz, count + largest))
    first = top_k(delta.values.abs(), largest)
    return _at(delta, inside[~torch.isin(inside, first)])


def _complement(delta: SparseDelta, count: int, generator: torch.Generator) -> SparseDelta:
    """All but the k largest."""
    kept = torch.ones(delta.nnz, dtype=torch.bool)
    kept[top_k(delta.values.abs(), count).long()] = False
    return _at(delta, kept.nonzero().squeeze(1))


def _at(delta: SparseDelta, positions: Tensor) -> SparseDelta:
    positions = positions.long()
    return SparseDelta(delta.shape, delta.indices[positions], delta.values[positions])


PARTS: dict[str, Callable[[SparseDelta, int, torch.Generator], SparseDelta]] = {
    "top": _top,
    "random": _random,
    "random_rescaled": _rescaled,
    "bottom": _bottom,
    "top_without_largest": _without_largest,
    "complement": _complement,
}
