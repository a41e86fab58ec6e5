"""How much each block of a target matters: one function a score, all listed in `SCORES`.

A block is an entry, or a tile whose score is the sum over its entries (paper, "Block Sparsity"). Ŵ is the delta being
trained, g = ∂L/∂Ŵ at W + Ŵ with no mask applied.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselet.errors import UnknownScore
from sparselet.kernels import tile_sum

REPLACED = 0.2  # fraction of the mask that grow-and-drop exchanges, SpIEL's default initial rate


@dataclass(frozen=True)
class Candidate:
    """All that a score may look at, for one target.

    values: Ŵ, float [rows, columns], 0 where nothing was trained yet.
    gradient: g, float [rows, columns], the mean over the scoring batches.
    block_size: 1, or B for tiles.
    kept: how many blocks the mask will keep.
    mask: the present mask as ascending block ids, int [n]; None while all entries are trained.
    generator: the source of randomness, seeded by target and selection.
    """

    values: Tensor
    gradient: Tensor
    block_size: int
    kept: int
    mask: Tensor | None
    generator: torch.Generator


Score = Callable[[Candidate], Tensor]


def mcs(c: Candidate) -> Tensor:
    """Maximum connection sensitivity, Ŵ·g (paper, Eq. 2), as printed: no absolute value.

    Downhill from zero an entry that moves steadily has Ŵ·g < 0, so the printed sign prefers entries that the gradient
    now pushes back; `mcs_neg` is the other reading.
    """
    return tile_sum(c.values * c.gradient, c.block_size)


def mcs_neg(c: Candidate) -> Tensor:
    """−Ŵ·g: entries that still move the way they have moved. Our variant of Eq. 2 with the opposite sign."""
    return tile_sum(-(c.values * c.gradient), c.block_size)


def cs(c: Candidate) -> Tensor:
    """Connection sensitivity, |Ŵ·g| (SNIP, Lee et al. 2018; paper, Eq. 1)."""
    return tile_sum((c.values * c.gradient).abs(), c.block_size)


def gm(c: Candidate) -> Tensor:
    """Gradient magnitude, |g| (paper, Section 4.2)."""
    return tile_sum(c.gradient.abs(), c.block_size)


def wm(c: Candidate) -> Tensor:
    """Weight magnitude, |Ŵ| (paper, Section 4.2)."""
    return tile_sum(c.values.abs(), c.block_size)


def gd(c: Candidate) -> Tensor:
    """Grow and drop (Ansell et al. 2024): drop by |Ŵ − Ŵ₀|, grow by |g|.

    Ŵ₀ = 0. Of the present mask, the (1 − 0.2)·k blocks with the largest |Ŵ| stay; the other places go to the blocks
    outside it with the largest |g|, so a dropped block does not return at once. Without a present mask the k largest |Ŵ|
    are kept. Deviation: the replaced fraction is constant, SpIEL's decays over the run.
    Returned as ranks: blocks that stay above those that may grow, dropped blocks last.
    """
    moved = tile_sum(c.values.abs(), c.block_size)
    if c.mask is None:
        return moved
    mask = c.mask.long()
    growth = tile_sum(c.gradient.abs(), c.block_size)
    score = growth / growth.max().clamp_min(torch.finfo(growth.dtype).tiny)  # in [0, 1], same order
    score[mask] = -1.0
    stay = min(len(mask), c.kept - round(REPLACED * c.kept))
    order = moved[mask].argsort(descending=True, stable=True)
    score[mask[order[:stay]]] = 2.0
    return score


def random(c: Candidate) -> Tensor:
    """A uniform number for each block: the baseline that every score must beat. Drawn on the CPU, so that devices agree."""
    blocks = c.values.numel() // c.block_size**2
    return torch.rand(blocks, generator=c.generator).to(c.values.device)


SCORES: dict[str, Score] = {
    "mcs": mcs,
    "mcs_neg": mcs_neg,
    "cs": cs,
    "gm": gm,
    "wm": wm,
    "gd": gd,
    "random": random,
}

# Scores that can rank an entry whose Ŵ is 0, and so can grow a mask when off-mask values are not kept.
RANKS_UNTRAINED = frozenset({"gm", "gd", "random"})


def get_score(name: str) -> Score:
    """The score of this name. Raises UnknownScore, listing those there are."""
    if name not in SCORES:
        raise UnknownScore(f"no score is called {name!r}; there are {', '.join(SCORES)}.")
    return SCORES[name]
