"""Keeping the entries whose magnitude |ΔW| lies within bounds, and finding the bounds by rank."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparselet import kernels
from sparselet.delta import SparseDelta
from sparselet.kernels import selected
from sparselet.merging.algebra.ranges import require_choice
from sparselet.merging.method import AllTargets

# The lowest and the highest magnitude that is kept of an expert.
Bounds = tuple[float, float]
# The ranks of magnitudes, given how many entries a density is a fraction of; rank 1 is the largest.
Ranks = Callable[[int], Sequence[int]]


def require_trim(density_of: str, trim: str = "target") -> None:
    """Raise ArgumentError unless these are choices of `density_of` and `trim`."""
    require_choice("density_of", density_of, ("size", "nonzeros"))
    require_choice("trim", trim, ("target", "global"))


def entries_of(delta: SparseDelta, density_of: str) -> int:
    """How many entries a density is a fraction of: the target's ("size"), or those that are not 0 ("nonzeros")."""
    return delta.size if density_of == "size" else int(delta.values.count_nonzero())


def within(delta: SparseDelta, low: float, high: float = math.inf) -> SparseDelta:
    """The entries with low ≤ |ΔW| ≤ high that are not 0, as an element mask. Magnitudes are compared in float32."""
    delta = delta.expand()
    magnitudes = delta.values.float().abs()
    inside = magnitudes >= low if low > 0 else magnitudes > 0
    if high < math.inf:
        inside &= magnitudes <= high
    kept = selected(inside)
    if len(kept) == delta.nnz:
        return delta
    return SparseDelta(delta.shape, delta.indices.index_select(0, kept), delta.values.index_select(0, kept))


def magnitudes_at(delta: SparseDelta, ranks: Sequence[int]) -> tuple[float, ...]:
    """The k-th largest |ΔW| for each k in `ranks`, in float32; 0 for k beyond the selected entries."""
    magnitudes = delta.values.detach().float().abs().reshape(-1)
    return tuple(kth_largest(magnitudes, k) for k in ranks)


def kth_largest(numbers: Tensor, k: int) -> float:
    """The k-th largest of `numbers` [n], k ≥ 1; 0 for k beyond n."""
    if k > len(numbers):
        return 0.0
    return float(kernels.kth_largest([numbers], k))


def expert_magnitudes_at(targets: AllTargets, ranks: Ranks, density_of: str) -> list[tuple[float, ...]]:
    """`magnitudes_at` of whole experts, over all their targets together: one tuple an expert.

    targets: called at most twice; each call yields the same (deltas, weights), one delta an expert. No more than one target is
    in memory: for numbers that are not negative the order of floats is that of their bits, so a histogram of the upper 16 bits
    and then one of the lower 16 bits of those that fall in the wanted bin find the k-th largest exactly.
    """
    upper: defaultdict[int, Tensor] = defaultdict(lambda: torch.zeros(2**15, dtype=torch.int64))
    entries: defaultdict[int, int] = defaultdict(int)
    for deltas, _ in targets():
        for i, delta in enumerate(deltas):
            entries[i] += entries_of(delta, density_of)
            _count(upper[i], _bits(delta) >> 16)
        del deltas  # before the next target's are read
    wanted = {i: [_bin(upper[i], k) for k in ranks(entries[i])] for i in upper}
    lower = {(i, bin_): torch.zeros(2**16, dtype=torch.int64) for i in wanted for bin_, k in wanted[i] if k}
    for deltas, _ in targets() if lower else ():
        for (i, bin_), counts in lower.items():
            bits = _bits(deltas[i])
            _count(counts, bits.index_select(0, selected(bits >> 16 == bin_)) & 0xFFFF)
        del deltas
    return [
        tuple(_float(bin_ << 16 | _bin(lower[i, bin_], k)[0]) if k else 0.0 for bin_, k in bins) for i, bins in wanted.items()
    ]


def _bits(delta: SparseDelta) -> Tensor:
    """The bit patterns of the float32 magnitudes, int32 [nnz]."""
    return delta.values.detach().float().abs().reshape(-1).view(torch.int32).cpu()


def _float(bits: int) -> float:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()


def _count(counts: Tensor, bins: Tensor) -> None:
    counts.index_add_(0, bins, torch.ones(len(bins), dtype=torch.int64))


def _bin(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin of the k-th largest number, and its rank in that bin; rank 0 for k beyond their count."""
    at_least = counts.flip(0).cumsum(0).flip(0)
    found = (at_least >= k).nonzero()
    if not len(found):
        return 0, 0
    bin_ = int(found[-1])
    return bin_, k - int(at_least[bin_] - counts[bin_])
