"""Running jobs in this process: training, merging, evaluating. The base model stays in memory from job to job."""

import contextlib
import ctypes
import gc
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sparselet.adapter import WEIGHTS_FILE, AdapterFile
from sparselet.apply import apply_temporarily
from sparselet.errors import ConfigError, ModelError, SparseletError, TaskError, WriteFailed
from sparselet.evaluation import EvalResult, evaluate
from sparselet.evaluation.metrics import rouge_l_of_each
from sparselet.expert import Expert, ExpertOrDeltas
from sparselet.formats import open_expert
from sparselet.formats.checkpoint.model_files import MODEL_CONFIG
from sparselet.io.atomic import write_text
from sparselet.io.json_files import read_object
from sparselet.io.tensor_files import TensorFile
from sparselet.masks import layer_of
from sparselet.merging import merge, merge_to
from sparselet.models import load_model, load_tokenizer, local_path, model_fingerprint
from sparselet.studies.analyses import AnalysisContext, run_analysis
from sparselet.studies.engine.cost import CostMeter
from sparselet.studies.engine.jobs import EmitEvent, Event, Job
from sparselet.studies.engine.store import ANSWERS, EXPERT, Store
from sparselet.studies.engine.unit import AnalysisUnit, EvalUnit, MergeUnit, ModelSettings, TrainUnit, Unit
from sparselet.studies.engine.unit_results import (
    AnalysisUnitResult,
    EvalUnitResult,
    MergeUnitResult,
    TrainUnitResult,
    UnitCost,
    UnitResult,
)
from sparselet.tasks.task import Task, load_task
from sparselet.training import TrainSettings, train
from sparselet.training.run_directory import RUN_FILE, work_directory

logger = logging.getLogger("sparselet")

Base = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class StudySources:
    """A study's inputs on this machine: the directory or built-in name of each task; the directory or name of the model."""

    tasks: Mapping[str, str]
    model: str


