"""Isotropic merging: the sum of the task vectors with all singular values alike."""

from collections.abc import Sequence

import torch

from sparselet.delta import SparseDelta
from sparselet.merging.algebra.entries import common_blocks
from sparselet.merging.algebra.ranges import require_finite_number, require_fraction
from sparselet.merging.algebra.spectral import nearest_orthonormal, on_union, svd, task_vector
from sparselet.merging.method import MergeMethod


def iso_c(deltas: Sequence[SparseDelta], weights: Sequence[float], *, scale: float = 1.0) -> SparseDelta:
    """Iso-C (Marczak et al. 2025): ΔW_m = λ · σ̄ · U·Vᵀ of Σ wᵢ·ΔWᵢ = U·S·Vᵀ, σ̄ the mean of S.

    Directions whose singular value is 0 have no vectors, and count neither in the mean nor in U·Vᵀ; the authors' code gives
    them arbitrary ones. A single expert is levelled too, so it is not itself.

    scale: λ, chosen on validation data in the paper.
    deltas: N of one target. weights: N. Computed in float64.
    Returns an element mask, the union: what the matrix has outside it is dropped; dense experts lose nothing.
    Raises ShapeMismatch, ArgumentError.
    """
    require_finite_number("scale", scale)
    left, values, right = svd(_total(deltas, weights))
    merged = scale * (values.mean() if len(values) else 0.0) * left @ right.T
    return on_union(merged, deltas)


def iso_cts(deltas: Sequence[SparseDelta], weights: Sequence[float], *, common: float = 0.8, scale: float = 1.0) -> SparseDelta:
    """Iso-CTS (Marczak et al. 2025): `iso_c` on K common directions of the sum and (r − K)/N more of each expert.

    r singular values; K = r − N·round((r − ⌊f·r⌋)/N). U_c and V_c are the first K singular vectors of Σ wᵢ·ΔWᵢ; each expert
    adds the first of wᵢ·ΔWᵢ − U_c·U_cᵀ·wᵢ·ΔWᵢ. ΔW_m = λ · σ̄ · U·Vᵀ of all these left and right vectors, each set made
    orthonormal, σ̄ the mean of their singular values. With K = r it is `iso_c`.

    common: f, in (0, 1]. scale: λ.
    deltas, weights, what is returned and raised: as `iso_c`.
    """
    require_fraction("common", common)
    require_finite_number("scale", scale)
    total = _total(deltas, weights)
    size, count = min(total.shape), len(deltas)
    per_expert = round((size - int(common * size)) / count)
    parts = [svd(total, size - count * per_expert)]
    basis = parts[0][0]
    for delta, weight in zip(deltas, weights, strict=True) if per_expert else ():
        own = task_vector(delta, weight)
        parts.append(svd(own - basis @ (basis.T @ own), per_expert))
    lefts, spectrum, rights = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    level = spectrum.mean() if len(spectrum) else 0.0
    return on_union(scale * level * nearest_orthonormal(lefts) @ nearest_orthonormal(rights).T, deltas)


def _total(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> torch.Tensor:
    """Σ wᵢ·ΔWᵢ, dense float64."""
    total = torch.zeros(common_blocks(deltas)[0].shape, dtype=torch.float64)
    for delta, weight in zip(deltas, weights, strict=True):
        total += task_vector(delta, weight)
    return total


ISO_C = MergeMethod(
    "iso_c",
    iso_c,
    "λ · σ̄ · U·Vᵀ of Σ wᵢ·ΔWᵢ = U·S·Vᵀ, σ̄ the mean of S",
    "Marczak et al. 2025",
    dense=True,
    tried=({},),
    for_dense=True,
)

ISO_CTS = MergeMethod(
    "iso_cts", iso_cts, "as `iso_c`, on directions of the sum and of each expert", "Marczak et al. 2025", dense=True
)
