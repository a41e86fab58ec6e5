"""TIES: trim, elect sign, disjoint mean."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparselet.delta import SparseDelta
from sparselet.masks import blocks_to_keep, check_density
from sparselet.merging.algebra.election import disjoint_mean, require_election
from sparselet.merging.algebra.ranges import require_finite_number
from sparselet.merging.algebra.trim import Bounds, entries_of, expert_magnitudes_at, magnitudes_at, require_trim, within
from sparselet.merging.method import AllTargets, MergeMethod


def ties(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    scale: float = 1.0,
    trim: str = "global",
    density_of: str = "size",
    elect: str = "sum",
    mean: str = "count",
    stats: Sequence[Bounds] | None = None,
) -> SparseDelta:
    """TIES (Yadav et al. 2023): each delta keeps its k largest magnitudes; those with the elected sign are averaged.

    density: k = max(1, round(density · entries)). Equal magnitudes at the cutoff are all kept; an entry that is 0 never is.
        With 1 nothing is trimmed. Published: 0.2.
    density_of: the entries are the target's, zeros and all ("size", published), or those of the delta that are not 0
        ("nonzeros"): with "size" 0.2 trims nothing of an expert of density 0.1.
    trim: k is counted over all targets of an expert together ("global", published) or in each target ("target").
    elect, mean, scale: see `disjoint_mean`. The paper chooses λ on validation data, near 1 (0.8 to 2.5).
    stats: the magnitudes that each expert keeps; by default those of `trim` "target", whatever `trim` is.

    deltas: N of one target. weights: N.
    Returns an element mask, the union of the trimmed deltas'. Raises ShapeMismatch, DensityOutOfRange, ArgumentError.
    """
    check_density(density)
    require_finite_number("scale", scale)
    require_trim(density_of, trim)
    require_election(elect, mean)
    if stats is None:
        stats = [(magnitudes_at(d, (blocks_to_keep(density, entries_of(d, density_of)),))[0], math.inf) for d in deltas]
    trimmed = [within(delta, *bounds) for delta, bounds in zip(deltas, stats, strict=True)]
    return disjoint_mean(trimmed, weights, elect=elect, mean=mean, scale=scale)


def ties_bounds(targets: AllTargets, parameters: Mapping[str, Any]) -> list[Bounds]:
    """The magnitudes that each expert keeps: from its k-th largest over all targets."""
    density = parameters["density"]
    cutoffs = expert_magnitudes_at(targets, lambda entries: (blocks_to_keep(density, entries),), parameters["density_of"])
    return [(cutoff, math.inf) for (cutoff,) in cutoffs]


TIES = MergeMethod(
    "ties",
    ties,
    "λ · mean of the trimmed wᵢ·ΔWᵢ that have the elected sign",
    "Yadav et al. 2023",
    elementwise=True,
    global_stats=ties_bounds,
    tried=tuple({"density": density, "density_of": "nonzeros"} for density in (0.2, 0.1, 0.5)),
)
