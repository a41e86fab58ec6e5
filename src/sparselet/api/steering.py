"""`fit_steering` and `evaluate_steering`: a steering vector from pairs of texts, and what it does to answers."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparselet.api.evaluation import TITLES, load_tasks
from sparselet.api.opening import chat_template_of, open_experts, read_checked
from sparselet.api.progress import ProgressCallback, StepCounter
from sparselet.apply import apply_temporarily
from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings
from sparselet.evaluation.metrics import DEFAULT_METRICS, Metric, choose_metrics
from sparselet.expert import Expert
from sparselet.io.paths import check_output
from sparselet.merging.engine.plan import ExpertSource
from sparselet.models import load_model, load_tokenizer
from sparselet.result_table import ResultTable, ShownAsTable
from sparselet.steering import SteeringVector
from sparselet.tasks.task import Task
from sparselet.workflows.steering import Pair, SteeredScore, SteerSettings, fit_steps, fit_vector, read_pairs, steered_scores


@dataclass(frozen=True)
class SteeringReport(ShownAsTable):
    """Answers without a vector, with it, with its opposite, and with random ones. metrics: their names."""

    arms: tuple[SteeredScore, ...]
    metrics: tuple[str, ...]

    def table(self) -> ResultTable:
        """An arm a row: the mean length of its answers, and their scores."""
        before = self.arms[0].tokens
        rows = []
        for arm in self.arms:
            change = f"{100 * (arm.tokens / before - 1):+.1f} %" if before and arm is not self.arms[0] else ""
            rows.append((arm.arm, f"{arm.strength:.3g}", arm.tokens, change, *(arm.mean(name) for name in self.metrics)))
        names = (TITLES.get(name, name) for name in self.metrics)
        count = sum(result.rows for result in self.arms[0].results)
        return ResultTable(f"Steering, {count} rows", ("vector", "strength", "answer tokens", "", *names), tuple(rows))

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        arms = [
            {
                "arm": arm.arm,
                "strength": arm.strength,
                "tokens": arm.tokens,
                "tasks": {result.task: {**result.scores, "rows": result.rows} for result in arm.results},
            }
            for arm in self.arms
        ]
        return {"arms": arms}


def fit_steering(
    pairs: str | Path | Sequence[Pair],
    model: str,
    out: str | Path | None = None,
    settings: SteerSettings | None = None,
    *,
    expert: ExpertSource | None = None,
    chat_template: bool | None = None,
    dtype: str = "float32",
    progress: ProgressCallback | None = None,
) -> SteeringVector:
    """Fit a steering vector to pairs of a concise and a verbose answer; added while answering, it makes answers concise.

        vector = sl.fit_steering("pairs.jsonl", "org/model", "concise")
        with sl.steered(model, vector): ...

    pairs: a file of rows with the fields of `Pair` (docs/steering.md), or `Pair`s. model: the base model. expert: applied to
    the model meanwhile, for a vector that steers it. out: a directory to write to. settings: the layer and the KL bound.
    chat_template: of prompts, by default as the expert was trained, or else yes. progress: reports steps.
    Raises TaskError (a bad row), ArgumentError (a layer that there is not), ConfigError, ModelError, and what opening and
    applying the expert raise.
    """
    if out is not None:
        check_output(out)
    rows = read_pairs(pairs) if isinstance(pairs, str | Path) else list(pairs)
    opened = _opened(expert, model)
    template = chat_template_of([] if opened is None else [opened]) if chat_template is None else chat_template
    loaded, tokenizer = load_model(model, dtype), load_tokenizer(model)
    settings = settings or SteerSettings()
    counter = StepCounter(fit_steps(loaded, len(rows), settings), progress)
    with apply_temporarily(loaded, opened) if opened is not None else contextlib.nullcontext():
        vector = fit_vector(
            loaded,
            tokenizer,
            rows,
            settings,
            chat_template=template,
            base=model,
            progress=counter.advance,
        )
    if opened is not None:
        vector = replace(vector, record={**vector.record, "expert": opened.metadata.task})
    if out is not None:
        vector.save(out)
    return vector


def evaluate_steering(
    vector: SteeringVector | str | Path,
    task: str | Path | Task | Sequence[str | Path | Task],
    *,
    model: str | None = None,
    expert: ExpertSource | None = None,
    settings: EvalSettings | None = None,
    metrics: Sequence[str | Metric] = DEFAULT_METRICS,
    columns: Mapping[str, str] | None = None,
    dtype: str = "float32",
    draws: int = 1,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> SteeringReport:
    """Measure length and scores of answers without the vector, with it, with its opposite, and with random ones.

        sl.evaluate_steering("concise", "my-task", expert="my-expert").arms[1].tokens

    model: the base model, by default the one that the vector records. expert: applied to it meanwhile. draws, seed: of the
    random vectors, which have the vector's length. The others are those of `evaluate`, and so are most errors; WrongBase,
    ShapeMismatch and ArgumentError for a vector that does not fit the model.
    """
    vector = vector if isinstance(vector, SteeringVector) else SteeringVector.load(vector)
    settings, names = settings or EvalSettings(), tuple(choose_metrics(metrics))
    model = model or vector.base
    if model is None:
        raise ConfigError("the steering vector records no base model; set `model`.")
    opened = _opened(expert, model)
    if settings.chat_template is None:
        settings = replace(settings, chat_template=chat_template_of([] if opened is None else [opened]))
    tasks = load_tasks(task, settings.split, columns)
    loaded, tokenizer = load_model(model, dtype), load_tokenizer(model)
    rows = sum(len(each.rows(settings.split, settings.rows)) for each in tasks)
    counter = StepCounter((3 + draws) * rows, progress)
    with apply_temporarily(loaded, opened) if opened is not None else contextlib.nullcontext():
        arms = steered_scores(
            loaded,
            tokenizer,
            vector,
            tasks,
            settings,
            metrics=metrics,
            draws=draws,
            seed=seed,
            progress=counter.advance,
        )
    return SteeringReport(tuple(arms), names)


def _opened(expert: ExpertSource | None, model: str) -> Expert | None:
    return None if expert is None else read_checked(open_experts([expert], model)[0])
