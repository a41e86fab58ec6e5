"""Which part of an expert's change is enough: parts of it in the base model, measured on a task's rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.adapter import SparseAdapter
from sparselet.analysis.grafts import PARTS, graft
from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings, evaluate
from sparselet.evaluation.metrics import rouge_l_of_each
from sparselet.expert import Expert
from sparselet.intervals import MeanInterval, mean_interval
from sparselet.masks import check_density
from sparselet.setting_checks import check_at_least, check_seed, check_settings
from sparselet.tasks.task import Task
from sparselet.tuner.mask_state import seeded
from sparselet.workflows.learned_graft import learn_graft
from sparselet.workflows.probing import probe_rows

RANDOM_PARTS = ("random", "random_rescaled")
LEARNED = "learned"  # a part whose mask is learned on training rows
GRAFTS = (*PARTS, LEARNED)


@dataclass(frozen=True)
class GraftSettings:
    """What is grafted. Raises ConfigError, DensityOutOfRange."""

    fractions: tuple[float, ...] = (0.001, 0.01, 0.05, 0.1, 0.5)
    """Fractions of the entries of each target that the expert selected."""
    parts: tuple[str, ...] = tuple(PARTS)
    """Names of GRAFTS."""
    draws: int = 1
    """Draws of each random part, whose scores are averaged row by row."""
    seed: int = 0
    """Of the first draw; the others follow it."""
    learning_rows: int = 64
    """Training rows that the mask of the part `learned` is learned on."""
    learning_steps: int = 20
    """Gradient steps on that mask."""

    def __post_init__(self) -> None:
        check_settings(self)
        check_at_least(self, 1, "draws", "learning_rows", "learning_steps")
        check_seed(self.seed)
        unknown = [part for part in self.parts if part not in GRAFTS]
        if unknown or not self.parts or not self.fractions:
            named = repr(unknown[0]) if unknown else "none"
            raise ConfigError(f"parts must be some of {', '.join(GRAFTS)}, and fractions at least one number; got {named}.")
        for fraction in self.fractions:
            check_density(fraction)


@dataclass(frozen=True)
class GraftPoint:
    """One part of a change at one fraction.

    kept: the entries that were grafted. score: mean Rouge-L × 100 over rows. gain: of each row over the base model.
    """

    part: str
    fraction: float
    kept: int
    score: MeanInterval
    gain: MeanInterval


@dataclass(frozen=True)
class GraftCurve:
    """The base model, all of the change, and its parts. advantage: by fraction, the paired difference of `top` and
    `random_rescaled`; the change is concentrated only where it is above 0."""

    rows: int
    entries: int
    base: MeanInterval
    whole: MeanInterval
    points: tuple[GraftPoint, ...]
    advantage: dict[float, MeanInterval]


def graft_curve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    expert: Expert,
    task: Task,
    settings: GraftSettings,
    eval_settings: EvalSettings,
    progress: Callable[[float], None] | None = None,
) -> GraftCurve:
    """Measure Rouge-L of greedy answers with each part of the change in the base model's weights.

    Intervals are bootstraps over rows. progress: called with the number of rows answered since its last call; `measured_rows`
    tells how many there will be. Raises what `evaluate` raises.
    """

    def scores(part: Expert | None) -> np.ndarray:
        (result,) = evaluate(model, tokenizer, [task], part, eval_settings, progress)
        targets = [row.target for row, _ in result.predictions]
        return 100 * np.array(rouge_l_of_each([answer for _, answer in result.predictions], targets))

    base, whole, template = scores(None), scores(expert), eval_settings.chat_template is not False
    by_row: dict[tuple[str, float], np.ndarray] = {}
    points = []
    for part, fraction, draws in _plan(settings):
        if part == LEARNED:
            learning = probe_rows(model, tokenizer, task.rows("train", settings.learning_rows), chat_template=template)
            grafts = iter([learn_graft(model, expert, learning, fraction, steps=settings.learning_steps)])
        else:
            grafts = (grafted(expert, part, fraction, settings.seed + draw) for draw in range(draws))
        measured = [(chosen.nnz, scores(chosen)) for chosen in grafts]
        rows = np.mean([score for _, score in measured], axis=0)
        by_row[part, fraction] = rows
        points.append(GraftPoint(part, fraction, measured[0][0], mean_interval(rows), mean_interval(rows - base)))
    advantage = {
        fraction: mean_interval(by_row["top", fraction] - by_row["random_rescaled", fraction])
        for fraction in settings.fractions
        if ("top", fraction) in by_row and ("random_rescaled", fraction) in by_row
    }
    return GraftCurve(len(base), expert.nnz, mean_interval(base), mean_interval(whole), tuple(points), advantage)


def measured_rows(rows: int, settings: GraftSettings) -> int:
    """The number of rows that `graft_curve` answers."""
    return rows * (2 + sum(draws for _, _, draws in _plan(settings)))


def grafted(expert: Expert, part: str, fraction: float, seed: int) -> SparseAdapter:
    """One part of an expert's change, in memory; each target draws from a generator of its own."""
    deltas = {name: graft(expert[name], part, fraction, seeded(seed, name)) for name in expert}
    return SparseAdapter(deltas, expert.metadata, expert.fingerprints)


def _plan(settings: GraftSettings) -> Iterator[tuple[str, float, int]]:
    for fraction in settings.fractions:
        for part in settings.parts:
            yield part, fraction, settings.draws if part in RANDOM_PARTS else 1
