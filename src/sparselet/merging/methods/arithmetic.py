"""Task arithmetic: the sum of the task vectors, and the largest of them, entry by entry."""

from collections.abc import Sequence

import torch

from sparselet.delta import SparseDelta
from sparselet.kernels import selected
from sparselet.merging.algebra.entries import common_blocks, compact, mask_count, weighted_sum
from sparselet.merging.algebra.ranges import require_finite_number
from sparselet.merging.method import MergeMethod


def arithmetic(deltas: Sequence[SparseDelta], weights: Sequence[float], *, scale: float = 1.0) -> SparseDelta:
    """Task arithmetic (Ilharco et al. 2023): ΔW_m = λ · Σ wᵢ·ΔWᵢ.

    scale: λ. The paper chooses it on validation data, between 0.3 and 0.5 for most of its sets of tasks, and publishes
        no default; with 1 a single expert is itself. `search` with lambda chooses it as the paper does.
    deltas: N of one target. weights: N; they are not divided by their sum. Sums are float32, in the order given.
    Returns a delta on the union of the masks, of blocks when all have the same. Raises ShapeMismatch, ArgumentError.
    """
    require_finite_number("scale", scale)
    deltas, positions = compact(common_blocks(deltas))
    total, blocks = weighted_sum(deltas, weights), selected(mask_count(deltas))
    return positions.delta(blocks, total.index_select(0, blocks) * scale)


def magmax(deltas: Sequence[SparseDelta], weights: Sequence[float], *, scale: float = 1.0) -> SparseDelta:
    """MagMax (Marczak et al. 2024): ΔW_m = λ · wᵢ·ΔWᵢ of the expert i with the largest |wᵢ·ΔWᵢ|, entry by entry.

    Of equal magnitudes with different signs the positive one is taken, so that the order of the experts does not matter.
    scale: λ, chosen on validation data in the paper (0.5 where there is none); with 1 a single expert is itself.
    deltas: N of one target. weights: N.
    Returns a delta on the union of the masks, of blocks when all have the same. Raises ShapeMismatch, ArgumentError.
    """
    require_finite_number("scale", scale)
    deltas, positions = compact(common_blocks(deltas))
    first = deltas[0].values
    largest, smallest = (torch.zeros(deltas[0].blocks, *first.shape[1:], device=first.device) for _ in range(2))
    for delta, weight in zip(deltas, weights, strict=True):
        values, at = delta.values.float() * weight, delta.indices.long()
        largest.index_copy_(0, at, torch.maximum(largest.index_select(0, at), values))
        smallest.index_copy_(0, at, torch.minimum(smallest.index_select(0, at), values))
    blocks = selected(mask_count(deltas))
    high, low = largest.index_select(0, blocks), smallest.index_select(0, blocks)
    return positions.delta(blocks, torch.where(high >= -low, high, low) * scale)


ARITHMETIC = MergeMethod(
    "arithmetic",
    arithmetic,
    "λ · Σ wᵢ·ΔWᵢ",
    "Ilharco et al. 2023",
    elementwise=True,
    linear=True,
    tried=({}, {"scale": 0.5}),
)

MAGMAX = MergeMethod("magmax", magmax, "λ · wᵢ·ΔWᵢ of the i with the largest |wᵢ·ΔWᵢ|", "Marczak et al. 2024", elementwise=True)
