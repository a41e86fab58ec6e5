"""How much each block of a target matters. A score is one function here and one line in `SCORES`.

A block is an entry, or a tile whose score is the sum over its entries (paper, "Block Sparsity"). Ŵ is the delta being
trained, g = ∂L/∂Ŵ at W + Ŵ with no mask applied.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselet.errors import UnknownScore
from sparselet.kernels import tile_sum

REPLACED = 0.2  # fraction of the mask that grow-and-drop exchanges, SpIEL's default initial rate


@dataclass(frozen=True)
class Candidate:
    """What a score may read of one target.

    gradient: g, float [rows, columns], the mean over the scoring batches.
    block_size: 1, or B for tiles.
    kept: number of blocks the mask will keep.
    generator: source of randomness, seeded by target and selection.
    mask: the current mask as ascending block ids, int [n]; None while all entries are trained.
    values: Ŵ, float [rows, columns], 0 where nothing was trained yet; None where the score does not need it.
    """

    gradient: Tensor
    block_size: int
    kept: int
    generator: torch.Generator
    mask: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class Score:
    """A score and its properties.

    function: returns a float per block, [blocks]. Its parameters are the fields of `Candidate` that it needs.
    ranks_untrained: whether it can rank entries whose Ŵ is 0, and so can grow a mask when off-mask values are not kept.
    """

    function: Callable[..., Tensor]
    ranks_untrained: bool = False

    def __call__(self, candidate: Candidate) -> Tensor:
        """The score of each block, [blocks]."""
        return self.function(**{name: vars(candidate)[name] for name in self.needs})

    @property
    def needs(self) -> tuple[str, ...]:
        """The fields of `Candidate` that it reads."""
        return tuple(inspect.signature(self.function).parameters)

    @property
    def help(self) -> str:
        """One line: the first of the function's docstring."""
        return (self.function.__doc__ or "").partition("\n")[0].removesuffix(".")


def mcs(values: Tensor, gradient: Tensor, block_size: int) -> Tensor:
    """Ŵ·g, the paper's maximum connection sensitivity as printed.

    Eq. 2, which has no absolute value. An entry that moves steadily downhill from zero has Ŵ·g < 0, so the printed sign
    prefers entries that the gradient now pushes back; `mcs_neg` is the other reading.
    """
    return tile_sum(values * gradient, block_size)


def mcs_neg(values: Tensor, gradient: Tensor, block_size: int) -> Tensor:
    """−Ŵ·g, mcs with the opposite sign: entries that still move in the direction in which they have moved."""
    return tile_sum(-(values * gradient), block_size)


def cs(values: Tensor, gradient: Tensor, block_size: int) -> Tensor:
    """|Ŵ·g|, connection sensitivity (SNIP, Lee et al. 2018; paper, Eq. 1)."""
    return tile_sum((values * gradient).abs(), block_size)


def gm(gradient: Tensor, block_size: int) -> Tensor:
    """|g|, gradient magnitude (paper, Section 4.2)."""
    return tile_sum(gradient.abs(), block_size)


def wm(values: Tensor, block_size: int) -> Tensor:
    """|Ŵ|, weight magnitude (paper, Section 4.2)."""
    return tile_sum(values.abs(), block_size)


def gd(values: Tensor, gradient: Tensor, block_size: int, kept: int, mask: Tensor | None) -> Tensor:
    """Grow by |g|, drop by |Ŵ| (Ansell et al. 2024).

    |Ŵ − Ŵ₀| with Ŵ₀ = 0. The (1 − 0.2)·k blocks of the current mask with the largest |Ŵ| stay; the remaining places go to the
    blocks outside of it with the largest |g|, so a dropped block does not return in the same selection. Without a current
    mask the k blocks with the largest |Ŵ| are kept. Deviation: the replaced fraction is constant, SpIEL's decays.
    Returns ranks: blocks that stay, then blocks that may grow, then dropped blocks.
    """
    moved = tile_sum(values.abs(), block_size)
    if mask is None:
        return moved
    mask = mask.long()
    growth = tile_sum(gradient.abs(), block_size)
    score = growth / growth.max().clamp_min(torch.finfo(growth.dtype).tiny)  # in [0, 1], same order
    score[mask] = -1.0
    stay = min(len(mask), kept - round(REPLACED * kept))
    order = moved[mask].argsort(descending=True, stable=True)
    score[mask[order[:stay]]] = 2.0
    return score


def random(gradient: Tensor, block_size: int, generator: torch.Generator) -> Tensor:
    """A uniform random number, the baseline."""
    # On the CPU, so that all devices choose the same mask.
    return torch.rand(gradient.numel() // block_size**2, generator=generator).to(gradient.device)


SCORES: dict[str, Score] = {
    "mcs": Score(mcs),
    "mcs_neg": Score(mcs_neg),
    "cs": Score(cs),
    "gm": Score(gm, ranks_untrained=True),
    "wm": Score(wm),
    "gd": Score(gd, ranks_untrained=True),
    "random": Score(random, ranks_untrained=True),
}


def get_score(name: str) -> Score:
    """The score of this name. Raises UnknownScore, listing all names."""
    if name not in SCORES:
        raise UnknownScore(f"no score is called {name!r}; there are {', '.join(SCORES)}.")
    return SCORES[name]


def score_help() -> str:
    """All scores with their one-line help, for the command line."""
    return "; ".join(f"{name}: {score.help}" for name, score in SCORES.items())
