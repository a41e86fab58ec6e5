"""RegMean: the merge whose outputs are, in the mean square, closest to each expert's outputs on that expert's own inputs."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError, MissingProfile
from sparselet.kernels import selected
from sparselet.merging.algebra.entries import common_blocks
from sparselet.merging.algebra.ranges import require_choice, require_finite_number, require_fraction, require_sum
from sparselet.merging.method import MergeMethod
from sparselet.profiles.profile import SecondMoment

_BATCH = 2**22  # entries of the systems that are solved together


def regmean(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    *,
    mask: str = "union",
    off_diagonal: float = 1.0,
    ridge: float = 1e-3,
    moments: Sequence[SecondMoment | None] | None = None,
) -> SparseDelta:
    """RegMean (Jin et al. 2023, Eq. 3): the minimum of Σ wᵢ·‖(M − ΔWᵢ)·Xᵢ‖², M = (Σ wᵢ·ΔWᵢ·Cᵢ)·(Σ wᵢ·Cᵢ)⁻¹, Cᵢ = XᵢXᵢᵀ/n.

    Each Cᵢ is divided by its trace, so that loud inputs do not outweigh others (the paper does not), and ridge/d of the unit
    matrix is added to it, in numerator and divisor: one expert stays itself, and where no expert has inputs M is the mean.

    mask: "union", each row of outputs is minimised over those of its entries that any mask selects, and is 0 elsewhere, so that
        the merge is sparse where the experts are; "full", over all entries of the rows in which a mask selects one (the paper).
    off_diagonal: the factor on entries of Cᵢ outside the diagonal, in [0, 1]; the paper takes 0.9 for most models, 1 here.
    ridge: at least 0; with 0 the moments must be invertible.
    moments: Cᵢ of each expert, None for one that lacks the target. Without any, Cᵢ is the unit matrix, and the merge `uniform`.
    deltas: N of one target, [out, in], or [in, out] where the moments are transposed. weights: N, not negative.
    Returns an element mask. Sums and solutions are float64; threads may change them in the last bits.
    Raises ShapeMismatch, ArgumentError (a parameter or weight out of range, no unique minimum), MissingProfile.
    """
    require_choice("mask", mask, ("union", "full"))
    require_fraction("off_diagonal", off_diagonal, allow_zero=True)
    require_finite_number("ridge", ridge)
    if ridge < 0:
        raise ArgumentError(f"ridge must be at least 0, got {ridge}.")
    if min(weights) < 0:
        raise ArgumentError(f"regmean takes no negative weights, got {min(weights):g}.")
    require_sum("regmean", weights)
    shape = common_blocks(deltas)[0].shape
    deltas = [delta.expand() for delta in deltas]
    terms = _terms(deltas, weights, moments)
    transposed = any(moment.transposed for _, _, moment in terms if moment is not None)
    union = torch.zeros(shape, dtype=torch.bool)
    for delta in deltas:
        union.view(-1)[delta.indices.long()] = True
    if len(terms) == 1:  # itself, to the bit
        chosen = selected(union.view(-1))
        return SparseDelta(shape, chosen, terms[0][0].to_dense(torch.float32).view(-1).index_select(0, chosen))
    rows = union.T if transposed else union
    if mask == "full":
        rows = rows.any(dim=1, keepdim=True).expand_as(rows)
    merged = torch.zeros(rows.shape, dtype=torch.float64)
    filled = selected(rows.any(dim=1))
    if len(filled):
        left, divisor = _sums(terms, filled, rows.shape[1], off_diagonal, ridge, transposed)
        merged[filled] = solve_on_masks(left, divisor, rows.index_select(0, filled))
    dense, chosen = (t.T.contiguous().view(-1) if transposed else t.reshape(-1) for t in (merged, rows))
    blocks = selected(chosen)
    return SparseDelta(shape, blocks, dense.index_select(0, blocks).float())


_Term = tuple[SparseDelta, float, SecondMoment | None]


def _terms(
    deltas: Sequence[SparseDelta], weights: Sequence[float], moments: Sequence[SecondMoment | None] | None
) -> list[_Term]:
    """The experts that count: those with a weight and, unless no expert has a moment, a moment of the target."""
    terms = [term for term in zip(deltas, weights, moments or [None] * len(deltas), strict=True) if term[1]]
    if all(moment is None for _, _, moment in terms):
        return terms
    for number, (delta, _, moment) in enumerate(terms, 1):
        if moment is None and delta.values.count_nonzero():
            raise MissingProfile(
                f"the profile of expert {number} has no inputs of a target that it changes; make it again: sparselet profile."
            )
    return [term for term in terms if term[2] is not None]


def _sums(
    terms: Sequence[_Term], rows: Tensor, width: int, off_diagonal: float, ridge: float, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Σ wᵢ·ΔWᵢ·Cᵢ at the chosen rows of outputs [rows, width], and Σ wᵢ·Cᵢ [width, width], float64."""
    left = torch.zeros(len(rows), width, dtype=torch.float64)
    divisor = torch.zeros(width, width, dtype=torch.float64)
    for delta, weight, moment in terms:
        change = delta.to_dense(torch.float32)
        change = (change.T if transposed else change).index_select(0, rows).double()
        if moment is None:
            left += weight * change
            divisor.diagonal().add_(weight)
            continue
        share, factor = weight / moment.trace, moment.factor.double()
        squares = factor.square().sum(dim=0)
        diagonal = share * (moment.diagonal.double() + (1 - off_diagonal) * squares) + weight * ridge / width
        left += change * diagonal + share * off_diagonal * (change @ factor.T) @ factor
        divisor.addmm_(factor.T, factor, alpha=share * off_diagonal)
        divisor.diagonal().add_(diagonal)
    return left, divisor


