"""`evaluate`: models and experts on tasks."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparselet.api.opening import base_of, chat_template_of, name_of, open_experts, read_checked
from sparselet.api.progress import ProgressCallback, StepCounter
from sparselet.attention import AttentionPattern, SparseAttention, parse_pattern, sparse_attention
from sparselet.evaluation import EvalResult, EvalSettings
from sparselet.evaluation import evaluate as evaluate_on_model
from sparselet.evaluation.metrics import DEFAULT_METRICS, Metric, choose_metrics
from sparselet.expert import Expert
from sparselet.io.atomic import write_text
from sparselet.merging.engine.plan import ExpertSource
from sparselet.models import PACKAGED, load_model, load_tokenizer
from sparselet.result_table import ResultTable, ShownAsTable
from sparselet.steering import SteeringVector, steered
from sparselet.tasks.task import Task, load_task

TITLES = {"rougeL": "Rouge-L", "exact_match": "exact match", "chrf": "chrF"}


@dataclass(frozen=True)
class Evaluation(ShownAsTable):
    """Models on tasks: the results of each model by name, and the names of the metrics, the first one shown first.

    attention: what sparse attention used of the pairs of dense attention, in prompts and in answers.
    """

    results: Mapping[str, tuple[EvalResult, ...]]
    metrics: tuple[str, ...]
    attention: SparseAttention | None = None

    @property
    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """`{model: {task: {metric: score}}}`; `rows` counts the rows of a task."""
        return {
            name: {result.task: {**result.scores, "rows": result.rows} for result in results}
            for name, results in self.results.items()
        }

    def table(self) -> ResultTable:
        """A model a row, a task a column: the first metric, and the others in parentheses."""
        first, *others = (TITLES.get(name, name) for name in self.metrics)
        tasks = [result.task for result in next(iter(self.results.values()))]
        rows = [
            (
                name,
                *(self._cell(result) for result in results),
                sum(result.scores[self.metrics[0]] for result in results) / len(results),
            )
            for name, results in self.results.items()
        ]
        count = sum(result.rows for result in next(iter(self.results.values())))
        columns = (f"{first} ({', '.join(others)})" if others else first, *tasks, "mean")
        title = f"{count} test rows"
        if self.attention is not None:
            used = (100 * self.attention.prefill.density, 100 * self.attention.decode.density)
            title += (
                f"; attention {self.attention.pattern.name}: {used[0]:.3g} % of pairs in prompts, {used[1]:.3g} % in answers"
            )
        return ResultTable(title, columns, tuple(rows))

    def write_predictions(self, file: str | Path) -> None:
        """Write every answer as JSON lines: model, task, the row, answer. Raises WriteFailed."""
        lines = [
            {"model": name, "task": result.task, **row.as_json(), "answer": answer}
            for name, results in self.results.items()
            for result in results
            for row, answer in result.predictions
        ]
        write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def _cell(self, result: EvalResult) -> str:
        first, *others = (result.scores[name] for name in self.metrics)
        return f"{first:.1f} ({', '.join(f'{score:.0f}' for score in others)})" if others else f"{first:.1f}"


def evaluate(
    experts: ExpertSource | Sequence[ExpertSource] | None,
    tasks: str | Path | Task | Sequence[str | Path | Task],
    *,
    model: str | None = None,
    include_base: bool | None = None,
    settings: EvalSettings | None = None,
    metrics: Sequence[str | Metric] = DEFAULT_METRICS,
    columns: Mapping[str, str] | None = None,
    dtype: str = "float32",
    attention: str | AttentionPattern | None = None,
    steer: SteeringVector | str | Path | None = None,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Measure greedy answers of experts, each written into the base model for its turn, to rows of tasks.

        sl.evaluate(merged, ["trec", "sst2"])
        sl.evaluate(None, "trec", model="merged-checkpoint")

    experts: one or several, in memory or by path or hub name; None or an empty list measures the model alone.
    tasks: directories, `builtin:NAME`, hub data sets, or `Task` objects, one or several.
    model: the base model or a merged checkpoint; by default the base model that the experts record.
    include_base: measure the model without an expert too; by default if there are no experts.
    settings: which rows, and how they are answered; by default as the experts were trained.
    metrics: names, `module:function`, or functions of answers and targets. columns: the names of `input` and `target` in rows.
    attention: a pattern of sparse attention, such as "quest" or "block:top=32" (`sparselet.attention`); dense by default.
    steer: a steering vector, added while the experts answer. progress: reports rows.
    Raises ConfigError, TaskError, ModelError, ArgumentError, and what opening and applying an expert, and `steered`, raise.
    """
    settings = settings or EvalSettings()
    pattern = parse_pattern(attention) if isinstance(attention, str) else attention
    names = list(choose_metrics(metrics))  # refused before anything is loaded
    vector = SteeringVector.load(steer) if isinstance(steer, str | Path) else steer
    sources = [] if experts is None else [experts] if isinstance(experts, str | Path | Mapping | Expert) else list(experts)
    model = model or (base_of(open_experts(sources)) if sources else None) or PACKAGED
    opened = [read_checked(expert) for expert in open_experts(sources, model)] if sources else []
    if settings.chat_template is None:
        settings = replace(settings, chat_template=chat_template_of(opened))
    loaded_tasks = load_tasks(tasks, settings.split, columns)
    loaded, tokenizer = load_model(model, dtype), load_tokenizer(model)
    models: dict[str, Expert | None] = {}
    if include_base or (include_base is None and not opened):
        models[model] = None
    for source, expert in zip(sources, opened, strict=True):
        models[_unused(name_of(source), models)] = expert
    row_count = sum(len(task.rows(settings.split, settings.rows)) for task in loaded_tasks)
    counter = StepCounter(len(models) * row_count, progress)
    with (
        sparse_attention(loaded, pattern) if pattern else contextlib.nullcontext() as counts,
        steered(loaded, vector) if vector is not None else contextlib.nullcontext(),
    ):
        results = {
            name: tuple(evaluate_on_model(loaded, tokenizer, loaded_tasks, expert, settings, counter.advance, metrics))
            for name, expert in models.items()
        }
    return Evaluation(results, tuple(names), counts)


def load_tasks(
    tasks: str | Path | Task | Sequence[str | Path | Task], split: str, columns: Mapping[str, str] | None
) -> list[Task]:
    """The tasks by name, with one split. Raises TaskError."""
    sources = [tasks] if isinstance(tasks, str | Path | Task) else list(tasks)
    return [task if isinstance(task, Task) else load_task(str(task), (split,), columns) for task in sources]


def _unused(name: str, names: Mapping[str, object]) -> str:
    """The name, with a number if it is taken."""
    return next(text for text in (name, *(f"{name} ({i})" for i in range(2, len(names) + 3))) if text not in names)
