"""DARE: drop at random, and rescale."""

from collections.abc import Sequence

from sparselet.delta import SparseDelta
from sparselet.masks import check_density
from sparselet.merging.algebra.election import disjoint_mean
from sparselet.merging.algebra.ranges import require_choice, require_finite_number, require_seed
from sparselet.merging.algebra.sampling import RESCALE_CHOICES, drop_randomly
from sparselet.merging.algebra.trim import within
from sparselet.merging.method import MergeMethod
from sparselet.merging.methods.arithmetic import arithmetic


def dare(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    *,
    density: float = 0.8,
    scale: float = 1.0,
    merge: str = "linear",
    rescale: str = "density",
    seed: int = 0,
) -> SparseDelta:
    """DARE (Yu et al. 2024): each entry is kept with probability `density` and then divided by it; what is left is merged.

    density: 1 − the paper's drop rate p, which it varies from 0.1 to 0.99; the default is the authors' example of merging. With
        1 nothing is dropped.
    merge: "linear", λ · Σ wᵢ·ΔWᵢ, or "ties", `disjoint_mean` without further trimming (the authors' code trims again).
    rescale: "density" (published), "norm" or "none"; see `sampled`.
    scale: λ.
    seed: the draw depends on it and on the delta's entries that are not 0, and on nothing else.

    deltas: N of one target. weights: N.
    Returns an element mask, the union of what is kept. Raises ShapeMismatch, DensityOutOfRange, ArgumentError.
    """
    check_density(density)
    require_finite_number("scale", scale)
    require_choice("merge", merge, ("linear", "ties"))
    require_choice("rescale", rescale, RESCALE_CHOICES)
    require_seed("seed", seed)
    kept = [drop_randomly(within(delta, 0.0), density, seed=seed, rescale=rescale) for delta in deltas]
    return disjoint_mean(kept, weights, scale=scale) if merge == "ties" else arithmetic(kept, weights, scale=scale)


DARE = MergeMethod("dare", dare, "λ · Σ wᵢ·Bᵢ·ΔWᵢ / d, Bᵢ = 1 with probability d", "Yu et al. 2024")