class JobRunner:
    """Runs the jobs of one study in this process, one after the other."""

    def __init__(self, store: Store, sources: StudySources) -> None:
        self.store, self.sources = store, sources
        self._loaded: tuple[tuple[str, str], PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._tasks: dict[tuple[str, tuple[str, ...]], Task] = {}

    def run(self, job: Job, emit: EmitEvent) -> None:
        """Do the units of a job that are not done. Errors are emitted as events, not raised."""
        remaining = job.without({unit.key for unit in job.units if self.store.result(unit) is not None})
        for unit in job.units:
            if unit not in remaining.units:
                emit(Event("done", unit.key))
        ended: set[str] = set()

        def emit_and_note(event: Event) -> None:
            if event.state in ("done", "failed"):
                ended.add(event.key)
            emit(event)

        try:
            if remaining.units:
                self._run_units(remaining.units, emit_and_note)
        except Exception as error:  # any: the other jobs must go on
            for unit in remaining.units:
                if unit.key not in ended:
                    emit(Event("failed", unit.key, error=describe_error(error)))
        finally:
            release_memory()

    def _run_units(self, units: tuple[Unit, ...], emit: EmitEvent) -> None:
        evaluations = [unit for unit in units if isinstance(unit, EvalUnit)]
        if evaluations:
            self._evaluate_all(evaluations, emit)
            return
        (unit,) = units
        emit(Event("started", unit.key))
        meter = CostMeter()
        directory = self.store.directory(unit)
        result: UnitResult
        if isinstance(unit, TrainUnit):
            result = self._train(unit, directory / EXPERT, emit)
        elif isinstance(unit, AnalysisUnit):
            result = self._analyse(unit, emit)
        else:
            assert isinstance(unit, MergeUnit)
            result = self._merge(unit, directory / EXPERT)
        self.store.publish(unit, result, meter.read(_size(directory)))
        emit(Event("done", unit.key))

    def _train(self, unit: TrainUnit, output: Path, emit: EmitEvent) -> TrainUnitResult:
        """Train, or resume. A complete output of an earlier attempt is kept."""
        base = self._base(unit.model)
        if not output.exists() or work_directory(output).exists():
            steps = _StepProgress(lambda fraction: emit(Event("progress", unit.key, fraction)))
            _train_or_resume(self.train_settings(unit), output, base, steps)
        return trained_result(output, base[0])

    def _merge(self, unit: MergeUnit, output: Path) -> MergeUnitResult:
        if not output.exists():
            experts = [self._open(expert) for expert in unit.experts]
            merge_to(output, experts, unit.method, parameters=dict(unit.parameters), workers=torch.get_num_threads())
        return sparse_result(AdapterFile(output))

    def _analyse(self, unit: AnalysisUnit, emit: EmitEvent) -> AnalysisUnitResult:
        model, tokenizer = self._base(unit.model)
        context = AnalysisContext(
            model,
            tokenizer,
            experts=[self._open(expert) for expert in unit.experts],
            tasks=[self._task(name, unit.splits, fingerprint) for name, fingerprint in unit.data.items()],
            progress=lambda fraction: emit(Event("progress", unit.key, fraction)),
        )
        return AnalysisUnitResult(run_analysis(unit.analysis, context, unit.settings))

    def _evaluate_all(self, units: list[EvalUnit], emit: EmitEvent) -> None:
        """Evaluations of one subject, which is written into the model once."""
        emit(Event("started", units[0].key))
        with contextlib.ExitStack() as stack:
            meter = CostMeter()
            model, tokenizer = self._base(units[0].model)
            subject = self._subject(units[0])
            if subject is not None:
                stack.enter_context(apply_temporarily(model, subject))
            preparation = meter.read()
            for unit in units:
                emit(Event("started", unit.key))
                try:
                    meter = CostMeter()
                    result, answers = self._score(unit, model, tokenizer, emit)
                    write_text(self.store.directory(unit) / ANSWERS, answers)
                    self.store.publish(unit, result, _add_costs(meter.read(), preparation))
                    preparation = replace(preparation, seconds=0.0, cpu_seconds=0.0)  # its time counts once
                except Exception as error:
                    emit(Event("failed", unit.key, error=describe_error(error)))
                else:
                    emit(Event("done", unit.key))

    def _score(
        self, unit: EvalUnit, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, emit: EmitEvent
    ) -> tuple[EvalUnitResult, str]:
        """A unit's result, and its answers as JSON lines. model: has the subject in its weights."""
        settings = unit.settings
        task = self._task(unit.task, (settings.split,), unit.data)
        total, answered = len(task.rows(settings.split, settings.rows)), 0

        def progress(count: int) -> None:
            nonlocal answered
            answered += count
            emit(Event("progress", unit.key, answered / total))

        (result,) = evaluate(model, tokenizer, [task], None, settings, progress)
        return scored_result(result), answer_lines(result)

    def _base(self, settings: ModelSettings) -> Base:
        """The base model, loaded once, and set to compute with the unit's threads. Raises ModelError."""
        torch.set_num_threads(settings.threads)
        source = (self.sources.model, settings.dtype)
        if self._loaded is None or self._loaded[0] != source:
            self._loaded = None  # first, so that no two are in memory
            fingerprint = model_fingerprint(self.sources.model)
            if fingerprint != settings.base:
                raise ModelError(
                    f"{self.sources.model}: its files have fingerprint {fingerprint}, the study was planned with "
                    f"{settings.base}."
                )
            self._loaded = (source, load_model(*source), load_tokenizer(self.sources.model))
        return self._loaded[1:]

    def _task(self, name: str, splits: tuple[str, ...], fingerprint: str) -> Task:
        """Splits of a task, read once and checked to have the rows of the plan. Raises ConfigError, TaskError."""
        if (name, splits) not in self._tasks:
            if name not in self.sources.tasks:
                raise ConfigError(f"task {name} has no source; there are {', '.join(self.sources.tasks) or 'none'}.")
            self._tasks[name, splits] = load_task(self.sources.tasks[name], splits)
        task = self._tasks[name, splits]
        if task.fingerprint() != fingerprint:
            raise TaskError(
                f"{self.sources.tasks[name]}: the rows of {' and '.join(splits)} have fingerprint {task.fingerprint()}, the "
                f"study was planned with {fingerprint}."
            )
        return task

    def train_settings(self, unit: TrainUnit) -> TrainSettings:
        """The unit's settings, with this machine's sources for its names. Raises ConfigError, TaskError."""
        for name in unit.settings.tasks:
            self._task(name, ("train", "validation"), unit.data[name])
        return replace(
            unit.settings,
            model=self.sources.model,
            task=tuple(self.sources.tasks[name] for name in unit.settings.tasks),
            init_from=str(self.store.expert(unit.initial.key)) if unit.initial else None,
        )

    def _subject(self, unit: EvalUnit) -> ExpertOrDeltas | None:
        """The deltas that an evaluation writes into the base model; None for the base model alone."""
        if unit.subject is None:
            return None
        subject = self._open(unit.subject)
        if unit.mask is None:
            return subject
        mask = self._open(unit.mask)
        return {name: subject[name].restrict(mask[name]) for name in subject if name in mask}

    def _open(self, unit: TrainUnit | MergeUnit) -> Expert:
        """The expert of a training, read target by target; or a merge, merged in memory."""
        if isinstance(unit, MergeUnit):
            experts = [self._open(expert) for expert in unit.experts]
            return merge(experts, unit.method, parameters=dict(unit.parameters), workers=torch.get_num_threads())
        return open_expert(self.store.expert(unit.key), local_path(self.sources.model))


def trained_result(output: Path, model: PreTrainedModel) -> TrainUnitResult:
    """The result of a training, from the directory that it wrote. model: the base model."""
    metrics = read_object(output / RUN_FILE)["metrics"]
    if (output / MODEL_CONFIG).exists():
        sizes = {name: p.numel() for name, p in model.named_parameters() if p.is_floating_point()}
    else:  # values, without indices
        file = TensorFile(output / WEIGHTS_FILE)
        sizes = {name: math.prod(shape) for name, shape in file.shapes.items() if file.dtypes[name].startswith(("F", "BF"))}
    layers = _count_layers(name for name, size in sizes.items() if size)
    return TrainUnitResult(sum(sizes.values()), layers, metrics["validation_loss"], metrics["steps"])


def sparse_result(expert: AdapterFile) -> MergeUnitResult:
    """The number of an adapter's entries, and of the layers that have any."""
    return MergeUnitResult(expert.nnz, _count_layers([name for name, delta in expert.items() if delta.nnz]))


def scored_result(result: EvalResult) -> EvalUnitResult:
    """The metrics of an evaluation, and Rouge-L of each row."""
    scores = rouge_l_of_each([answer for _, answer in result.predictions], [row.target for row, _ in result.predictions])
    return EvalUnitResult(result.scores, result.rows, tuple(round(100 * score, 4) for score in scores))


def answer_lines(result: EvalResult) -> str:
    """The rows and their answers, as JSON lines."""
    lines = [{**row.as_json(), "answer": answer} for row, answer in result.predictions]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def release_memory() -> None:
    """Collect cycles, and return freed memory to the system: malloc keeps gigabytes after a full fine-tuning."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def describe_error(error: BaseException) -> str:
    """An error in one line, with its class if it is not a SparseletError."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SparseletError) else f"{type(error).__name__}: {text}"


def _train_or_resume(settings: TrainSettings, output: Path, base: Base, callback: TrainerCallback) -> None:
    """Resume an interrupted run; start from the beginning if it cannot be resumed."""
    work = work_directory(output)
    if work.exists():
        try:
            train(settings, output, resume=True, base=base, callbacks=[callback])
        except WriteFailed:  # the checkpoint is not the cause
            raise
        except Exception as error:  # such as moved data, or a damaged checkpoint
            logger.warning("%s cannot be resumed, training starts from the beginning: %s", work, describe_error(error))
            shutil.rmtree(work, ignore_errors=True)
    if not output.exists():
        train(settings, output, base=base, callbacks=[callback])


class _StepProgress(TrainerCallback):
    """Reports the fraction of the optimizer steps that are done."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self.report = report

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.report(state.global_step / max(1, state.max_steps))


def _add_costs(cost: UnitCost, preparation: UnitCost) -> UnitCost:
    """The sum of the times, and the higher peak."""
    return replace(
        cost,
        seconds=cost.seconds + preparation.seconds,
        cpu_seconds=cost.cpu_seconds + preparation.cpu_seconds,
        peak_bytes=max(cost.peak_bytes, preparation.peak_bytes),
    )


def _count_layers(targets: Iterable[str]) -> int:
    """The number of numbered layers that the targets are in."""
    return len({layer for layer in map(layer_of, targets) if layer.rpartition(".")[2].isdigit()})


def _size(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
