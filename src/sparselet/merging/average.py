"""Averages of deltas: over the masks that select an entry, or over all experts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError, ShapeMismatch


def overlap(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> SparseDelta:
    """Overlap-aware average (paper, Eq. 4): ΔW_m = Σ wᵢ·ΔWᵢ / max(Σ Mᵢ, 1), entry by entry.

    Mᵢ is the mask, so an entry selected with value 0 counts. The paper prints min for max; its text and the division by
    zero that it guards against mean max. With all weights 1 this is the paper's; other weights scale the experts and do
    not change the count.

    deltas: N of one target, shape (rows, columns) each. weights: N. Sums are float32, in the order given.
    Returns a delta on the union of the masks, of tiles when all have the same. Raises ShapeMismatch.
    """
    deltas = common_units(deltas)
    total, count = weighted_sum(deltas, weights)
    units = count.nonzero().squeeze(1)
    divisor = count[units].reshape(-1, *(1 for _ in total.shape[1:]))
    return SparseDelta(deltas[0].shape, units, total[units] / divisor, deltas[0].block_size)


def uniform(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> SparseDelta:
    """Plain average (Wortsman et al. 2022): ΔW_m = Σ wᵢ·ΔWᵢ / Σ wᵢ, an entry that is not selected counting as 0.

    deltas: N of one target, shape (rows, columns) each. weights: N. Sums are float32, in the order given.
    Returns a delta on the union of the masks, of tiles when all have the same.
    Raises ShapeMismatch, ArgumentError if the weights sum to 0.
    """
    if sum(weights) == 0:
        raise ArgumentError("uniform divides by the sum of the weights, which is 0. Give other weights.")
    deltas = common_units(deltas)
    total, count = weighted_sum(deltas, weights)
    units = count.nonzero().squeeze(1)
    return SparseDelta(deltas[0].shape, units, total[units] / sum(weights), deltas[0].block_size)


def common_units(deltas: Sequence[SparseDelta]) -> list[SparseDelta]:
    """The deltas with one kind of mask: as they are if all have the same block size, else spelt out as entries.

    A delta without entries fits any kind. Raises ShapeMismatch.
    """
    shapes = {delta.shape for delta in deltas}
    if len(shapes) != 1:
        raise ShapeMismatch(f"deltas of one target have different shapes: {sorted(shapes)}.")
    blocks = {delta.block_size for delta in deltas if delta.nnz}
    if len(blocks) != 1:
        return [delta.expand() for delta in deltas]
    (block,) = blocks
    tile = (block, block) if block > 1 else ()
    return [
        d if d.block_size == block else SparseDelta(d.shape, d.indices, d.values.new_empty(0, *tile), block) for d in deltas
    ]


def weighted_sum(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Σ wᵢ·ΔWᵢ and Σ Mᵢ over all units of the target, float32 [units] or [units, B, B], and [units].

    deltas: on common units. Added in the order given.
    """
    total = torch.zeros(deltas[0].units, *deltas[0].values.shape[1:])
    count = torch.zeros(deltas[0].units)
    for delta, weight in zip(deltas, weights, strict=True):
        total.index_add_(0, delta.indices, delta.values.float(), alpha=weight)
        count.index_add_(0, delta.indices, torch.ones(len(delta.indices)))
    return total, count
