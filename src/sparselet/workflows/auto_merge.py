"""The merge that suits given experts, chosen by the merged model's score on validation rows."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.adapter import expert_profile
from sparselet.apply import apply_temporarily
from sparselet.errors import ConfigError, NonFiniteScore, SparseletError
from sparselet.evaluation import EvalSettings, evaluate
from sparselet.expert import Expert
from sparselet.io.printable import reason
from sparselet.merging import METHODS, MergeRecipe
from sparselet.merging.recipe import merge_by
from sparselet.setting_checks import check_at_least, check_settings
from sparselet.tasks.task import Task
from sparselet.workflows.validation_loss import ValidationLoss

logger = logging.getLogger("sparselet")

SCALE_STEP = 1.3  # between the scales that are tried
SLOPES = ((0.5, 1.0), (0.0, 2.0))  # of LiNeS, as multiples of the best scale: its mean over the layers stays
DENSE = 0.5  # the density of an expert whose matrices count as whole


@dataclass(frozen=True)
class AutoSettings:
    """How merges are tried, and how they are judged. Raises ConfigError."""

    trials: int = 20
    """Merges that are tried at most."""
    seconds: float | None = None
    """No merge but the first is tried after this time."""
    score: Literal["rougeL", "loss"] = "rougeL"
    """What is compared: the mean Rouge-L of answers, or the mean loss of targets, which is cheaper and varies less."""

    def __post_init__(self) -> None:
        check_settings(self)
        check_at_least(self, 1, "trials")
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError(f"seconds must be above 0, got {self.seconds}.")


@dataclass(frozen=True)
class AutoTrial:
    """A merge that was tried: its score by task (Rouge-L × 100, or loss) and their mean; None and the reason if it failed.

    entries: that the merge selects.
    """

    recipe: MergeRecipe
    score: float | None
    tasks: Mapping[str, float]
    entries: int = 0
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """What was merged how, and its scores."""
        recipe = self.recipe
        how = {"method": recipe.method, "parameters": dict(recipe.parameters), "layer_scaling": recipe.layer_scaling}
        measured = {"score": self.score, "tasks": dict(self.tasks), "entries": self.entries}
        return {**how, **measured, **({"error": self.error} if self.error else {})}


@dataclass(frozen=True)
class AutoResult:
    """All merges that were tried, in order.

    score: "rougeL", of which more is better, or "loss". Of equal scores the earlier trial counts.
    """

    trials: tuple[AutoTrial, ...]
    score: str

    def as_json(self) -> dict[str, Any]:
        """The trials as JSON values."""
        return {"score": self.score, "trials": [trial.as_json() for trial in self.trials]}

    @property
    def best(self) -> AutoTrial:
        """The trial with the best score."""
        sign = -1 if self.score == "loss" else 1
        scored = [(sign * trial.score, trial) for trial in self.trials if trial.score is not None]
        return max(scored, key=lambda entry: entry[0])[1]


def auto_merge(
    recipe: MergeRecipe,
    settings: AutoSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    eval_settings: EvalSettings,
    *,
    experts: Sequence[Expert],
    progress: Callable[[float], None] | None = None,
) -> AutoResult:
    """Try the merges that suit the experts, and refine the best one.

    1. The recipe as it is. 2. Each method of METHODS with the parameters that its record lists (`tried`), if it suits: one that
    needs profiles where all experts have one, one `for_dense` where all experts are dense or of whole rows or columns. 3. The
    best of these times 1.3, 1.69, … for as long as the score rises, else divided by them. 4. The result of that with layers
    scaled by depth (LiNeS). The result is never worse than the recipe on these rows. It is deterministic but for `seconds`.

    A merge that fails, other than the recipe, is a trial without a score. experts: those of the recipe, opened.
    Raises ConfigError (no task, keep_counts), and what reading profiles, merging by the recipe and evaluating raise.
    """
    if not tasks:
        raise ConfigError("validation tasks are needed to choose a merge by; set `validation`.")
    if recipe.keep_counts:
        raise ConfigError("keep_counts does not go with a choice among methods: only overlap keeps counts.")
    by_loss = ValidationLoss(model, tokenizer, tasks, eval_settings) if settings.score == "loss" else None

    def scores(merged: Expert) -> dict[str, float]:
        if by_loss is not None:
            with apply_temporarily(model, merged):
                return by_loss.by_task()
        results = evaluate(model, tokenizer, tasks, merged, eval_settings)
        return {result.task: result.scores["rougeL"] for result in results}

    trials: list[AutoTrial] = []
    end = time.monotonic() + (settings.seconds or float("inf"))
    for proposal in _proposals(recipe, experts, lambda: AutoResult(tuple(trials), settings.score).best):
        if trials and (len(trials) >= settings.trials or time.monotonic() >= end):
            break
        try:
            merged = merge_by(proposal, experts)
            by_task = scores(merged)
            score = sum(by_task.values()) / len(by_task)
            if not math.isfinite(score):
                raise NonFiniteScore("the score of the merged model is NaN or infinite.")
            trials.append(AutoTrial(proposal, score, by_task, merged.nnz))
        except SparseletError as error:
            if not trials:
                raise
            trials.append(AutoTrial(proposal, None, {}, error=reason(error)))
            logger.warning("A merge by %s failed: %s", proposal.method, reason(error))
        if progress is not None:
            progress(1)
    return AutoResult(tuple(trials), settings.score)


def suitable_merges(recipe: MergeRecipe, experts: Sequence[Expert]) -> list[MergeRecipe]:
    """The recipe with each method and parameters that suit the experts, other than its own, those by profiles first.

    Raises what reading profiles raises.
    """
    changing = [expert for expert in experts if len(expert)]
    bare = [expert.metadata.task or str(expert.path) for expert in changing if expert_profile(expert) is None]
    if bare:
        logger.info("Methods that need profiles are left out: %s has none. `sparselet profile` makes it.", ", ".join(bare))
    dense = all(map(_has_whole_matrices, changing))
    merges = []
    for name, method in sorted(METHODS.items(), key=lambda entry: not entry[1].needs_profiles):
        if (not bare or not method.needs_profiles) and (dense or not method.for_dense):
            merges += [replace(recipe, method=name, parameters=dict(chosen)) for chosen in method.tried]
    return [proposal for proposal in merges if proposal != recipe]


def _proposals(recipe: MergeRecipe, experts: Sequence[Expert], best: Callable[[], AutoTrial]) -> Iterator[MergeRecipe]:
    """The merges to try, one after another. best: of the trials so far."""
    yield recipe
    yield from suitable_merges(recipe, experts)
    start = best().recipe
    for factor in (SCALE_STEP, 1 / SCALE_STEP):
        scaled = start
        while best().recipe is scaled:
            alpha, beta = scaled.layer_scaling or (1.0, 0.0)
            scaled = replace(scaled, layer_scaling=(round(alpha * factor, 4), round(beta * factor, 4)))
            yield scaled
        if best().recipe is not start:
            break
    alpha, beta = best().recipe.layer_scaling or (1.0, 0.0)
    if not beta:
        for slope in SLOPES:
            yield replace(best().recipe, layer_scaling=(slope[0] * alpha, slope[1] * alpha))


def _has_whole_matrices(expert: Expert) -> bool:
    """Whether an expert changes most entries of its targets, or whole rows or columns of them."""
    size = sum(rows * columns for rows, columns in expert.shapes.values())
    return expert.nnz > DENSE * size or isinstance(expert.metadata.block_size, str)
