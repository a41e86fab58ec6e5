"""EMR-Merging: one unified delta, and for each expert a mask and a factor that bring it back near the expert's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.kernels import selected
from sparselet.merging.algebra.entries import common_blocks, compact, mask_count
from sparselet.merging.algebra.sums import fixed_order_sum, sum_in_double
from sparselet.merging.method import AllTargets, MergeMethod


def emr(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> SparseDelta:
    """Elect of EMR-Merging (Huang et al. 2024): the unified delta τ_uni = sign(Σ τᵢ) ⊙ ε, τᵢ = wᵢ·ΔWᵢ.

    ε is the largest |τᵢ| among the experts that have the elected sign. The paper has no weights, and never uses τ_uni by
    itself: as one merged model it is given unscaled; the rescalers belong to single experts (`emr_experts`).
    A sum of 0 elects no sign, and the entry is 0; the authors' code takes minus there.

    deltas: N of one target. weights: N.
    Returns a delta on the union of the masks, of blocks when all have the same. Raises ShapeMismatch.
    """
    deltas, positions = compact(common_blocks(deltas))
    blocks = selected(mask_count(deltas))
    return positions.delta(blocks, _unified(deltas, weights).index_select(0, blocks))


def emr_experts(
    deltas: Sequence[SparseDelta], weights: Sequence[float], *, stats: Sequence[float] | None = None
) -> list[SparseDelta]:
    """Mask and rescale of EMR-Merging: λᵢ · Mᵢ ⊙ τ_uni for each expert, Mᵢ = [τᵢ ⊙ τ_uni > 0].

    stats: λᵢ = Σ|τᵢ| / Σ|Mᵢ ⊙ τ_uni|, 0 for an expert whose mask is empty, with sums over the whole model as in the paper
        (`emr_rescalers`); by default over these deltas. (The authors' code adds up the parameters' means, so that a small
        parameter weighs as much as a large one.)
    Returns a delta an expert, on the expert's own mask, with 0 where Mᵢ is 0. Raises ShapeMismatch.
    """
    whole = common_blocks(deltas)
    deltas, _ = compact(whole)
    unified = _unified(deltas, weights)
    if stats is None:
        stats = [_rescaler(*_magnitudes(*pair, unified)) for pair in zip(deltas, weights, strict=True)]
    return [
        SparseDelta(own.shape, own.indices, _masked(delta, weight, unified) * rescaler)
        for own, delta, weight, rescaler in zip(whole, deltas, weights, stats, strict=True)
    ]


def emr_rescalers(targets: AllTargets, parameters: Mapping[str, Any]) -> list[float]:
    """The rescalers of `emr_experts` over all targets."""
    sums = torch.zeros(1, 2, dtype=torch.float64)
    for deltas, weights in targets():
        deltas, _ = compact(common_blocks(deltas))
        unified = _unified(deltas, weights)
        sums = sums + torch.tensor([_magnitudes(*pair, unified) for pair in zip(deltas, weights, strict=True)])
    return [_rescaler(*both) for both in sums.tolist()]


def _unified(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> Tensor:
    """τ_uni over all blocks, float32 [blocks] or [blocks, h, w]. deltas: on common blocks."""
    sign = sum_in_double(deltas, weights).sign_().float()
    largest = torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        at = delta.indices.long()
        along = delta.values.float() * weight * sign.index_select(0, at)  # |τᵢ| where the sign is the elected one
        largest.index_copy_(0, at, torch.maximum(largest.index_select(0, at), along))
    return largest.mul_(sign)


def _masked(delta: SparseDelta, weight: float, unified: Tensor) -> Tensor:
    """Mᵢ ⊙ τ_uni at the expert's mask, [n] or [n, h, w]."""
    signed = unified.index_select(0, delta.indices)
    return torch.where(delta.values.float() * weight * signed.sign() > 0, signed, torch.zeros_like(signed))


def _magnitudes(delta: SparseDelta, weight: float, unified: Tensor) -> tuple[float, float]:
    """Σ|τᵢ| and Σ|Mᵢ ⊙ τ_uni|."""
    own = (delta.values.float() * weight).double().abs_()
    return fixed_order_sum(own), fixed_order_sum(_masked(delta, weight, unified).double().abs_())


def _rescaler(own: float, kept: float) -> float:
    return own / kept if kept else 0.0


EMR = MergeMethod(
    "emr",
    emr,
    "the largest wᵢ·ΔWᵢ that has the elected sign",
    "Huang et al. 2024",
    elementwise=True,
    per_expert=emr_experts,
    per_expert_stats=emr_rescalers,
)
