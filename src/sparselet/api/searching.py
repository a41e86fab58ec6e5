"""`search`, `auto_merge`, `tune`: a merge chosen by the merged model's score on validation rows."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.api.merging import MergeResult, write_merge
from sparselet.api.opening import base_of, chat_template_of, open_experts
from sparselet.api.progress import ProgressCallback, StepCounter
from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings
from sparselet.expert import Expert
from sparselet.io.paths import check_output
from sparselet.merging import METHODS, MergeRecipe
from sparselet.merging.default_method import default_method
from sparselet.models import load_model, load_tokenizer
from sparselet.result_table import ResultTable, ShownAsTable
from sparselet.tasks.task import Task, load_task
from sparselet.workflows.auto_merge import AutoResult, AutoSettings
from sparselet.workflows.auto_merge import auto_merge as try_merges
from sparselet.workflows.search import SearchResult, SearchSettings
from sparselet.workflows.search import search as search_recipes
from sparselet.workflows.tune import TuneResult, TuneSettings
from sparselet.workflows.tune import tune as tune_recipe

SEARCH_FILE, AUTO_FILE, TUNE_FILE = "search.json", "auto.json", "tune.json"
VALIDATION = EvalSettings(rows=50, split="validation")
FEW_ROWS = EvalSettings(rows=32, split="validation")

Result = TypeVar("Result")
ExpertsOrRecipe = MergeRecipe | Sequence[str | Path]


@dataclass(frozen=True)
class SearchReport(ShownAsTable):
    """A search, and the merge that it wrote, None without `out`."""

    search: SearchResult
    merge: MergeResult | None

    def table(self) -> ResultTable:
        """A trial a row: the numbers that were tried, and the mean Rouge-L."""
        trials = self.search.trials
        rows = tuple(
            (i, *(f"{value:.3g}" for value in trial.chosen.values()), trial.score) for i, trial in enumerate(trials, 1)
        )
        return ResultTable("Trials of the search", ("trial", *trials[0].chosen, "Rouge-L"), rows)


@dataclass(frozen=True)
class AutoReport(ShownAsTable):
    """Merges that were tried, and the best one as it was written, None without `out`."""

    result: AutoResult
    merge: MergeResult | None

    def table(self) -> ResultTable:
        """A trial a row: method, parameters other than its defaults, factors of the first to the last layer, scores; the best
        is marked."""
        trials, is_loss = self.result.trials, self.result.score == "loss"
        rows = []
        for i, trial in enumerate(trials, 1):
            defaults = METHODS[trial.recipe.method].defaults
            changed = {k: v for k, v in trial.recipe.parameters.items() if v != defaults[k]}
            settings = ", ".join(f"{name}={value}" for name, value in changed.items())
            alpha, beta = trial.recipe.layer_scaling or (1.0, 0.0)
            scaling = f"{alpha:.3g} to {alpha + beta:.3g}" if beta else "" if alpha == 1 else f"{alpha:.3g}"
            scores = [*trial.tasks.values(), trial.score] if trial.score is not None else []
            cells = [f"{score:.3f}" if is_loss else score for score in scores] or ["failed"]
            cells += [""] * (len(trials[0].tasks) + 1 - len(cells))
            mark = "best" if trial is self.result.best else ""
            entries = f"{trial.entries:,}" if trial.entries else ""
            rows.append((i, trial.recipe.method, settings, scaling, entries, *cells, mark))
        title = f"Merges by {'loss' if is_loss else 'Rouge-L'} on validation rows"
        columns = ("trial", "method", "parameters", "factor", "entries", *trials[0].tasks, "mean", "")
        return ResultTable(title, columns, tuple(rows))


@dataclass(frozen=True)
class TuneReport(ShownAsTable):
    """A merge with tuned weights, as it was written, None without `out`."""

    result: TuneResult
    merge: MergeResult | None

    def table(self) -> ResultTable:
        """Loss of the validation targets by task, before and after."""
        rows = []
        for name, losses in (("start", self.result.before), ("tuned", self.result.after)):
            rows.append((name, *(f"{loss:.4f}" for loss in (*losses.values(), sum(losses.values()) / len(losses)))))
        return ResultTable("Loss on validation rows", ("merge", *self.result.before, "mean"), tuple(rows))


def search(
    recipe: ExpertsOrRecipe,
    validation: Sequence[str | Path | Task],
    settings: SearchSettings | None = None,
    *,
    base: str | None = None,
    eval_settings: EvalSettings = VALIDATION,
    out: str | Path | None = None,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> SearchReport:
    """Try merges and keep the one whose answers to validation rows score best.

        sl.search(["expert-a", "expert-b"], ["task-a", "task-b"], base="org/model", out="merged").search.recipe

    recipe: where the search starts; experts alone are merged by overlap. validation: tasks, whose validation split is used.
    settings: what is chosen, and how many trials there are; by default the weights, in 20 trials.
    base: the base model, by default the recipe's, or the one that the experts record. eval_settings: how the merged models
        answer; by default 50 rows a task, as the experts were trained.
    out: write the best merge to this directory, with its recipe and all trials. progress: reports trials.
    Raises ConfigError, and what merging and evaluating raise.
    """
    settings = settings or SearchSettings()
    setup = _prepare(recipe, validation, base, eval_settings, out)
    result = setup.run(search_recipes, settings, settings.trials, progress)
    if out is None:
        return SearchReport(result, None)
    trials = {SEARCH_FILE: {"trials": [asdict(trial) for trial in result.trials]}}
    return SearchReport(result, write_merge(result.recipe, setup.experts, out, workers, files=trials))


def auto_merge(
    recipe: ExpertsOrRecipe,
    validation: Sequence[str | Path | Task],
    settings: AutoSettings | None = None,
    *,
    base: str | None = None,
    eval_settings: EvalSettings = FEW_ROWS,
    out: str | Path | None = None,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> AutoReport:
    """Try the merge methods that suit the experts, each with a few settings, and keep the best on validation rows.

        print(sl.auto_merge(["expert-a", "their/lora"], ["task-a", "task-b"], out="merged"))

    recipe: experts, or the merge that is tried first, by default the one of `merge`; methods and scales are tried with its
        weights.
    validation, base, progress: as in `search`. settings: the number of trials, the time, and what is compared.
    eval_settings: by default 32 rows a task.
    out: write the best merge to this directory, with its recipe, which runs again, and all trials in `auto.json`.
    Raises ConfigError, and what merging by the recipe and evaluating raise.
    """
    settings = settings or AutoSettings()
    setup = _prepare(recipe, validation, base, eval_settings, out)
    if not isinstance(recipe, MergeRecipe):
        setup = replace(setup, recipe=replace(setup.recipe, method=default_method(setup.experts)))
    result = setup.run(try_merges, settings, settings.trials, progress)
    if out is None:
        return AutoReport(result, None)
    merged = write_merge(result.best.recipe, setup.experts, out, workers, files={AUTO_FILE: result.as_json()})
    return AutoReport(result, merged)


def tune(
    recipe: ExpertsOrRecipe,
    validation: Sequence[str | Path | Task],
    settings: TuneSettings | None = None,
    *,
    base: str | None = None,
    eval_settings: EvalSettings = FEW_ROWS,
    out: str | Path | None = None,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> TuneReport:
    """Tune a weight for each expert and layer by gradient steps on the targets of validation rows.

        sl.tune(["expert-a", "expert-b"], ["task-a", "task-b"], out="merged").result.recipe

    recipe: experts, which overlap merges, or a merge by a method that is linear in its weights.
    validation, base, eval_settings, progress: as in `auto_merge`; progress reports steps.
    out: write the merge with its recipe, which has weights by pattern, and the losses in `tune.json`.
    Raises ConfigError, and what merging raises.
    """
    settings = settings or TuneSettings()
    setup = _prepare(recipe, validation, base, eval_settings, out)
    result = setup.run(tune_recipe, settings, settings.steps, progress)
    if out is None:
        return TuneReport(result, None)
    return TuneReport(result, write_merge(result.recipe, setup.experts, out, workers, files={TUNE_FILE: result.as_json()}))


@dataclass(frozen=True)
class _ValidationSetup:
    """What merges are tried and measured with."""

    recipe: MergeRecipe
    experts: list[Expert]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tasks: list[Task]
    eval_settings: EvalSettings

    def run(self, choose: Callable[..., Result], settings: Any, steps: int, progress: ProgressCallback | None) -> Result:
        """Choose by one of the workflows, which reports as many steps."""
        measured = (self.model, self.tokenizer, self.tasks, self.eval_settings)
        counter = StepCounter(steps, progress)
        return choose(self.recipe, settings, *measured, experts=self.experts, progress=counter.advance)


def _prepare(
    recipe: ExpertsOrRecipe,
    validation: Sequence[str | Path | Task],
    base: str | None,
    eval_settings: EvalSettings,
    out: str | Path | None,
) -> _ValidationSetup:
    """Check the output, open the experts, and load tasks and model. Raises ConfigError, and what these raise."""
    if out is not None:
        check_output(out)
    if not isinstance(recipe, MergeRecipe):
        recipe = MergeRecipe(tuple(map(str, recipe)))
    if not validation:
        raise ConfigError("a merge is chosen by validation tasks; set `validation`.")
    name = base or recipe.model or base_of(open_experts(recipe.experts))
    if name is None:
        raise ConfigError("the experts record no base model; set `base`.")
    recipe = replace(recipe, model=name)
    experts = open_experts(recipe.experts, name)
    if eval_settings.chat_template is None:
        eval_settings = replace(eval_settings, chat_template=chat_template_of(experts))
    split = (eval_settings.split,)
    tasks = [source if isinstance(source, Task) else load_task(source, split) for source in validation]
    return _ValidationSetup(recipe, experts, load_model(name), load_tokenizer(name), tasks, eval_settings)
