"""ACTMat: RegMean with each expert's own change in place of its inputs, so that no data are needed."""

from collections.abc import Sequence

import torch

from sparselet.delta import SparseDelta
from sparselet.merging.algebra.entries import common_blocks
from sparselet.merging.algebra.ranges import require_finite_number, require_flag
from sparselet.merging.algebra.spectral import on_union, task_vector
from sparselet.merging.method import MergeMethod

_CUTOFF = 1e-8  # of the largest eigenvalue: smaller ones count as 0


def actmat(
    deltas: Sequence[SparseDelta], weights: Sequence[float], *, scale: float = 1.0, transposed: bool = False
) -> SparseDelta:
    """ACTMat (COLM 2026): ΔW_m = λ · (Σ wᵢ·ΔWᵢ·Cᵢ)·(Σ Cᵢ)⁺, Cᵢ = ΔWᵢᵀ·ΔWᵢ in place of the inputs' second moment.

    Inputs that a layer was trained on lie in the span of its change's rows. ⁺ is the pseudo-inverse; eigenvalues below 1e-8 of
    the largest count as 0.

    scale: λ; sums of near orthogonal changes are too large with 1, choose it by validation (`search`).
    transposed: the targets are stored [in, out], as in GPT-2's `Conv1D`, so that columns are the outputs; a delta does not say.
    deltas: N of one target. weights: N. Computed in float64.
    Returns an element mask, the union: what the matrix has outside it is dropped; dense experts lose nothing.
    Raises ShapeMismatch, ArgumentError.
    """
    require_finite_number("scale", scale)
    require_flag("transposed", transposed)
    shape = common_blocks(deltas)[0].shape
    if len(deltas) == 1:  # itself, to the bit
        return on_union(task_vector(deltas[0], weights[0] * scale), deltas)
    left = torch.zeros(shape, dtype=torch.float64)
    left = left.T if transposed else left
    divisor = torch.zeros(left.shape[1], left.shape[1], dtype=torch.float64)
    for delta, weight in zip(deltas, weights, strict=True):
        change = task_vector(delta)
        change = change.T if transposed else change
        square = change.T @ change
        left += weight * change @ square
        divisor += square
    merged = scale * left @ torch.linalg.pinv(divisor, rtol=_CUTOFF, hermitian=True)
    return on_union(merged.T.contiguous() if transposed else merged, deltas)


ACTMAT = MergeMethod(
    "actmat",
    actmat,
    "λ · (Σ wᵢ·ΔWᵢ·Cᵢ)·(Σ Cᵢ)⁺, Cᵢ = ΔWᵢᵀ·ΔWᵢ",
    "ACTMat 2026",
    dense=True,
    tried=({}, {"scale": 0.5}),
)
