"""Elect one sign per entry, and average the deltas that have it (TIES, Yadav et al. 2023, §4.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.kernels import selected
from sparselet.merging.algebra.entries import common_blocks, compact, mask_count
from sparselet.merging.algebra.ranges import require_choice


def require_election(elect: str, mean: str) -> None:
    """Raise ArgumentError unless these are choices of `elect` and `mean`."""
    require_choice("elect", elect, ("sum", "weighted", "count"))
    require_choice("mean", mean, ("count", "weights"))


def disjoint_mean(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    *,
    elect: str = "sum",
    mean: str = "count",
    scale: float = 1.0,
) -> SparseDelta:
    """ΔW_m = λ · Σ wᵢ·ΔWᵢ / D, entry by entry, both sums over the deltas whose sign is the elected one.

    elect: the elected sign is that of Σ ΔWᵢ ("sum", published), of Σ sign ΔWᵢ ("count"), or of Σ wᵢ·ΔWᵢ ("weighted"; then it is
        also wᵢ·ΔWᵢ that must have it, which matters for negative weights). Votes are summed in float64, which adds float32
        numbers of similar size exactly, so that the order of the deltas has no effect. If the sum is 0, no sign is elected and
        the entry is 0.
    mean: D is the number of those deltas ("count", published), or the sum of their weights ("weights"). Where D is 0 up to
        rounding, the entry is 0.
    scale: λ.
    deltas: N of one target, element masks. weights: N. Other sums are float32, in the order of the deltas.
    Returns an element mask, the union of the deltas'. Raises ShapeMismatch.
    """
    deltas, positions = compact(common_blocks(deltas))
    elected = _elected_signs(deltas, weights, elect)
    total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        ballots = delta.values.float() * weight if elect == "weighted" else delta.values.float()
        agreeing = (_gather(elected, delta) * ballots).clamp_(min=0)  # |ballot| where it has the elected sign, else 0
        _accumulate(total, delta, agreeing, 1.0 if elect == "weighted" else weight)
        _accumulate(divisor, delta, (agreeing > 0).float(), weight if mean == "weights" else 1.0)
    blocks = selected(mask_count(deltas) != 0)
    values, divisor = (dense.index_select(0, blocks) for dense in (total.mul_(elected), divisor))
    negligible = 1e-5 * max(map(abs, weights)) if mean == "weights" else 0.0
    values.div_(divisor).masked_fill_(divisor.abs() <= negligible, 0.0)
    return positions.delta(blocks, values.mul_(scale))


def _elected_signs(deltas: Sequence[SparseDelta], weights: Sequence[float], elect: str) -> Tensor:
    """−1, 0 or 1 for each entry of the target, float32 [blocks]."""
    votes = torch.zeros(deltas[0].blocks, dtype=torch.float64, device=deltas[0].values.device)
    for delta, weight in zip(deltas, weights, strict=True):
        ballots = delta.values.sign() if elect == "count" else delta.values
        _accumulate(votes, delta, ballots.double(), weight if elect == "weighted" else 1.0)
    return votes.sign_().float()


def _gather(dense: Tensor, delta: SparseDelta) -> Tensor:
    return dense if delta.nnz == len(dense) else dense.index_select(0, delta.indices)


def _accumulate(dense: Tensor, delta: SparseDelta, numbers: Tensor, factor: float) -> None:
    if delta.nnz == len(dense):
        dense.add_(numbers, alpha=factor)
    else:
        dense.index_add_(0, delta.indices, numbers, alpha=factor)
