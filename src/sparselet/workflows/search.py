"""Weights or parameters of a merge, chosen by the merged model's score on validation rows."""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.errors import ArgumentError, ConfigError, MissingExtra
from sparselet.evaluation import EvalSettings, evaluate
from sparselet.formats import open_expert
from sparselet.merging import METHODS, MergeRecipe
from sparselet.merging.engine.plan import Expert, Weight
from sparselet.merging.recipe import merge_by
from sparselet.setting_checks import check_seed, check_settings
from sparselet.tasks.task import Task

RANGES = {"weights": (0.0, 2.0), "density": (0.01, 1.0), "lambda": (0.0, 2.0)}
LAMBDA = "scale"  # what the methods call λ
Choice = Literal["weights", "density", "lambda"]


@dataclass(frozen=True)
class SearchSettings:
    """What a search chooses, and for how long. Raises ConfigError."""

    choose: Choice = "weights"
    """What to choose by the score on validation rows: the weights or one factor λ on all (0 to 2), or density (0.01 to 1)."""
    trials: int = 20
    """Merges that a search tries; the first is the given merge."""
    seconds: float | None = None
    """A search starts no trial but the first after this time."""
    seed: int = 0
    """Of the search."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.choose not in RANGES:
            raise ConfigError(f"choose must be one of {', '.join(RANGES)}, got {self.choose!r}.")
        if self.trials < 1:
            raise ConfigError(f"trials must be at least 1, got {self.trials}.")
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError(f"seconds must be above 0, got {self.seconds}.")
        check_seed(self.seed)


@dataclass(frozen=True)
class Trial:
    """A merge of a search: the chosen numbers, the mean Rouge-L over the tasks, and the Rouge-L of each task."""

    chosen: Mapping[str, float]
    score: float
    tasks: Mapping[str, float]


@dataclass(frozen=True)
class SearchResult:
    """The recipe that scored best, and all trials in order. Of equal scores the earlier trial counts."""

    recipe: MergeRecipe
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The trial of the recipe."""
        return _best(self.trials)


def search(
    recipe: MergeRecipe,
    settings: SearchSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    eval_settings: EvalSettings,
    *,
    experts: Sequence[Expert] | None = None,
    progress: Callable[[float], None] | None = None,
) -> SearchResult:
    """Try merges by Optuna's TPE sampler (Bergstra et al. 2011) and keep the one with the best mean Rouge-L.

    The first trial is the recipe as it is, so that the result is never worse on these rows. Rows should be of a validation
    split: what is measured on them afterwards is too good. Equal settings and seed give equal trials.

    tasks, eval_settings: the rows that the merged models answer, and how. experts: those of the recipe, opened; by default
        they are opened here, which full checkpoints do not allow. progress: called with 1 after each trial.
    Raises ConfigError (no task, the method leaves nothing of this kind open), MissingExtra, and what merging and evaluating
    raise.
    """
    if not tasks:
        raise ConfigError("a search needs at least one task to score on.")
    start = _start(recipe, settings.choose)
    ranges = {name: _range(recipe, settings.choose, name, value) for name, value in start.items()}
    experts = [open_expert(name) for name in recipe.experts] if experts is None else experts
    optuna = _optuna()
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=settings.seed))
    study.enqueue_trial(start)
    trials: list[Trial] = []
    end = time.monotonic() + (settings.seconds or float("inf"))
    while len(trials) < settings.trials and (not trials or time.monotonic() < end):
        drawn = study.ask()
        chosen = {name: drawn.suggest_float(name, low, high) for name, (low, high) in ranges.items()}
        trial_recipe = _apply_choice(recipe, settings.choose, chosen)
        merged = merge_by(trial_recipe, experts)
        scores = {result.task: result.scores["rougeL"] for result in evaluate(model, tokenizer, tasks, merged, eval_settings)}
        trials.append(Trial(chosen, sum(scores.values()) / len(scores), scores))
        study.tell(drawn, trials[-1].score)
        if progress is not None:
            progress(1)
    return SearchResult(_apply_choice(recipe, settings.choose, _best(trials).chosen), tuple(trials))


def _best(trials: Sequence[Trial]) -> Trial:
    return max(trials, key=lambda trial: trial.score)


def _start(recipe: MergeRecipe, choose: Choice) -> dict[str, float]:
    """The numbers to choose, with the recipe's own values. Raises ConfigError."""
    if choose == "weights":
        start = {f"weight {i}": float(w) for i, w in enumerate(recipe.weights, 1) if not isinstance(w, Mapping)}
        if len(start) < len(recipe.weights):
            raise ConfigError("weights by pattern cannot be searched; give one number an expert.")
    elif choose == "density":
        if "density" not in recipe.parameters:
            raise ConfigError(f"method {recipe.method} has no density to search; {_methods_with('density')} have.")
        start = {"density": float(recipe.parameters["density"])}
    elif LAMBDA in recipe.parameters:
        start = {LAMBDA: float(recipe.parameters[LAMBDA])}
    elif recipe.method == "overlap":  # whose weights scale the result
        start = {LAMBDA: 1.0}
    else:
        raise ConfigError(f"method {recipe.method} has no lambda to search; overlap, {_methods_with(LAMBDA)} have.")
    low, high = RANGES[choose]
    for name, value in start.items():
        if not low <= value <= high:
            raise ConfigError(
                f"the search of {choose} goes from {low:g} to {high:g}; the recipe starts outside: {name} {value:g}."
            )
    return start


def _methods_with(parameter: str) -> str:
    return ", ".join(method for method in METHODS if parameter in METHODS[method].defaults)


def _range(recipe: MergeRecipe, choose: Choice, name: str, start: float) -> tuple[float, float]:
    """The part of the range around the recipe's own number that the method takes: DELLA's density ± epsilon is in [0, 1]."""
    if name not in recipe.parameters:
        return RANGES[choose]

    def taken(number: float) -> bool:
        try:
            _apply_choice(recipe, choose, {name: number})
        except ArgumentError:
            return False
        return True

    def last_taken(end: float) -> float:
        inside, outside = start, end
        for _ in range(0 if taken(end) else 40):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if taken(middle) else (inside, middle)
        return outside if taken(outside) else inside

    low, high = RANGES[choose]
    return last_taken(low), last_taken(high)


def _apply_choice(recipe: MergeRecipe, choose: Choice, chosen: Mapping[str, float]) -> MergeRecipe:
    """The recipe with the chosen numbers."""
    if choose == "weights":
        return replace(recipe, weights=tuple(chosen.values()))
    if LAMBDA in chosen and LAMBDA not in recipe.parameters:
        return replace(recipe, weights=tuple(_times(weight, chosen[LAMBDA]) for weight in recipe.weights))
    return replace(recipe, parameters={**recipe.parameters, **chosen})


def _times(weight: Weight, factor: float) -> Weight:
    if isinstance(weight, Mapping):
        return {pattern: factor * w for pattern, w in {"*": 1.0, **weight}.items()}
    return factor * weight


def _optuna() -> Any:
    try:
        optuna = importlib.import_module("optuna")
    except ModuleNotFoundError as error:
        raise MissingExtra("searching needs optuna: pip install 'sparselet[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
