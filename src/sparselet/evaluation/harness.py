"""Measuring a base model, adapters and merged adapters on tasks."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.apply import apply_temporarily
from sparselet.errors import TaskError
from sparselet.evaluation.metrics import DEFAULT_METRICS, Metric, choose_metrics, measure
from sparselet.expert import Expert, ExpertOrDeltas
from sparselet.generation.generate import generate
from sparselet.generation.prompts import check_prompt, in_prompt
from sparselet.setting_checks import check_at_least, check_settings
from sparselet.tasks.task import Row, Task


@dataclass(frozen=True)
class EvalResult:
    """One model on one task: its scores by metric, such as `rougeL` and `exact_match` × 100, and what was answered."""

    task: str
    scores: Mapping[str, float]
    rows: int
    predictions: tuple[tuple[Row, str], ...]


@dataclass(frozen=True)
class EvalSettings:
    """Settings of `evaluate`. Raises ConfigError for a number below 1, and a prompt without its placeholder."""

    rows: int | None = None
    """Use only the first rows of each task."""
    chat_template: bool | None = None
    """Ask through the tokenizer's chat template, where it has one; by default as the experts were trained, or else yes."""
    max_input_length: int = 2048
    """Tokens of a prompt; longer ones are cut from the left."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    batch_size: int | None = None
    """Rows answered together; by default as many as hold 16,384 tokens with their answers."""
    split: str = "test"
    """The split to evaluate on."""
    prompt: str | None = None
    """Text around each input, {input} in its place; by default an expert's own, if it has one."""

    def __post_init__(self) -> None:
        check_settings(self)
        check_at_least(self, 1, "rows", "max_input_length", "max_new_tokens", "batch_size")
        if self.prompt is not None:
            check_prompt("prompt", self.prompt)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    adapter: ExpertOrDeltas | None = None,
    settings: EvalSettings | None = None,
    progress: Callable[[int], None] | None = None,
    metrics: Sequence[str | Metric] = DEFAULT_METRICS,
) -> list[EvalResult]:
    """Greedy answers to rows of each task, scored.

    adapter: written into the model's weights meanwhile; the base model alone without one.
    progress: called with the number of rows answered since its last call.
    metrics: names of METRICS, `module:function`, or functions of answers and targets that return a number.
    Raises ConfigError for a metric that is unknown or fails, TaskError for two tasks of one name or a split that is not there,
    and what `apply_temporarily` raises for an adapter that does not fit.
    """
    settings, chosen = settings or EvalSettings(), choose_metrics(metrics)
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise TaskError(f"two tasks are called {name}, so their results could not be distinguished; rename a directory.")
    prompt = prompt_for(adapter, settings)
    results = []
    with apply_temporarily(model, adapter) if adapter is not None else contextlib.nullcontext():
        for task in tasks:
            rows = task.rows(settings.split, settings.rows)
            answers = generate(
                model,
                tokenizer,
                [in_prompt(prompt, row.input) for row in rows],
                chat_template=settings.chat_template is not False,
                max_input_length=settings.max_input_length,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                progress=progress,
            )
            targets = [row.target for row in rows]
            results.append(
                EvalResult(
                    task=task.name,
                    scores=measure(chosen, answers, targets, task.name),
                    rows=len(rows),
                    predictions=tuple(zip(rows, answers, strict=True)),
                )
            )
    return results


def prompt_for(adapter: ExpertOrDeltas | None, settings: EvalSettings) -> str | None:
    """The prompt that is put around inputs: that of the settings, else the expert's own, else None."""
    own = adapter.metadata.prompt if isinstance(adapter, Expert) else None
    return own if settings.prompt is None else settings.prompt
