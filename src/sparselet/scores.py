"""How much each block of a target matters. A score is one function here and one line in `SCORES`.

A block is an entry, or a tile whose score is the sum over its entries (paper, "Block Sparsity"). Ŵ is the delta being
trained, W the weight that a pass uses (the base weight before the first step), g = ∂L/∂W with no mask applied.
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

    shape: rows and columns of the target.
    block_size: 1, or B for tiles.
    kept: number of blocks the mask will keep.
    generator: source of randomness, seeded by target and selection.
    mask: the current mask as ascending block ids, int [n]; None while all entries are trained, and before the first selection.
    replaced: fraction of the mask that a score which exchanges blocks may exchange.

    None where the score does not need them, else float [rows, columns]:
    gradient: g, the mean over the scoring batches. squares: the mean of g² over them.
    values: Ŵ, 0 where nothing was trained yet. weight: W.
    inputs: ‖x_j‖₂ of each input over all tokens of the scoring batches, [1, columns], or [rows, 1] where inputs lie along rows.
    """

    shape: tuple[int, int]
    block_size: int
    kept: int
    generator: torch.Generator
    mask: Tensor | None = None
    replaced: float = REPLACED
    gradient: Tensor | None = None
    squares: Tensor | None = None
    values: Tensor | None = None
    weight: Tensor | None = None
    inputs: Tensor | None = None


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
    def needs_data(self) -> bool:
        """Whether it needs scoring batches."""
        return not {"gradient", "squares", "inputs"}.isdisjoint(self.needs)

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


def gd(values: Tensor, gradient: Tensor, block_size: int, kept: int, mask: Tensor | None, replaced: float) -> Tensor:
    """Grow by |g|, drop by |Ŵ| (Ansell et al. 2024).

    |Ŵ − Ŵ₀| with Ŵ₀ = 0; see `grow_and_drop`. Without a current mask the k blocks with the largest |Ŵ| are kept.
    """
    moved = tile_sum(values.abs(), block_size)
    return moved if mask is None else grow_and_drop(moved, tile_sum(gradient.abs(), block_size), mask, kept, replaced)


def grow_and_drop(moved: Tensor, growth: Tensor, mask: Tensor, kept: int, replaced: float) -> Tensor:
    """Ranks [blocks]: blocks that stay, then those outside of the mask in the order of `growth`, then dropped ones.

    The (1 − replaced)·kept blocks of the mask with the largest `moved` stay, so a dropped block does not return in the same
    selection. moved, growth: float [blocks]. mask: ascending block ids, int [n].
    """
    mask = mask.long()
    low, high = growth.min(), growth.max()
    score = (growth - low) / (high - low).clamp_min(torch.finfo(growth.dtype).tiny)  # in [0, 1], same order
    score[mask] = -1.0
    stay = min(len(mask), kept - round(replaced * kept))
    order = moved[mask].argsort(descending=True, stable=True)
    score[mask[order[:stay]]] = 2.0
    return score


def random(shape: tuple[int, int], block_size: int, generator: torch.Generator) -> Tensor:
    """A uniform random number, the baseline.

    Drawn on the CPU, so that all devices choose the same mask. Fixed before the first step a random mask is a strong baseline
    (Xu & Zhang 2024; SHiRA, Bhardwaj et al. 2024).
    """
    return torch.rand(shape[0] * shape[1] // block_size**2, generator=generator)


def snip(weight: Tensor, gradient: Tensor, block_size: int) -> Tensor:
    """|W·g|, connection sensitivity of the weight itself (SNIP, Lee et al. 2019; in SHiRA, Bhardwaj et al. 2024)."""
    return tile_sum((weight * gradient).abs(), block_size)


def magnitude(weight: Tensor, block_size: int) -> Tensor:
    """|W|, magnitude of the weight (SHiRA, Bhardwaj et al. 2024; NeuroAda, Zhang et al. 2025, which balances it by row)."""
    return tile_sum(weight.abs(), block_size)


def lift(weight: Tensor, block_size: int, kept: int) -> Tensor:
    """|U_r S_r V_rᵀ|, magnitude in the low-rank part of the weight (LIFT, Liu et al. 2025).

    r(m + n) is the number of entries kept, as published, but r ≥ 8 and at most the smaller side. The part is that of the exact
    singular value decomposition, by the eigenvectors of the smaller Gram matrix; published: a randomised one.
    """
    rows, columns = weight.shape
    rank = min(rows, columns, max(8, round(kept * block_size**2 / (rows + columns))))
    wide = weight.double()
    left = rows <= columns
    basis = torch.linalg.eigh(wide @ wide.T if left else wide.T @ wide).eigenvectors[:, -rank:]
    part = basis @ (basis.T @ wide) if left else (wide @ basis) @ basis.T
    return tile_sum(part.abs().to(weight.dtype), block_size)


def wanda(weight: Tensor, inputs: Tensor, block_size: int) -> Tensor:
    """|W|·‖x_j‖₂, magnitude times the norm of the entry's input (Wanda, Sun et al. 2024; in Super-Tuning, 2026)."""
    return tile_sum(weight.abs() * inputs, block_size)


def fisher(squares: Tensor, block_size: int) -> Tensor:
    """The mean of g² over the scoring batches, the diagonal of the empirical Fisher matrix (RoSA, Nikdan et al. 2024)."""
    return tile_sum(squares, block_size)


SCORES: dict[str, Score] = {
    "mcs": Score(mcs),
    "mcs_neg": Score(mcs_neg),
    "cs": Score(cs),
    "gm": Score(gm, ranks_untrained=True),
    "wm": Score(wm),
    "gd": Score(gd, ranks_untrained=True),
    "random": Score(random, ranks_untrained=True),
    "snip": Score(snip, ranks_untrained=True),
    "magnitude": Score(magnitude, ranks_untrained=True),
    "lift": Score(lift, ranks_untrained=True),
    "wanda": Score(wanda, ranks_untrained=True),
    "fisher": Score(fisher, ranks_untrained=True),
}


def get_score(name: str) -> Score:
    """The score of this name. Raises UnknownScore, listing all names."""
    if name not in SCORES:
        raise UnknownScore(f"no score is called {name!r}; there are {', '.join(SCORES)}.")
    return SCORES[name]


def score_help() -> str:
    """All scores with their one-line help, for the command line."""
    return "; ".join(f"{name}: {score.help}" for name, score in SCORES.items())
