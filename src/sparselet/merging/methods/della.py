"""DELLA: drop at random, small changes more often, then elect signs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError
from sparselet.masks import check_density
from sparselet.merging.algebra.election import disjoint_mean, require_election
from sparselet.merging.algebra.ranges import require_choice, require_finite_number, require_fraction, require_seed
from sparselet.merging.algebra.sampling import RESCALE_CHOICES, drop_randomly
from sparselet.merging.algebra.trim import require_trim, within
from sparselet.merging.method import MergeMethod


def della(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    *,
    density: float = 0.7,
    epsilon: float = 0.07,
    scale: float = 1.0,
    density_of: str = "size",
    rescale: str = "density",
    elect: str = "sum",
    mean: str = "count",
    seed: int = 0,
) -> SparseDelta:
    """DELLA (Deep et al. 2024): MagPrune, then the mean of the deltas that have the elected sign.

    MagPrune keeps an entry with a probability that grows with its magnitude's rank in its row of the parameter, see
    `keep_probabilities`, and divides it by that probability.
    density, epsilon: the mean probability and how far it goes down and up (half of the paper's window). The defaults are the
        authors' example. density 1 with epsilon 0 keeps everything.
    density_of: ranks are among all entries of the row, zeros lowest ("size", published), or among those that are not 0
        ("nonzeros"): with "size" the entries of an expert of density 0.1 all have nearly the highest probability.
    rescale: "density" (published), "norm" or "none"; see `sampled`.
    elect, mean, scale: see `disjoint_mean`. The paper chooses λ on validation data; its example has 1.1.
    seed: the draw depends on it and on the delta's entries that are not 0, and on nothing else.

    deltas: N of one target. weights: N.
    Returns an element mask, the union of what is kept. Raises ShapeMismatch, DensityOutOfRange, ArgumentError.
    """
    check_density(density)
    require_fraction("epsilon", epsilon, allow_zero=True, allow_one=False)
    if density - epsilon < 0 or density + epsilon > 1:
        raise ArgumentError(f"density ± epsilon must lie in [0, 1], got {density!r} ± {epsilon!r}. Lower epsilon.")
    require_finite_number("scale", scale)
    require_trim(density_of)
    require_choice("rescale", rescale, RESCALE_CHOICES)
    require_election(elect, mean)
    require_seed("seed", seed)
    kept = []
    for delta in deltas:
        nonzeros = within(delta, 0.0)
        probabilities = keep_probabilities(nonzeros, density, epsilon, density_of)
        kept.append(drop_randomly(nonzeros, probabilities, seed=seed, rescale=rescale))
    return disjoint_mean(kept, weights, elect=elect, mean=mean, scale=scale)


def keep_probabilities(delta: SparseDelta, density: float, epsilon: float, density_of: str) -> Tensor:
    """density − epsilon + 2·epsilon · (rank − 1) / (m − 1), float32 [n].

    Ranks are those of the magnitudes in a row, from 1, the smallest, to m, the length of the row ("size"; zeros rank lowest)
    or the number of its entries that are not 0 ("nonzeros"). Equal magnitudes share the mean of their ranks. In a row with
    m = 1 the probability is `density`.
    delta: an element mask without zeros.
    """
    columns = delta.shape[1]
    # Rows without entries are not counted, so that a target's size alone takes no memory.
    _, row, in_row = torch.unique_consecutive(delta.indices // columns, return_inverse=True, return_counts=True)
    starts = in_row.cumsum(0) - in_row
    keys, order = (row << 31 | delta.values.float().abs().view(torch.int32)).sort()
    _, group, count = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    twice = 2 * count.cumsum(0) - count - 1  # twice the mean place in `keys` of equal magnitudes, so that it is an integer
    place = torch.empty_like(row).scatter_(0, order, twice.index_select(0, group)) - 2 * starts.index_select(0, row)
    others = in_row.index_select(0, row) - 1
    if density_of == "size":
        place += 2 * (columns - 1 - others)
        others = torch.full_like(others, columns - 1)
    return (density - epsilon + epsilon * place / others).masked_fill_(others == 0, density)


DELLA = MergeMethod(
    "della", della, "as `ties`, of Bᵢ·ΔWᵢ / pᵢ, Bᵢ = 1 with a probability pᵢ that grows with the magnitude", "Deep et al. 2024"
)
