"""Consensus merging: of the summed task vectors, the entries that several tasks want."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError
from sparselet.kernels import selected
from sparselet.merging.algebra.entries import common_blocks, compact
from sparselet.merging.algebra.ranges import require_finite_number
from sparselet.merging.algebra.sums import sum_in_double
from sparselet.merging.method import MergeMethod


def consensus(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    *,
    k: int = 2,
    mask_lambda: float | Sequence[float] = 0.4,
    scale: float = 1.0,
) -> SparseDelta:
    """Consensus merging (Wang et al. 2024): ΔW_m = λ · [Σ Mᵢ ≥ k] ⊙ τ_MTL,  τ_MTL = Σ τᵢ,  τᵢ = wᵢ·ΔWᵢ.

    Mᵢ is the task's TALL mask: |τᵢ| ≥ λᵢ·|τ_MTL − τᵢ|, and τᵢ is not 0. (The authors' code has > for ≥.) The paper has no
    weights.

    k: how many masks must select an entry; 2, as published, drops what no task or one task alone wants, 1 the former only.
    mask_lambda: λᵢ, of at least 0, one for all experts or one each. The paper chooses each by validation among 0.2, 0.3, …
        0.6 and publishes no default; this is the middle.
    scale: λ, chosen on validation data in the paper.
    deltas: N of one target. weights: N.
    Returns a delta on the entries kept. Raises ShapeMismatch, ArgumentError (a parameter out of range, k beyond the number of
    experts).
    """
    factors = _factors(deltas, k, mask_lambda, scale)
    deltas, positions = compact([delta.expand() for delta in common_blocks(deltas)])
    together = sum_in_double(deltas, weights)
    count = torch.zeros(len(together), dtype=torch.int32, device=together.device)
    for delta, weight, factor in zip(deltas, weights, factors, strict=True):
        count.index_add_(0, delta.indices, _tall(delta, weight, factor, together).int())
    blocks = selected(count >= k)
    return positions.delta(blocks, (together.index_select(0, blocks) * scale).float())


def consensus_experts(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    *,
    mask_lambda: float | Sequence[float] = 0.4,
    scale: float = 1.0,
) -> list[SparseDelta]:
    """TALL masks as compression (Wang et al. 2024): λ · Mᵢ ⊙ τ_MTL for each expert; parameters as of `consensus`.

    Returns a delta an expert, on the expert's own mask, with 0 where Mᵢ is 0. Raises ShapeMismatch, ArgumentError.
    """
    factors = _factors(deltas, 1, mask_lambda, scale)
    whole = common_blocks(deltas)
    deltas, _ = compact(whole)
    together = sum_in_double(deltas, weights)
    experts = []
    for own, delta, weight, factor in zip(whole, deltas, weights, factors, strict=True):
        values = together.index_select(0, delta.indices) * (_tall(delta, weight, factor, together) * scale)
        experts.append(SparseDelta(own.shape, own.indices, values.float()))
    return experts


def _tall(delta: SparseDelta, weight: float, factor: float, together: Tensor) -> Tensor:
    """Mᵢ at the expert's mask, bool [n] or [n, h, w]; elsewhere it is 0."""
    own = delta.values.float() * weight
    return (own.abs() >= factor * (together.index_select(0, delta.indices) - own).abs()) & (own != 0)


def _factors(deltas: Sequence[SparseDelta], k: int, mask_lambda: float | Sequence[float], scale: float) -> Sequence[float]:
    """λᵢ, one an expert. Raises ArgumentError for a parameter out of range."""
    require_finite_number("scale", scale)
    factors = mask_lambda if isinstance(mask_lambda, Sequence) else [mask_lambda] * len(deltas)
    for factor in factors:
        require_finite_number("mask_lambda", factor)
        if factor < 0:
            raise ArgumentError(f"mask_lambda must be at least 0, got {factor!r}.")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ArgumentError(f"k must be an integer of at least 1, got {k!r}.")
    if not any(delta.nnz for delta in deltas):
        return [0.0] * len(deltas)  # nothing to select; and so are parameters checked before the experts are known
    if k > len(deltas):
        number = "there is 1 expert" if len(deltas) == 1 else f"there are {len(deltas)} experts"
        raise ArgumentError(f"k is {k}, but {number} to select an entry. Give a smaller k.")
    if len(factors) != len(deltas):
        raise ArgumentError(f"{len(deltas)} experts need as many mask_lambda, or one for all; got {len(factors)}.")
    return factors


CONSENSUS = MergeMethod(
    "consensus",
    consensus,
    "λ · Σ wᵢ·ΔWᵢ where at least k experts' masks select it",
    "Wang et al. 2024",
    elementwise=True,
    per_expert=consensus_experts,
)
