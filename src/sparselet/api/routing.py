"""`route`: the expert that a prompt belongs to; `evaluate_routed`: a library of experts that answers by routing."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from sparselet.adapter import require_profile
from sparselet.api.opening import base_of, chat_template_of, name_of, open_experts, read_checked
from sparselet.api.progress import ProgressCallback, StepCounter
from sparselet.errors import ArgumentError
from sparselet.evaluation import EvalSettings
from sparselet.evaluation.metrics import DEFAULT_METRICS, Metric, choose_metrics, measure
from sparselet.expert import Expert
from sparselet.fingerprint import fingerprint_weight, require_same_base
from sparselet.merging import merge
from sparselet.merging.engine.plan import ExpertSource
from sparselet.models import PACKAGED, load_model, load_tokenizer
from sparselet.names import Names
from sparselet.profiles.profile import Profile
from sparselet.profiles.router import Route, Router
from sparselet.result_table import ResultTable, ShownAsTable
from sparselet.tasks.rows import Prompt
from sparselet.tasks.task import Task, load_task
from sparselet.workflows.routing import RouteSettings, answer_prompts, answering_experts, route_prompts


@dataclass(frozen=True)
class RoutedTask:
    """One task, answered by routing.

    scores, oracle: by metric, of the routed answers, and of those of the task's own expert; None if no expert is of the task.
    accuracy: share of the prompts whose nearest expert is the task's; None without one. unsure: share below the margin.
    """

    task: str
    rows: int
    scores: Mapping[str, float]
    oracle: Mapping[str, float] | None
    accuracy: float | None
    unsure: float


@dataclass(frozen=True)
class RoutedEvaluation(ShownAsTable):
    """A library on tasks. seconds: of routing one prompt, the base model's forward pass included."""

    tasks: tuple[RoutedTask, ...]
    metrics: tuple[str, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {"seconds_a_prompt": self.seconds, "tasks": {task.task: vars(task) for task in self.tasks}}

    def table(self) -> ResultTable:
        """A task a row, then mean and worst task; shares in percent, scores by the first metric."""
        rows: list[tuple[object, ...]] = [(t.task, t.rows, *self._cells(t)) for t in self.tasks]
        cells = [self._cells(t) for t in self.tasks]
        columns = list(zip(*cells, strict=True))
        counts = sum(t.rows for t in self.tasks)
        means = [[value for value in column if isinstance(value, float)] for column in columns]
        rows.append(("mean", counts, *(sum(values) / len(values) if values else "" for values in means)))
        rows.append(("worst", "", *(min(values) if values else "" for values in means[:4]), max(means[4])))
        title = f"Routed, {1000 * self.seconds:.0f} ms a prompt"
        return ResultTable(title, ("task", "rows", "score", "own expert", "% of it", "% right", "% unsure"), tuple(rows))

    def _cells(self, task: RoutedTask) -> tuple[float | str, ...]:
        score = task.scores[self.metrics[0]]
        own = "" if task.oracle is None else task.oracle[self.metrics[0]]
        share = 100 * score / own if isinstance(own, float) and own else ""
        return score, own, share, "" if task.accuracy is None else 100 * task.accuracy, 100 * task.unsure


def route(
    prompts: Sequence[Prompt],
    experts: Sequence[ExpertSource],
    *,
    base: str | None = None,
    settings: RouteSettings | None = None,
    chat_template: bool | None = None,
    dtype: str = "float32",
) -> list[Route]:
    """The expert that each prompt belongs to, by the experts' profiles and one forward pass of the base model a prompt.

        sl.route(["What is the opposite of warm?"], ["antonyms", "trec"])[0].expert

    experts: with profiles; each is called by its path, hub name or task. base: the base model; by default the one they record.
    chat_template: by default as the experts were trained.
    Raises MissingProfile, WrongBase, ArgumentError before the model is loaded; ModelError, TaskError (a prompt).
    """
    named, router, name = _library(experts, base, settings or RouteSettings())
    template = chat_template_of(named.values()) if chat_template is None else chat_template
    model, tokenizer = load_model(name, dtype), load_tokenizer(name)
    _require_base(model, named)
    return route_prompts(router, model, tokenizer, prompts, template, EvalSettings().max_input_length)


def evaluate_routed(
    experts: Sequence[ExpertSource],
    tasks: str | Path | Task | Sequence[str | Path | Task],
    *,
    model: str | None = None,
    settings: EvalSettings | None = None,
    routing: RouteSettings | None = None,
    metrics: Sequence[str | Metric] = DEFAULT_METRICS,
    columns: Mapping[str, str] | None = None,
    dtype: str = "float32",
    progress: ProgressCallback | None = None,
) -> RoutedEvaluation:
    """Measure a library of experts on tasks: each prompt is answered by the expert that it is routed to, and beside that by the
    task's own expert, the one whose profile has the task's name.

    Arguments as of `evaluate`. Raises what `route` and `evaluate` raise.
    """
    settings, routing, chosen = settings or EvalSettings(), routing or RouteSettings(), choose_metrics(metrics)
    named, router, name = _library(experts, model, routing)
    template = chat_template_of(named.values()) if settings.chat_template is None else settings.chat_template
    sources = [tasks] if isinstance(tasks, str | Path | Task) else list(tasks)
    loaded_tasks = [t if isinstance(t, Task) else load_task(str(t), (settings.split,), columns) for t in sources]
    loaded, tokenizer = load_model(name, dtype), load_tokenizer(name)
    _require_base(loaded, named)
    own = _experts_of_tasks(named)
    rows = [(task.name, row) for task in loaded_tasks for row in task.rows(settings.split, settings.rows)]
    started = time.perf_counter()
    routes = route_prompts(router, loaded, tokenizer, [row.input for _, row in rows], template, settings.max_input_length)
    seconds = (time.perf_counter() - started) / max(1, len(rows))
    answerers = [answering_experts(r, routing.fallback) for r in routes]
    work: dict[tuple[str, ...], dict[int, str]] = {}  # by who answers: the answer of each row
    for i, (task, _) in enumerate(rows):
        for who in {answerers[i], *([(own[task],)] if task in own else [])}:
            work.setdefault(who, {})[i] = ""
    counter = StepCounter(sum(map(len, work.values())), progress)
    for who, answers in work.items():
        prompts = [rows[i][1].input for i in answers]
        adapter = None if not who else named[who[0]] if len(who) == 1 else merge([named[key] for key in who])
        texts = answer_prompts(loaded, tokenizer, adapter, prompts, settings, template, counter.advance)
        answers.update(zip(list(answers), texts, strict=True))
    results = []
    for task in loaded_tasks:
        at = [i for i, (of, _) in enumerate(rows) if of == task.name]
        targets = [rows[i][1].target for i in at]
        expert, routed = own.get(task.name), [work[answerers[i]][i] for i in at]
        results.append(
            RoutedTask(
                task.name,
                len(at),
                measure(chosen, routed, targets, task.name),
                None if expert is None else measure(chosen, [work[expert,][i] for i in at], targets, task.name),
                None if expert is None else sum(routes[i].expert == expert for i in at) / len(at),
                sum(routes[i].unsure for i in at) / len(at),
            )
        )
    return RoutedEvaluation(tuple(results), tuple(chosen), seconds)


def _library(
    experts: Sequence[ExpertSource], base: str | None, settings: RouteSettings
) -> tuple[dict[str, Expert], Router, str]:
    """The experts by name, their router, and the base model's name. Raises MissingProfile, WrongBase, ArgumentError."""
    name = base or base_of(open_experts(experts)) or PACKAGED
    named: dict[str, Expert] = {}
    for source, expert in zip(experts, open_experts(experts, name), strict=True):
        key = name_of(source)
        if key in named:
            raise ArgumentError(f"two experts are called {key}; name each once.")
        named[key] = read_checked(expert)
    router = Router({key: _profile_of(e, key) for key, e in named.items()}, settings.rule, settings.margin)
    return named, router, name


def _profile_of(expert: Expert, name: str) -> Profile:
    return require_profile(expert, name, "a router needs a profile of each expert")


def _experts_of_tasks(experts: Mapping[str, Expert]) -> dict[str, str]:
    """The expert of each task, by the task's name in its profile, which for several tasks is their names joined by "+"."""
    tasks = {key: _profile_of(expert, key).task or "" for key, expert in experts.items()}
    parts = {part: key for key, task in tasks.items() for part in task.split("+")}
    return parts | {task: key for key, task in tasks.items()}


def _require_base(model: PreTrainedModel, experts: Mapping[str, Expert]) -> None:
    """Raise WrongBase for a profile of another base model."""
    layers = Names(model).layers
    for key, expert in experts.items():
        prints = _profile_of(expert, key).fingerprints
        own = {name: fingerprint_weight(layers[name].parameter) for name in prints if name in layers}
        require_same_base(own, prints, f"the base model and the profile of {key}")
