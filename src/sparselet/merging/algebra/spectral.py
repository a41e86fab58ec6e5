"""Dense matrices and singular vectors of deltas, for the methods that are defined on whole matrices.

Singular values below the rounding of float32 count as 0, and their vectors, which are arbitrary, are left out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.kernels import selected
from sparselet.merging.algebra.entries import common_blocks

Factors = tuple[Tensor, Tensor, Tensor]  # U [m, k], S [k] descending, V [n, k]


def task_vector(delta: SparseDelta, weight: float = 1.0) -> Tensor:
    """w·ΔW, dense float64 [rows, columns]."""
    return delta.to_dense(torch.float32).double() * weight


def svd(matrix: Tensor) -> Factors:
    """U, S and V of a matrix = U·diag(S)·Vᵀ, without the singular values that are 0."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    limit = values.max() * max(matrix.shape) * torch.finfo(torch.float32).eps
    kept = int((values > limit).sum())
    return left[:, :kept], values[:kept], right[:kept].T


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """P·Qᵀ of P·Σ·Qᵀ: the matrix of orthonormal columns nearest to these columns, as far as their span reaches."""
    left, _, right = svd(matrix) if matrix.numel() else (matrix, None, matrix.new_zeros(matrix.shape[1], matrix.shape[1]))
    return left @ right.T


def on_union(dense: Tensor, deltas: Sequence[SparseDelta]) -> SparseDelta:
    """The entries of a matrix that any delta's mask selects, float32. Raises ShapeMismatch."""
    union = torch.zeros(deltas[0].size, dtype=torch.bool)
    for delta in common_blocks(deltas):
        union[delta.expand().indices.long()] = True
    chosen = selected(union)
    return SparseDelta(deltas[0].shape, chosen, dense.reshape(-1).index_select(0, chosen).float())
