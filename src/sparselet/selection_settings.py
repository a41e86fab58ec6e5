"""`SelectionSettings`: how the masks of a sparse expert are chosen. PEFT's configuration and training share it."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from sparselet.delta import BlockSize, check_block_size
from sparselet.errors import ConfigError
from sparselet.masks import check_density
from sparselet.scores import SCORES, Score, get_score, score_help
from sparselet.setting_checks import check_at_least, check_seed, check_settings

Scope = Literal["target", "global"]
InitialMask = Literal["dense", "gradient", "random"]
When = Literal["static", "refresh", "paper"]
Balance = Literal["target", "row"]


@dataclass(frozen=True)
class SelectionSettings:
    """Settings of mask selection. The defaults make the best experts that were measured (docs/results.md, "Recipes").

    Raises DensityOutOfRange, UnknownScore, BlockSizeError, and ConfigError for any other value out of range.
    """

    density: float = 0.1
    """Fraction of each target's entries to train, in (0, 1]; the paper's keep-ratio."""
    block_size: BlockSize = 1
    """1 trains single entries, B tiles of B×B (paper: 16), row whole output rows, column whole input columns."""
    score: str = field(default="random", metadata={"help": f"How entries are ranked: {score_help()}."})
    when: When = "static"
    """Before the first step (static); then again and again, a fraction of the mask at a time (refresh); or as in the paper."""
    balance: Balance = "target"
    """Keep the best of each target, or as many in each of its output rows (row)."""
    replaced: float = 0.2
    """Fraction of the mask that the first refresh may exchange; it falls to 0 over the selection phase."""
    scope: Scope = "target"
    """Keep the fraction in each target, or over all targets together (global; paper, Eq. 5)."""
    layer_drop: bool = False
    """Leave out layers in which no score reaches the global threshold (paper, Eq. 6)."""
    initial_mask: InitialMask = "dense"
    """Train all entries until the first selection (dense), or start sparse from the gradient or at random."""
    reselect_every: int | None = None
    """Optimizer steps between selections; 0 selects once. By default 100, less on small data."""
    selection_epochs: float = 1.0
    """Length of the selection phase in epochs."""
    score_batches: int = 1
    """Batches averaged for one selection. One needs a single dense gradient at a time, more need one for each target."""
    offload: bool = False
    """Keep the selection phase's dense values, waiting gradients and scores in CPU memory (paper, Appendix C)."""
    seed: int = 0
    """Seed of random masks, random scores, scoring batches, and the order of training rows."""

    def __post_init__(self) -> None:
        check_density(self.density)
        score = get_score(self.score)
        check_block_size(self.block_size)
        check_settings(self)
        check_seed(self.seed)
        check_at_least(self, 0, "reselect_every", "selection_epochs")
        check_at_least(self, 1, "score_batches")
        if not 0 <= self.replaced <= 1:
            raise ConfigError(f"replaced is a fraction of the mask, from 0 to 1; got {self.replaced}.")
        if self.balance == "row" and self.scope == "global":
            raise ConfigError("balance='row' does not go with scope='global', which may leave rows and targets empty.")
        if self.balance == "row" and isinstance(self.block_size, str):
            raise ConfigError(
                f"balance='row' spreads blocks over output rows; a block of block_size={self.block_size!r} is a row or a "
                "part of all of them. Leave balance out."
            )
        if self.when != "paper":
            self._check_sparse_start(score)
        elif self.initial_mask != "dense" and self.reselect_every and not score.ranks_untrained:
            raise ConfigError(
                f"score {self.score!r} is 0 for entries that were never trained, and initial_mask {self.initial_mask!r} trains "
                f"only entries in the mask, so it cannot move the mask every {self.reselect_every} steps. Set "
                f"reselect_every=0, or one of these scores: {_growing_scores()}."
            )

    def _check_sparse_start(self, score: Score) -> None:
        """Refuse what needs a dense phase."""
        if self.initial_mask != "dense":
            raise ConfigError(f"initial_mask is a setting of when='paper'; with when={self.when!r} leave it out.")
        if self.when == "static" and self.reselect_every:
            raise ConfigError("reselect_every does not go with when='static', which selects once; take when='refresh'.")
        if not score.ranks_untrained:
            raise ConfigError(
                f"score {self.score!r} is 0 for entries that were never trained, so it cannot choose with when={self.when!r}. "
                f"Take when='paper', or one of these scores: {_growing_scores()}."
            )

    @property
    def interval(self) -> int:
        """`reselect_every`, or its default: 100, or 0 where the score cannot rank the untrained entries of a sparse start."""
        if self.when == "static":
            return 0
        if self.reselect_every is not None:
            return self.reselect_every
        sparse_start = self.when == "paper" and self.initial_mask != "dense"
        return 0 if sparse_start and not get_score(self.score).ranks_untrained else 100


def _growing_scores() -> str:
    """The names of the scores that can rank untrained entries."""
    return ", ".join(name for name, score in SCORES.items() if score.ranks_untrained)


def selection_values(settings: Any) -> dict[str, Any]:
    """The values of the fields of `SelectionSettings` that an object, such as a configuration, has under the same names."""
    return {field.name: vars(settings)[field.name] for field in fields(SelectionSettings)}
