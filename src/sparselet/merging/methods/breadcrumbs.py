"""Model Breadcrumbs: neither the largest nor the smallest changes."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError
from sparselet.masks import blocks_to_keep, check_density
from sparselet.merging.algebra.election import disjoint_mean
from sparselet.merging.algebra.ranges import require_choice, require_finite_number, require_fraction
from sparselet.merging.algebra.trim import Bounds, Ranks, entries_of, expert_magnitudes_at, magnitudes_at, require_trim, within
from sparselet.merging.method import AllTargets, MergeMethod
from sparselet.merging.methods.arithmetic import arithmetic


def breadcrumbs(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    *,
    density: float = 0.15,
    gamma: float = 0.006,
    scale: float = 1.0,
    trim: str = "target",
    density_of: str = "size",
    merge: str = "linear",
    stats: Sequence[Bounds] | None = None,
) -> SparseDelta:
    """Model Breadcrumbs (Davari & Belilovsky 2023): ΔW_m = α · Σ wᵢ·mᵢ∘ΔWᵢ, mᵢ hiding ΔWᵢ's largest and smallest magnitudes.

    gamma: the round(gamma · entries) largest are dropped as outliers, none with 0.
    density: of the rest the max(1, round(density · entries)) largest are kept: the paper drops the smallest β = 1 − density −
        gamma. Equal magnitudes at either bound are all kept; an entry that is 0 never is. The defaults are where the authors'
        own search begins (0.05 to 0.2 kept, 0.001 to 0.01 dropped). density 1 with gamma 0 keeps everything.
    density_of: the entries are the target's, zeros and all ("size", published), or those of the delta that are not 0
        ("nonzeros"): with "size" a gamma of 0.006 drops 6 % of an expert of density 0.1.
    trim: ranks are counted in each target ("target", published) or over all targets of an expert together ("global").
    merge: "linear" (published), or "ties": `disjoint_mean` of what is kept.
    scale: α; the paper chooses it on validation data. With 1 a single expert is what was kept of it.
    stats: the magnitudes that each expert keeps; by default those of `trim` "target", whatever `trim` is.

    deltas: N of one target. weights: N.
    Returns an element mask, the union of what is kept. Raises ShapeMismatch, DensityOutOfRange, ArgumentError.
    """
    check_density(density)
    require_fraction("gamma", gamma, allow_zero=True, allow_one=False)
    if density + gamma > 1:
        raise ArgumentError(f"density and gamma must be at most 1 together, got {density!r} and {gamma!r}. Lower one of them.")
    require_finite_number("scale", scale)
    require_trim(density_of, trim)
    require_choice("merge", merge, ("linear", "ties"))
    if stats is None:
        ranks = _ranks(density, gamma)
        stats = [(low, high) for d in deltas for low, high in [magnitudes_at(d, ranks(entries_of(d, density_of)))]]
    kept = [within(delta, *bounds) for delta, bounds in zip(deltas, stats, strict=True)]
    return disjoint_mean(kept, weights, scale=scale) if merge == "ties" else arithmetic(kept, weights, scale=scale)


def breadcrumbs_bounds(targets: AllTargets, parameters: Mapping[str, Any]) -> list[Bounds]:
    """The magnitudes that each expert keeps, ranked over all targets."""
    ranks = _ranks(parameters["density"], parameters["gamma"])
    return [(low, high) for low, high in expert_magnitudes_at(targets, ranks, parameters["density_of"])]


def _ranks(density: float, gamma: float) -> Ranks:
    """The ranks of the lowest and the highest magnitude that is kept."""
    return lambda entries: (round(gamma * entries) + blocks_to_keep(density, entries), round(gamma * entries) + 1)


BREADCRUMBS = MergeMethod(
    "breadcrumbs",
    breadcrumbs,
    "α · Σ wᵢ·ΔWᵢ without the largest and the smallest of each",
    "Davari & Belilovsky 2023",
    elementwise=True,
    global_stats=breadcrumbs_bounds,
)
