"""Trimming: the entries whose magnitude |ΔW| lies within bounds, and bounds by rank."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

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
    """The number of entries that a density is a fraction of: all of the target ("size"), or the non-zero ones ("nonzeros")."""
    return delta.size if density_of == "size" else int(delta.values.count_nonzero())


def within(delta: SparseDelta, low: float, high: float = math.inf) -> SparseDelta:
    """The non-zero entries with low ≤ |ΔW| ≤ high, as an element mask. Magnitudes are compared in float32."""
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
    magnitudes = _magnitudes(delta)
    return tuple(value_at_rank(magnitudes, k) for k in ranks)


def value_at_rank(numbers: Tensor, k: int) -> float:
    """The k-th largest of `numbers` [n], k ≥ 1; 0 for k beyond n."""
    return float(kernels.kth_largest([numbers], k)) if k <= len(numbers) else 0.0


def expert_magnitudes_at(targets: AllTargets, ranks: Ranks, density_of: str) -> list[tuple[float, ...]]:
    """`magnitudes_at` of whole experts, over all their targets together: one tuple per expert.

    targets: called at most twice; each call yields the same (deltas, weights), one delta per expert. No more than one target is
    in memory: each call counts one 16-bit digit of the magnitudes (`kernels.select`).
    """
    first: defaultdict[int, Any] = defaultdict(int)
    entries: defaultdict[int, int] = defaultdict(int)
    for deltas, _ in targets():
        for i, delta in enumerate(deltas):
            entries[i] += entries_of(delta, density_of)
            first[i] += kernels.digit_counts(_magnitudes(delta))
        del deltas  # before the next target's are read
    positions = {i: [kernels.digit_of_rank(counts, k) for k in ranks(entries[i])] for i, counts in first.items()}
    second: dict[tuple[int, int], Any] = {(i, digit): 0 for i in positions for digit, k in positions[i] if k}
    for deltas, _ in targets() if second else ():
        for i, digit in second:
            second[i, digit] += kernels.digit_counts(_magnitudes(deltas[i]), [digit])
        del deltas

    def magnitude(i: int, digit: int, k: int) -> float:
        return float(kernels.number_of([digit, kernels.digit_of_rank(second[i, digit], k)[0]], torch.float32)) if k else 0.0

    return [tuple(magnitude(i, digit, k) for digit, k in positions[i]) for i in positions]


def _magnitudes(delta: SparseDelta) -> Tensor:
    """|ΔW| of the selected entries, float32 [nnz]."""
    return delta.values.detach().float().abs().reshape(-1).cpu()
