"""TSV-Merge: the leading singular vectors of each expert, made orthogonal to those of the others."""

from collections.abc import Sequence

import torch

from sparselet.delta import SparseDelta
from sparselet.merging.algebra.entries import common_blocks
from sparselet.merging.algebra.ranges import require_finite_number
from sparselet.merging.algebra.spectral import nearest_orthonormal, on_union, svd, task_vector
from sparselet.merging.method import MergeMethod


def tsv(deltas: Sequence[SparseDelta], weights: Sequence[float], *, scale: float = 1.0) -> SparseDelta:
    """TSV-M (Gargiulo et al. 2025): ΔW_m = λ · U·S·Vᵀ, U, S, V those of all experts side by side, U and V made orthonormal.

    Of each wᵢ·ΔWᵢ the k = max(1, ⌊r/N⌋) largest of r singular values are kept. Concatenated vectors are replaced by the nearest
    orthonormal ones, P·Qᵀ of their own P·Σ·Qᵀ.

    scale: λ, 1 as published. deltas, weights, what is returned and raised: as `actmat`. Computed in float64.
    """
    require_finite_number("scale", scale)
    shape = common_blocks(deltas)[0].shape
    if len(deltas) == 1:  # itself, to the bit
        return on_union(task_vector(deltas[0], weights[0] * scale), deltas)
    kept = max(1, min(shape) // len(deltas))
    parts = []
    for delta, weight in zip(deltas, weights, strict=True):
        parts.append(svd(task_vector(delta, weight), kept))
    lefts, values, rights = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    return on_union(scale * (nearest_orthonormal(lefts) * values) @ nearest_orthonormal(rights).T, deltas)


TSV = MergeMethod(
    "tsv",
    tsv,
    "λ · U·S·Vᵀ of the experts' largest singular vectors, made orthonormal",
    "Gargiulo et al. 2025",
    dense=True,
    tried=({},),
)
