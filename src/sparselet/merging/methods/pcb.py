"""PCB-Merging: experts compete for each entry, by its weight in their own delta and by its agreement with the others'."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.kernels import selected
from sparselet.masks import blocks_to_keep, check_density
from sparselet.merging.algebra.entries import common_blocks, compact
from sparselet.merging.algebra.ranges import require_finite_number, require_fraction
from sparselet.merging.algebra.sums import sum_in_double
from sparselet.merging.algebra.trim import entries_of, require_trim, value_at_rank
from sparselet.merging.method import MergeMethod


def pcb(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    density_of: str = "size",
    clip: float = 0.0001,
    scale: float = 1.0,
) -> SparseDelta:
    """PCB-Merging (Du et al. 2024): ΔW_m = λ · Σ sᵢ·wᵢ·τᵢ / Σ sᵢ, entry by entry, τᵢ = ΔWᵢ with its outliers clipped.

    Balance: βᵢ = exp(N·nᵢ²) · tanh(ΔWᵢ · Σⱼ ΔWⱼ), nᵢ = |τᵢ| / max |τᵢ|. The first factor weighs entries within an expert, the
    second between experts. Drop and rescale: sᵢ = max(βᵢ − cᵢ, 0) / (max βᵢ − cᵢ), where exactly the k highest βᵢ lie above the
    cutoff cᵢ (fewer if some are equal to it).

    This is the authors' code (pcb-merging.py); the paper writes softmax for exp, and softmax over each pair's products for
    tanh, without its Norm. Deviations: cutoffs and maxima are those of one target, not of the whole model; cᵢ is at least 0,
    so that an entry which pulls against the sum is dropped (in the code an expert most of whose entries do would be merged
    by the least of them); k entries keep a weight (k − 1 in the code); the smallest magnitude counts as 0 in nᵢ, and is not
    clipped. Where an expert's highest βᵢ is equal to its cutoff, sᵢ is 1 for all that are.

    density: fraction kept of each expert, the paper's ratio r (its code 0.1 and 0.05).
    density_of: "size", of the target's size, as published; "nonzeros", of the expert's entries that are not 0.
    clip: of an expert's entries that are not 0 this fraction, the largest, is lowered to the next magnitude; 0.0001 as in the
        code.
    scale: λ, 1 where there is no validation data. weights: the paper's λᵢ; they have no part in the competition.
    deltas: N of one target. weights: N.
    Returns a delta on the entries that any expert kept. Raises ShapeMismatch, ArgumentError (a parameter out of range).
    """
    check_density(density)
    require_trim(density_of)
    require_fraction("clip", clip, allow_zero=True, allow_one=False)
    require_finite_number("scale", scale)
    whole = [delta.expand() for delta in common_blocks(deltas)]
    deltas, positions = compact(whole)
    together = sum_in_double(deltas, [1.0] * len(deltas))
    above, below = torch.zeros_like(together), torch.zeros_like(together)
    for own, delta, weight in zip(whole, deltas, weights, strict=True):
        if delta.nnz == 0:
            continue
        clipped = _clip(delta.values.float(), int(clip * entries_of(delta, "nonzeros"))).double()
        agreement = torch.tanh(delta.values.double() * together.index_select(0, delta.indices))
        kept = blocks_to_keep(density, entries_of(own, density_of))
        share = _share(_importance(clipped, len(deltas)) * agreement, kept)
        above.index_add_(0, delta.indices, share * clipped * weight)
        below.index_add_(0, delta.indices, share)
    blocks = selected(below > 0)
    values = (above.index_select(0, blocks) / below.index_select(0, blocks) * scale).float()
    return positions.delta(blocks, values)


def _clip(values: Tensor, count: int) -> Tensor:
    """`values` with the `count` largest magnitudes lowered to the next one."""
    if count == 0:
        return values
    bound = value_at_rank(values.abs(), count + 1)
    return values.clamp(-bound, bound)


def _importance(values: Tensor, experts: int) -> Tensor:
    """exp(N·nᵢ²) as a fraction of the highest possible, which the rescaling cancels; 0 for a delta that is zero."""
    largest = values.abs().max()
    return torch.exp(experts * ((values / largest).square() - 1)) if largest > 0 else torch.zeros_like(values)


def _share(balance: Tensor, kept: int) -> Tensor:
    """sᵢ from βᵢ [n] at an expert's mask; elsewhere βᵢ is 0."""
    best = balance.max()
    if best <= 0:
        return torch.zeros_like(balance)
    cutoff = max(0.0, value_at_rank(balance, kept + 1))
    if cutoff == best:
        return (balance == best).double()
    return ((balance - cutoff) / (best - cutoff)).clamp_(min=0)


PCB = MergeMethod("pcb", pcb, "λ · Σ sᵢ·wᵢ·ΔWᵢ / Σ sᵢ, sᵢ from importance in ΔWᵢ and agreement with Σ ΔWⱼ", "Du et al. 2024")
