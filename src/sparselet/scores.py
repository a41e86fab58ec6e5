"""How much each block of a target matters. A score is one function here and one line in `SCORES`.

A block is an entry, or a tile, row or column, whose score is the sum over its entries (paper, "Block Sparsity"). Ŵ is the
delta being trained, W the weight that a pass uses (the base weight before the first step), g = ∂L/∂W with no mask applied.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselet.errors import UnknownScore
from sparselet.kernels import Block, block_sum

REPLACED = 0.2  # fraction of the mask that grow-and-drop exchanges, SpIEL's default initial rate


@dataclass(frozen=True)
class Candidate:
    """What a score may read of one target.

    shape: rows and columns of the target.
    block: rows and columns of a block: (1, 1) for entries, (B, B) for tiles.
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
    block: Block
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


def mcs(values: Tensor, gradient: Tensor, block: Block) -> Tensor:
    """Ŵ·g, the paper's maximum connection sensitivity as printed.

    Eq. 2, which has no absolute value. An entry that moves steadily downhill from zero has Ŵ·g < 0, so the printed sign
    prefers entries that the gradient now pushes back; `mcs_neg` is the other reading.
    """
    return block_sum(values * gradient, block)


def mcs_neg(values: Tensor, gradient: Tensor, block: Block) -> Tensor:
    """−Ŵ·g, mcs with the opposite sign: entries that still move in the direction in which they have moved."""
    return block_sum(-(values * gradient), block)


def cs(values: Tensor, gradient: Tensor, block: Block) -> Tensor:
    """|Ŵ·g|, connection sensitivity (SNIP, Lee et al. 2018; paper, Eq. 1)."""
    return block_sum((values * gradient).abs(), block)


def gm(gradient: Tensor, block: Block) -> Tensor:
    """|g|, gradient magnitude (paper, Section 4.2)."""
    return block_sum(gradient.abs(), block)


def wm(values: Tensor, block: Block) -> Tensor:
    """|Ŵ|, weight magnitude (paper, Section 4.2)."""
    return block_sum(values.abs(), block)


def gd(values: Tensor, gradient: Tensor, block: Block, kept: int, mask: Tensor | None, replaced: float) -> Tensor:
    """Grow by |g|, drop by |Ŵ| (Ansell et al. 2024).

    |Ŵ − Ŵ₀| with Ŵ₀ = 0; see `grow_and_drop`. Without a current mask the k blocks with the largest |Ŵ| are kept.
    """
    moved = block_sum(values.abs(), block)
    return moved if mask is None else grow_and_drop(moved, block_sum(gradient.abs(), block), mask, kept, replaced)


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


def random(shape: tuple[int, int], block: Block, generator: torch.Generator) -> Tensor:
    """A uniform random number, the baseline.

    Drawn on the CPU, so that all devices choose the same mask. Fixed before the first step a random mask is a strong baseline
    (Xu & Zhang 2024; SHiRA, Bhardwaj et al. 2024).
    """
    return torch.rand(shape[0] * shape[1] // (block[0] * block[1]), generator=generator)


def snip(weight: Tensor, gradient: Tensor, block: Block) -> Tensor:
    """|W·g|, connection sensitivity of the weight itself (SNIP, Lee et al. 2019; in SHiRA, Bhardwaj et al. 2024)."""
    return block_sum((weight * gradient).abs(), block)


def magnitude(weight: Tensor, block: Block) -> Tensor:
    """|W|, magnitude of the weight (SHiRA, Bhardwaj et al. 2024; NeuroAda, Zhang et al. 2025, which balances it by row)."""
    return block_sum(weight.abs(), block)


def lift(weight: Tensor, block: Block, kept: int) -> Tensor:
    """|U_r S_r V_rᵀ|, magnitude in the low-rank part of the weight (LIFT, Liu et al. 2025).

    r(m + n) is the number of entries kept, as published, but r ≥ 8 and at most the smaller side. The part is that of the exact
    singular value decomposition, by the eigenvectors of the smaller Gram matrix; published: a randomised one.
    """
    rows, columns = weight.shape
    rank = min(rows, columns, max(8, round(kept * (block[0] * block[1]) / (rows + columns))))
    wide = weight.double()
    left = rows <= columns
    basis = torch.linalg.eigh(wide @ wide.T if left else wide.T @ wide).eigenvectors[:, -rank:]
    part = basis @ (basis.T @ wide) if left else (wide @ basis) @ basis.T
    return block_sum(part.abs().to(weight.dtype), block)


def wanda(weight: Tensor, inputs: Tensor, block: Block) -> Tensor:
    """|W|·‖x_j‖₂, magnitude times the norm of the entry's input (Wanda, Sun et al. 2024; in Super-Tuning, 2026)."""
    return block_sum(weight.abs() * inputs, block)


def fisher(squares: Tensor, block: Block) -> Tensor:
    """The mean of g² over the scoring batches, the diagonal of the empirical Fisher matrix (RoSA, Nikdan et al. 2024)."""
    return block_sum(squares, block)


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
