"""SCE: select the entries in which the experts differ, calculate a weight for each expert, erase minority signs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.kernels import selected
from sparselet.masks import blocks_to_keep, check_density
from sparselet.merging.algebra.entries import common_blocks, compact, mask_count
from sparselet.merging.algebra.ranges import require_choice
from sparselet.merging.algebra.sums import fixed_order_sum, sum_in_double
from sparselet.merging.algebra.trim import value_at_rank
from sparselet.merging.method import MergeMethod


def sce(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    *,
    density: float = 0.1,
    density_of: str = "nonzeros",
    select: str = "entries",
) -> SparseDelta:
    """SCE (Wan et al. 2024, FuseChat): ΔW_m = Σ ηᵢ·Aᵢ⊙τᵢ / Σ ηᵢ·Aᵢ, entry by entry, τᵢ = wᵢ·ΔWᵢ.

    Select: the entries whose variance over the experts is highest. Calculate: ηᵢ = Σ τᵢ² / Σⱼ Σ τⱼ² over the selected entries.
    Erase: Aᵢ = [sign τᵢ = sign Σⱼ τⱼ]. An entry whose sum is 0 elects no sign and is 0 (the authors and mergekit take plus).
    Of equal variances at the cutoff all are kept. Where no entry varies (one expert, or all alike) none can be preferred and
    all are kept; mergekit keeps none. The paper has no weights.

    density: fraction of the entries selected; 0.1 as published.
    density_of: "nonzeros", of the entries whose variance is not 0, as in the authors' code; "size", of all of the target's, the
        paper's top τ % (entries that do not vary are not selected in either case).
    select: "entries", only selected entries are merged, as in the paper; "weights", the selection decides on ηᵢ only and all
        entries are merged, as in the authors' code.
    deltas: N of one target. weights: N.
    Returns a delta on the union of the masks, less what is not merged; of blocks when all have the same and density is 1.
    Raises ShapeMismatch, ArgumentError (a parameter out of range).
    """
    check_density(density)
    require_choice("density_of", density_of, ("nonzeros", "size"))
    require_choice("select", select, ("entries", "weights"))
    deltas = common_blocks(deltas)
    if density < 1:
        deltas = [delta.expand() for delta in deltas]
    size = deltas[0].size
    deltas, positions = compact(deltas)
    votes = sum_in_double(deltas, weights)
    varied = _most_varied(deltas, weights, votes, density, size if density_of == "size" else None) if density < 1 else deltas
    shares = _shares(varied, weights)
    return positions.delta(*_majority(varied if select == "entries" else deltas, weights, shares, votes.sign().float()))


def _most_varied(
    deltas: list[SparseDelta], weights: Sequence[float], votes: Tensor, density: float, size: int | None
) -> list[SparseDelta]:
    """The deltas at the entries whose variance is highest. votes: Σ τᵢ. size: what density is a fraction of, if not of the
    entries that vary."""
    squares = torch.zeros_like(votes)
    for delta, weight in zip(deltas, weights, strict=True):
        squares.index_add_(0, delta.indices, (delta.values.float() * weight).double().square_())
    deviation = squares.mul_(len(deltas)).sub_(votes.square()).clamp_(min=0).sqrt_().float()  # N times the standard deviation
    varying = int(deviation.count_nonzero())
    if varying == 0:
        return deltas
    k = blocks_to_keep(density, varying if size is None else size)
    keep = (deviation.reshape(-1) >= value_at_rank(deviation.reshape(-1), k)) & (deviation.reshape(-1) > 0)
    kept = []
    for delta in deltas:
        positions = keep.index_select(0, delta.indices)
        kept.append(SparseDelta(delta.shape, delta.indices[positions], delta.values[positions]))
    return kept


def _shares(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> list[float]:
    """ηᵢ; 0 if all deltas are zero."""
    squares = [
        fixed_order_sum((d.values.float() * weight).double().square_()) for d, weight in zip(deltas, weights, strict=True)
    ]
    return [square / sum(squares) if square else 0.0 for square in squares]


def _majority(
    deltas: Sequence[SparseDelta], weights: Sequence[float], shares: Sequence[float], sign: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean, with these shares, of the τᵢ whose sign is the elected one, 0 where none has it: blocks and values."""
    above, below = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight, share in zip(deltas, weights, shares, strict=True):
        own = delta.values.float() * weight
        counted = share * (own * sign.index_select(0, delta.indices) > 0)
        above.index_add_(0, delta.indices, own * counted)
        below.index_add_(0, delta.indices, counted)
    blocks = selected(mask_count(deltas))
    above, below = above.index_select(0, blocks), below.index_select(0, blocks)
    return blocks, torch.where(below > 0, above / below, torch.zeros_like(above))


SCE = MergeMethod(
    "sce",
    sce,
    "mean of the wᵢ·ΔWᵢ that have the elected sign, weighted by Σ (wᵢ·ΔWᵢ)², of the entries that vary most",
    "Wan et al. 2024",
)
