"""Dense matrices and singular vectors of deltas, for the methods that are defined on whole matrices.

Singular values below the rounding of float32 count as 0, and their vectors, which are arbitrary, are left out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.kernels import selected
from sparselet.merging.algebra.entries import common_blocks

_SKETCHES = 64, 256  # columns that a matrix of low rank is looked for with
_SKETCH_SHARE = 4  # a matrix has at least so many times as many singular values

Factors = tuple[Tensor, Tensor, Tensor]  # U [m, k], S [k] descending, V [n, k]


def task_vector(delta: SparseDelta, weight: float = 1.0) -> Tensor:
    """w·ΔW, dense float64 [rows, columns]."""
    return delta.to_dense(torch.float32).double() * weight


def svd(matrix: Tensor, count: int | None = None) -> Factors:
    """U, S and V of a matrix = U·diag(S)·Vᵀ, without the singular values that are 0; the largest `count` of them.

    S² and the vectors of the shorter side are the eigenpairs of its Gram matrix, whose rounding, 1e-8 of the largest singular
    value, is far below what counts as 0. Of a matrix of low rank, such as a LoRA's change, they are those of its part in the
    space of its columns.
    """
    basis, inside = _column_space(matrix)
    wide = inside if inside.shape[0] <= inside.shape[1] else inside.T
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    values = squares.flip(0).clamp_min(0).sqrt()
    kept = min(int((values > _rounding(matrix, values[0])).sum()), len(values) if count is None else count)
    values, own = values[:kept], vectors.flip(1)[:, :kept]
    other = wide.T @ own / values
    left, right = (own, other) if wide is inside else (other, own)
    return left if basis is None else basis @ left, values, right


def _column_space(matrix: Tensor) -> tuple[Tensor | None, Tensor]:
    """An orthonormal basis Q of a matrix's columns, up to a fraction of what counts as 0, and Qᵀ·matrix.

    None and the matrix itself where it takes many columns. The basis of matrix·Ω, Ω random (Halko et al. 2011), is one if as
    good as nothing is left outside it.
    """
    generator = torch.Generator().manual_seed(0)
    for columns in _SKETCHES:
        if min(matrix.shape) < _SKETCH_SHARE * columns:
            break
        sketch = torch.randn(matrix.shape[1], columns, dtype=matrix.dtype, generator=generator)
        basis = torch.linalg.qr(matrix @ sketch).Q
        inside = basis.T @ matrix
        largest = inside.norm() / columns**0.5  # at most the largest singular value
        if (matrix - basis @ inside).norm() < _rounding(matrix, largest) / 16:
            return basis, inside
    return None, matrix


def _rounding(matrix: Tensor, largest: Tensor) -> Tensor:
    """What is left of 0 by the rounding of float32, where the largest singular value is that."""
    return largest * max(matrix.shape) * torch.finfo(torch.float32).eps


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
