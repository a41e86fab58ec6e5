"""Core parameter isolation: cores are kept as they were trained, the rest is interpolated on the sphere."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.kernels import selected
from sparselet.masks import blocks_to_keep, check_density
from sparselet.merging.algebra.cores import CORES, core_of
from sparselet.merging.algebra.entries import common_blocks, compact, mask_count, weighted_sum
from sparselet.merging.algebra.gram import gram
from sparselet.merging.algebra.ranges import require_choice, require_seed
from sparselet.merging.algebra.trim import Bounds, entries_of, magnitudes_at, require_trim
from sparselet.merging.method import MergeMethod
from sparselet.merging.methods.average import overlap
from sparselet.merging.methods.ties import ties_bounds

STRAIGHT = 0.9995  # |cos ω| above which SLERP is linear, as in mergekit


def cpi(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    *,
    density: float = 0.01,
    density_of: str = "size",
    trim: str = "global",
    core: str = "largest",
    seed: int = 0,
    stats: Sequence[Bounds] | None = None,
) -> SparseDelta:
    """Core parameter isolation (CPI-FT, Wang et al. 2025): the last expert is the base, cores overwrite, the rest is SLERP.

    With τᵢ = wᵢ·ΔWᵢ, the base τ_N, and the core Cᵢ of the k largest |ΔWᵢ|: in C₁ ∪ … ∪ C_{N−1} an entry is the mean of the τᵢ
    whose cores have it; in the rest of C_N it is the base's. Outside of all cores the base's vector n ← SLERP(n, nᵢ; 1/2), then
    1/3, … over the experts from the last back to the first, nᵢ being τᵢ there; linear where |cos ω| > 0.9995, ω the angle, and
    where a vector is 0.

    The paper does not state the interpolation's share, its threshold, what shared core entries become, nor weights. Deviation:
    it interpolates whole weights, whose angle is so small that SLERP is linear; these are the changes.

    density, density_of: k, as in `ties`; published: 1 % of all entries. trim: ranked over all targets or in each.
    core: "random" takes as many entries at random, by `seed`, as a control.
    deltas: N of one target. weights: N. Returns the union of the masks. Raises ShapeMismatch, DensityOutOfRange, ArgumentError.
    """
    check_density(density)
    require_trim(density_of, trim)
    require_choice("core", core, CORES)
    require_seed("seed", seed)
    if stats is None:
        stats = [(magnitudes_at(d, (blocks_to_keep(density, entries_of(d, density_of)),))[0], math.inf) for d in deltas]
    deltas = [delta.expand() for delta in common_blocks(deltas)]
    cores = [core_of(delta, bounds, core, seed) for delta, bounds in zip(deltas, stats, strict=True)]
    together, positions = compact([*deltas, *cores])
    scaled = [delta.to(torch.float32).scale(w) for delta, w in zip(together, [*weights, *weights], strict=True)]
    deltas, cores = scaled[: len(weights)], scaled[len(weights) :]
    is_core = mask_count(cores) > 0
    outside = [_at(delta, ~is_core.index_select(0, delta.indices)) for delta in deltas]
    total = weighted_sum(outside, slerp_coefficients(gram(outside)))
    for kept in (cores[-1], overlap(cores[:-1], [1.0] * len(cores[:-1])) if len(cores) > 1 else None):
        if kept is not None:
            total.index_copy_(0, kept.indices.long(), kept.values)
    blocks = selected(mask_count(deltas))
    return positions.delta(blocks, total.index_select(0, blocks))


def slerp_coefficients(products: Tensor) -> list[float]:
    """cᵢ of Σ cᵢ·nᵢ, n_N interpolated with n_{N−1} by 1/2, with n_{N−2} by 1/3, …; products: ⟨nᵢ, nⱼ⟩, float64 [N, N].

    SLERP(a, b; t) = (sin((1 − t)ω)·a + sin(tω)·b) / sin ω, ω the angle between a and b (Shoemake 1985).
    """
    combined = torch.zeros(len(products), dtype=torch.float64)
    combined[-1] = 1.0
    for count, i in enumerate(range(len(products) - 2, -1, -1), 2):
        share, length = 1 / count, math.sqrt(max(0.0, float(combined @ products @ combined) * float(products[i, i])))
        cosine = float(products[i] @ combined) / length if length else 1.0
        first, second = 1 - share, share
        if abs(cosine) <= STRAIGHT:
            angle = math.acos(cosine)
            first, second = (math.sin(part * angle) / math.sin(angle) for part in (first, second))
        combined *= first
        combined[i] += second
    return combined.tolist()


def _at(delta: SparseDelta, kept: Tensor) -> SparseDelta:
    return SparseDelta(delta.shape, delta.indices[kept], delta.values[kept])


CPI = MergeMethod(
    "cpi",
    cpi,
    "ΔWᵢ in the cores, SLERP of the wᵢ·ΔWᵢ onto the last outside of them",
    "Wang et al. 2025",
    global_stats=ties_bounds,
)
