"""Averages of deltas: over the masks that select an entry, or over all experts."""

from collections.abc import Sequence

from sparselet.delta import SparseDelta
from sparselet.kernels import selected
from sparselet.merging.algebra.entries import common_blocks, compact, mask_count, per_block, weighted_sum
from sparselet.merging.algebra.ranges import require_sum
from sparselet.merging.method import MergeMethod


def overlap(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> SparseDelta:
    """Overlap-aware average (paper, Eq. 4): ΔW_m = Σ wᵢ·ΔWᵢ / max(Σ Mᵢ, 1), entry by entry.

    Mᵢ is the mask, so an entry selected with value 0 counts. The paper prints min for max; its text and the division by
    zero that it guards against mean max. With all weights 1 this is the paper's; other weights scale the experts and do
    not change the count.

    deltas: N of one target, shape (rows, columns) each. weights: N. Sums are float32, in the order given.
    Returns a delta on the union of the masks, of blocks when all have the same. Raises ShapeMismatch.
    """
    deltas, positions = compact(common_blocks(deltas))
    total, count = weighted_sum(deltas, weights), mask_count(deltas)
    blocks = selected(count)
    values = total.index_select(0, blocks)
    values /= per_block(count.index_select(0, blocks), values)
    return positions.delta(blocks, values)


def uniform(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> SparseDelta:
    """Plain average (Wortsman et al. 2022): ΔW_m = Σ wᵢ·ΔWᵢ / Σ wᵢ, an entry that is not selected counting as 0.

    deltas: N of one target, shape (rows, columns) each. weights: N. Sums are float32, in the order given.
    Returns a delta on the union of the masks, of blocks when all have the same.
    Raises ShapeMismatch, ArgumentError if the weights sum to 0.
    """
    whole = require_sum("uniform", weights)
    deltas, positions = compact(common_blocks(deltas))
    total, blocks = weighted_sum(deltas, weights), selected(mask_count(deltas))
    return positions.delta(blocks, total.index_select(0, blocks) / whole)


OVERLAP = MergeMethod(
    "overlap",
    overlap,
    "Σ wᵢ·ΔWᵢ / max(Σ Mᵢ, 1), Mᵢ the masks",
    "Arnob et al. 2025, Eq. 4",
    elementwise=True,
    linear=True,
    tried=({},),
)

UNIFORM = MergeMethod("uniform", uniform, "Σ wᵢ·ΔWᵢ / Σ wᵢ", "Wortsman et al. 2022", elementwise=True, tried=({},))
