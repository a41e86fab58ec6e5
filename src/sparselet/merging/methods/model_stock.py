"""Model Stock: how far to go towards the mean, told by the angle between the experts."""

from collections.abc import Sequence

import torch

from sparselet.delta import SparseDelta
from sparselet.kernels import selected
from sparselet.merging.algebra.entries import common_blocks, compact, mask_count, weighted_sum
from sparselet.merging.algebra.gram import cosines, gram
from sparselet.merging.method import MergeMethod

_SINGULAR = 1e-6


def model_stock(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> SparseDelta:
    """Model Stock (Jang et al. 2024): ΔW_m = t · (1/N) Σ τᵢ,  t = N·cos θ / (1 + (N−1)·cos θ),  τᵢ = wᵢ·ΔWᵢ.

    cos θ is the mean cosine of all pairs of this target's deltas; a delta that is zero counts as at a right angle. The paper
    has no weights; with 1 each this is the paper's. For one expert t = 1. Where 1 + (N−1)·cos θ is 0, t has no value and
    nothing is changed. Opposing experts (cos θ < 0) give t < 0, as in the paper's formula. Experts whose masks do not meet
    are at right angles: t = 0. The method is made for experts of one task.

    deltas: N of one target. weights: N.
    Returns a delta on the union of the masks, of blocks when all have the same. Raises ShapeMismatch.
    """
    deltas = common_blocks(deltas)
    step = _step(deltas, weights)
    deltas, positions = compact(deltas)
    blocks = selected(mask_count(deltas))
    values = weighted_sum(deltas, [step * weight / len(deltas) for weight in weights]).index_select(0, blocks)
    return positions.delta(blocks, values)


def _step(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> float:
    """t, from the cosines of wᵢ·ΔWᵢ: those of ΔWᵢ with the weights' signs."""
    count = len(deltas)
    if count == 1:
        return 1.0
    signs = torch.tensor(list(weights), dtype=torch.float64).sign()
    cosine = cosines(gram(deltas)) * torch.outer(signs, signs)
    mean = float(cosine.triu(diagonal=1).sum()) / (count * (count - 1) / 2)
    divisor = 1 + (count - 1) * mean
    return count * mean / divisor if abs(divisor) > _SINGULAR else 0.0


MODEL_STOCK = MergeMethod(
    "model_stock", model_stock, "t · Σ wᵢ·ΔWᵢ / N, t from the mean angle between the experts", "Jang et al. 2024"
)
