"""Localize-and-Stitch without data: the largest entries of each expert, averaged where they meet."""

import math
from collections.abc import Sequence

from sparselet.delta import SparseDelta
from sparselet.masks import blocks_to_keep, check_density
from sparselet.merging.algebra.trim import Bounds, entries_of, magnitudes_at, require_trim, within
from sparselet.merging.method import MergeMethod
from sparselet.merging.methods.average import overlap
from sparselet.merging.methods.ties import ties_bounds


def localize(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    *,
    density: float = 0.05,
    density_of: str = "size",
    trim: str = "global",
    stats: Sequence[Bounds] | None = None,
) -> SparseDelta:
    """Localize-and-Stitch without data (He et al. 2025): `overlap` of the entries of largest magnitude of each expert.

    It makes sparse experts of LoRAs and full checkpoints, and merges them by Eq. 4, which is the paper's stitching.

    density: k = max(1, round(density · entries)); the paper takes 1 to 10 %. Equal magnitudes at the cutoff are all kept, an
        entry that is 0 never is.
    density_of, trim, stats: as in `ties`.
    deltas: N of one target. weights: N.
    Returns an element mask, the union of what is kept. Raises ShapeMismatch, DensityOutOfRange, ArgumentError.
    """
    check_density(density)
    require_trim(density_of, trim)
    if stats is None:
        stats = [(magnitudes_at(d, (blocks_to_keep(density, entries_of(d, density_of)),))[0], math.inf) for d in deltas]
    return overlap([within(delta, *bounds) for delta, bounds in zip(deltas, stats, strict=True)], weights)


LOCALIZE = MergeMethod(
    "localize",
    localize,
    "`overlap` of the largest |ΔWᵢ| of each expert",
    "He et al. 2025",
    elementwise=True,
    linear=True,
    global_stats=ties_bounds,
    tried=({},),
    for_dense=True,
)