def solve_on_masks(left: Tensor, matrix: Tensor, mask: Tensor) -> Tensor:
    """For each row i the x with x = 0 outside S = mask[i] and (x·A − left[i])[S] = 0; float64 [rows, d].

    left: [rows, d]. matrix: A, symmetric and positive definite [d, d]. mask: bool [rows, d].
    Of a row that selects at most half of the entries the system A[S, S] is solved; of others x is the solution without a mask,
    y = left·A⁻¹, less what brings the entries of the complement T to 0: x = y − y[T]·(A⁻¹[T, T])⁻¹·A⁻¹[T, :]. Rows without a
    complement share one factorisation. Raises ArgumentError if A is singular.
    """
    half, counts = matrix.shape[0] // 2, mask.sum(dim=1)
    solution = torch.zeros_like(left)
    few, many = selected(counts <= half), selected(counts > half)
    for at, columns, valid in _batches(mask, few):
        right = left.index_select(0, at).gather(1, columns) * valid
        solution[at] = solution[at].scatter_add_(1, columns, _solve(matrix, columns, valid, right))
    if len(many):
        inverse = torch.cholesky_inverse(_cholesky(matrix))
        full = left.index_select(0, many) @ inverse
        solution[many] = full
        outside = torch.zeros_like(mask)
        outside[many] = ~mask[many]
        for at, columns, valid in _batches(outside, many[counts[many] < matrix.shape[0]]):
            surplus = solution.index_select(0, at).gather(1, columns) * valid
            multipliers = torch.zeros(len(at), matrix.shape[0], dtype=torch.float64)
            multipliers.scatter_add_(1, columns, _solve(inverse, columns, valid, surplus))
            solution[at] -= multipliers @ inverse
        solution.masked_fill_(~mask, 0)
    return solution


def _batches(mask: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some of the rows at a time: the rows [b], the columns that they select [b, s], which of these are no padding."""
    counts = mask.sum(dim=1)
    order = rows[counts[rows].argsort(stable=True)]
    while len(order):
        size = 1
        while size < len(order) and (size + 1) * int(counts[order[size]]) ** 2 <= _BATCH:
            size += 1
        at, order = order[:size], order[size:]
        longest = int(counts[at[-1]])
        columns = mask[at].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :longest]
        yield at, columns, torch.arange(longest) < counts[at][:, None]


def _solve(matrix: Tensor, columns: Tensor, valid: Tensor, right: Tensor) -> Tensor:
    """matrix[columns, columns]⁻¹ · right, a system a row, 0 at padding; float64 [b, s]."""
    systems = matrix[columns[:, :, None], columns[:, None, :]] * (valid[:, :, None] & valid[:, None, :])
    systems.diagonal(dim1=1, dim2=2).add_((~valid).double())
    return torch.cholesky_solve(right[:, :, None], _cholesky(systems)).squeeze(2)


def _cholesky(matrix: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        raise ArgumentError("ridge must be larger: the sum of the moments is singular, so there is no unique minimum.")
    return factor


REGMEAN = MergeMethod(
    "regmean",
    regmean,
    "(Σ wᵢ·ΔWᵢ·Cᵢ)·(Σ wᵢ·Cᵢ)⁻¹ on the union of the masks, Cᵢ = XᵢXᵢᵀ of the expert's own inputs",
    "Jin et al. 2023",
    needs_profiles=True,
    dense=True,
    tried=({}, {"mask": "full"}),
)
