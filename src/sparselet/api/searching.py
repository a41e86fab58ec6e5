"""`search`: weights or parameters of a merge, chosen by the merged model's score on validation rows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sparselet.api.merging import MergeResult, write_merge
from sparselet.api.opening import chat_template_of, open_experts
from sparselet.api.progress import ProgressCallback, StepCounter
from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings
from sparselet.io.paths import check_output
from sparselet.merging import MergeRecipe
from sparselet.models import load_model, load_tokenizer
from sparselet.result_table import ResultTable, ShownAsTable
from sparselet.tasks.task import Task, load_task
from sparselet.workflows.search import SearchResult, SearchSettings
from sparselet.workflows.search import search as search_recipes

SEARCH_FILE = "search.json"
VALIDATION = EvalSettings(rows=50, split="validation")


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


def search(
    recipe: MergeRecipe | Sequence[str | Path],
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
    base: the base model, by default the recipe's. eval_settings: how the merged models answer; by default 50 rows a task, as
        the experts were trained.
    out: write the best merge to this directory, with its recipe and all trials. progress: reports trials.
    Raises ConfigError, and what merging and evaluating raise.
    """
    if out is not None:
        check_output(out)
    if not isinstance(recipe, MergeRecipe):
        recipe = MergeRecipe(tuple(map(str, recipe)))
    recipe = replace(recipe, model=base or recipe.model)
    if recipe.model is None or not validation:
        raise ConfigError("a search needs validation tasks and the base model; set `validation` and `base`.")
    settings = settings or SearchSettings()
    experts = open_experts(recipe.experts, recipe.model)
    if eval_settings.chat_template is None:
        eval_settings = replace(eval_settings, chat_template=chat_template_of(experts))
    split = (eval_settings.split,)
    tasks = [source if isinstance(source, Task) else load_task(source, split) for source in validation]
    model, tokenizer = load_model(recipe.model), load_tokenizer(recipe.model)
    counter = StepCounter(settings.trials, progress)
    result = search_recipes(recipe, settings, model, tokenizer, tasks, eval_settings, experts=experts, progress=counter.advance)
    if out is None:
        return SearchReport(result, None)
    trials = {SEARCH_FILE: {"trials": [asdict(trial) for trial in result.trials]}}
    return SearchReport(result, write_merge(result.recipe, experts, out, workers, files=trials))
