"""Choosing what a merge method leaves open, by the merged model's score on validation rows."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.errors import ArgumentError, ConfigError, MissingExtra
from sparselet.evaluation import EvalSettings, evaluate
from sparselet.formats import open_expert
from sparselet.merging import METHODS, MergeRecipe, merge
from sparselet.merging.engine.plan import Expert, Weight
from sparselet.setting_checks import check_seed, check_settings
from sparselet.tasks.task import Task

RANGES = {"weights": (0.0, 2.0), "density": (0.02, 1.0), "lambda": (0.0, 2.0)}
LAMBDA = "scale"  # what the methods call λ
What = Literal["weights", "density", "lambda"]


@dataclass(frozen=True)
class SearchSettings:
    """What is searched, and for how long. Raises ConfigError."""

    choose: What = "weights"
    """What to choose by the score on validation rows: the weights or one factor λ on all (0 to 2), or density (0.02 to 1)."""
    trials: int = 20
    """Merges that a search tries; the first is the one that was asked for."""
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
    """One merge that was tried: what was set, its mean Rouge-L over the tasks, and each task's."""

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

    tasks, asked: what the merged model is asked. experts: those of the recipe, opened; it opens them itself where none is a
        full checkpoint. progress: called with 1 after each trial.
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
        tried = _with(recipe, settings.choose, chosen)
        merged = merge(experts, tried.method, tried.weights, tried.parameters)
        scores = {result.task: result.scores["rougeL"] for result in evaluate(model, tokenizer, tasks, merged, eval_settings)}
        trials.append(Trial(chosen, sum(scores.values()) / len(scores), scores))
        study.tell(drawn, trials[-1].score)
        if progress is not None:
            progress(1)
    return SearchResult(_with(recipe, settings.choose, _best(trials).chosen), tuple(trials))


def _best(trials: Sequence[Trial]) -> Trial:
    return max(trials, key=lambda trial: trial.score)


def _start(recipe: MergeRecipe, what: What) -> dict[str, float]:
    """The numbers to choose, with the recipe's own values. Raises ConfigError."""
    if what == "weights":
        start = {f"weight {i}": float(w) for i, w in enumerate(recipe.weights, 1) if not isinstance(w, Mapping)}
        if len(start) < len(recipe.weights):
            raise ConfigError("weights by pattern cannot be searched; give one number an expert.")
    elif what == "density":
        if "density" not in recipe.parameters:
            raise ConfigError(f"method {recipe.method} has no density to search; {_methods_with('density')} have.")
        start = {"density": float(recipe.parameters["density"])}
    elif LAMBDA in recipe.parameters:
        start = {LAMBDA: float(recipe.parameters[LAMBDA])}
    elif recipe.method == "overlap":  # whose weights scale the result
        start = {LAMBDA: 1.0}
    else:
        raise ConfigError(f"method {recipe.method} has no lambda to search; overlap, {_methods_with(LAMBDA)} have.")
    low, high = RANGES[what]
    for name, value in start.items():
        if not low <= value <= high:
            raise ConfigError(
                f"the search of {what} goes from {low:g} to {high:g}; the recipe starts outside: {name} {value:g}."
            )
    return start


def _methods_with(parameter: str) -> str:
    return ", ".join(method for method in METHODS if parameter in METHODS[method].defaults)


def _range(recipe: MergeRecipe, what: What, name: str, start: float) -> tuple[float, float]:
    """The part of the range around the recipe's own number that the method takes: DELLA's density ± epsilon is in [0, 1]."""
    if name not in recipe.parameters:
        return RANGES[what]

    def taken(number: float) -> bool:
        try:
            _with(recipe, what, {name: number})
        except ArgumentError:
            return False
        return True

    def last_taken(end: float) -> float:
        inside, outside = start, end
        for _ in range(0 if taken(end) else 40):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if taken(middle) else (inside, middle)
        return outside if taken(outside) else inside

    low, high = RANGES[what]
    return last_taken(low), last_taken(high)


def _with(recipe: MergeRecipe, what: What, chosen: Mapping[str, float]) -> MergeRecipe:
    """The recipe with the chosen numbers."""
    if what == "weights":
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
        import optuna
    except ModuleNotFoundError as error:
        raise MissingExtra("searching needs optuna: pip install 'sparselet[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
