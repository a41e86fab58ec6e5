"""TIES: trim, elect sign, disjoint mean."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparselet.delta import SparseDelta
from sparselet.masks import blocks_to_keep, check_density
from sparselet.merging.algebra.election import disjoint_mean, require_election
from sparselet.merging.algebra.ranges import require_finite_number
from sparselet.merging.algebra.trim import Targets, entries_of, expert_magnitudes_at, magnitudes_at, require_trim, within


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
    cutoffs: Sequence[float] | None = None,
) -> SparseDelta:
    """TIES (Yadav et al. 2023): each delta keeps its k largest magnitudes; those with the elected sign are averaged.

    density: k = max(1, round(density · entries)). Equal magnitudes at the cutoff are all kept; an entry that is 0 never is.
        With 1 nothing is trimmed. Published: 0.2.
    density_of: the entries are the target's, zeros and all ("size", published), or those of the delta that are not 0
        ("nonzeros"): with "size" 0.2 trims nothing of an expert of density 0.1.
    trim: k is counted over all targets of an expert together ("global", published) or in each target ("target").
    elect, mean, scale: see `disjoint_mean`. The paper chooses λ on validation data, near 1 (0.8 to 2.5).
    cutoffs: the smallest magnitude that each expert keeps; without them the deltas are taken as whole targets, or experts.

    deltas: N of one target. weights: N.
    Returns an element mask, the union of the trimmed deltas'. Raises ShapeMismatch, DensityOutOfRange, ArgumentError.
    """
    check_density(density)
    require_finite_number("scale", scale)
    require_trim(density_of, trim)
    require_election(elect, mean)
    if cutoffs is None:
        cutoffs = [magnitudes_at(d, (blocks_to_keep(density, entries_of(d, density_of)),))[0] for d in deltas]
    trimmed = [within(delta, cutoff) for delta, cutoff in zip(deltas, cutoffs, strict=True)]
    return disjoint_mean(trimmed, weights, elect=elect, mean=mean, scale=scale)


def survey_ties(targets: Targets, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The cutoffs of `ties` with global trimming: each expert's k-th largest magnitude over all its targets."""
    if parameters["trim"] != "global":
        return {}
    density = parameters["density"]
    found = expert_magnitudes_at(targets, lambda entries: (blocks_to_keep(density, entries),), parameters["density_of"])
    return {"cutoffs": [cutoff for (cutoff,) in found]}
