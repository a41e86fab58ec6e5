"""Doing one job: training, merging, evaluating. The base model stays in memory from job to job."""

import contextlib
import ctypes
import gc
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
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
from sparselet.evaluation import EvalResult, EvalSettings, evaluate
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
from sparselet.studies.engine.cost import measured, together
from sparselet.studies.engine.jobs import Job
from sparselet.studies.engine.store import ANSWERS, EXPERT, Store
from sparselet.studies.engine.unit import Unit
from sparselet.tasks.task import Task, load_task
from sparselet.training import TrainSettings, train
from sparselet.training.run_directory import RUN_FILE, work_directory

logger = logging.getLogger("sparselet")

Base = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Places:
    """Where on this machine a study's tasks and model are: sources of tasks by name, and the model's name or directory."""

    tasks: Mapping[str, str]
    model: str


@dataclass(frozen=True)
class Report:
    """What is told of a unit while its job is done. fraction: how much of it is done. error: why it failed."""

    what: str  # "started", "progress", "done" or "failed"
    key: str
    fraction: float = 0.0
    error: str = ""


Tell = Callable[[Report], None]


class Performer:
    """Does the jobs of one study in this process, one after the other."""

    def __init__(self, store: Store, places: Places) -> None:
        self.store, self.places = store, places
        self._loaded: tuple[tuple[str, str], PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._tasks: dict[tuple[str, tuple[str, ...]], Task] = {}

    def perform(self, job: Job, tell: Tell) -> None:
        """Do those of a job's units that are not done. What fails is told, not raised, and so is what then cannot be done."""
        left = job.without({unit.key for unit in job.units if self.store.result(unit.key) is not None})
        for unit in job.units:
            if unit not in left.units:
                tell(Report("done", unit.key))
        told: set[str] = set()

        def telling(report: Report) -> None:
            if report.what in ("done", "failed"):
                told.add(report.key)
            tell(report)

        try:
            if left.units:
                (self._evaluate if left.units[0].kind == "evaluate" else self._make)(left, telling)
        except Exception as error:  # whatever it is, the other jobs go on
            for unit in left.units:
                if unit.key not in told:
                    tell(Report("failed", unit.key, error=describe(error)))
        finally:
            release_memory()

    def _make(self, job: Job, tell: Tell) -> None:
        """Train or merge, and publish; what an attempt before this one has left complete is not made again."""
        (unit,) = job.units
        tell(Report("started", unit.key))
        with measured() as cost:
            directory = self.store.directory(unit)
            result = MAKE[unit.kind](self, unit, directory / EXPERT, tell)
        cost["bytes"] = _bytes(directory)
        self.store.publish(unit, result, cost)
        tell(Report("done", unit.key))

    def _train(self, unit: Unit, output: Path, tell: Tell) -> dict[str, Any]:
        base = self._base(unit)
        if not output.exists() or work_directory(output).exists():
            steps = _Steps(lambda fraction: tell(Report("progress", unit.key, fraction)))
            _train_or_resume(self._train_settings(unit), output, base, steps)
        return trained_result(output, base[0])

    def _merge(self, unit: Unit, output: Path, _: Tell) -> dict[str, Any]:
        if not output.exists():
            experts = [self._open(one) for one in unit.inputs]
            merge_to(output, experts, **_how(unit), workers=torch.get_num_threads())
        return sparse_result(AdapterFile(output))

    def _evaluate(self, job: Job, tell: Tell) -> None:
        tell(Report("started", job.key))
        with contextlib.ExitStack() as stack:
            with measured() as opening:
                model, tokenizer = self._base(job.units[0])
                subject = self._subject(job.units[0])
                if subject is not None:
                    stack.enter_context(apply_temporarily(model, subject))
            for unit in job.units:
                tell(Report("started", unit.key))
                try:
                    with measured() as cost:
                        result, answers = self._score(unit, model, tokenizer, tell)
                        write_text(self.store.directory(unit) / ANSWERS, answers)
                    self.store.publish(unit, result, {**together(cost, opening), "bytes": 0})
                    opening = {"peak_bytes": opening["peak_bytes"]}  # its time counts once
                except Exception as error:
                    tell(Report("failed", unit.key, error=describe(error)))
                else:
                    tell(Report("done", unit.key))

    def _score(
        self, unit: Unit, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tell: Tell
    ) -> tuple[dict[str, Any], str]:
        """A unit's result and the answers as JSON lines; the subject is in the model already."""
        asked = EvalSettings(**unit.settings["eval"])
        task = self._task(unit.settings["task"], (asked.split,), unit.settings["data"])
        total, answered = len(task.rows(asked.split, asked.rows)), 0

        def progress(count: int) -> None:
            nonlocal answered
            answered += count
            tell(Report("progress", unit.key, answered / total))

        (result,) = evaluate(model, tokenizer, [task], None, asked, progress)
        return scored(result), answers_of(result)

    def _base(self, unit: Unit) -> Base:
        """The base model, loaded once, and set to compute with the unit's threads. Raises ModelError."""
        torch.set_num_threads(unit.settings["threads"])
        wanted = (self.places.model, _dtype(unit))
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None  # first, so that no two are in memory
            found, told = model_fingerprint(self.places.model), unit.settings["base"]
            if found != told:
                raise ModelError(f"{self.places.model}: its files have fingerprint {found}, the study was planned with {told}.")
            self._loaded = (wanted, load_model(*wanted), load_tokenizer(self.places.model))
        return self._loaded[1:]

    def _task(self, name: str, splits: tuple[str, ...], fingerprint: str) -> Task:
        """Splits of a task, read once and known to have the rows of the plan. Raises ConfigError, TaskError."""
        if (name, splits) not in self._tasks:
            if name not in self.places.tasks:
                raise ConfigError(f"task {name} has no place here; there are {', '.join(self.places.tasks) or 'none'}.")
            self._tasks[name, splits] = load_task(self.places.tasks[name], splits)
        found = self._tasks[name, splits].fingerprint()
        if found != fingerprint:
            raise TaskError(
                f"{self.places.tasks[name]}: the rows of {' and '.join(splits)} have fingerprint {found}, the study was "
                f"planned with {fingerprint}."
            )
        return self._tasks[name, splits]

    def _train_settings(self, unit: Unit) -> TrainSettings:
        """Those of the unit, with what its names mean on this machine. Raises ConfigError, TaskError."""
        for name in unit.settings["task"]:
            self._task(name, ("train", "validation"), unit.settings["data"][name])
        told: Mapping[str, Any] = unit.settings["train"]
        given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
        known = {field.name for field in fields(TrainSettings)}
        for name in given:
            if name not in known:
                raise ConfigError(f"train has no setting {name!r}; it has {', '.join(sorted(known))}.")
        given |= {"model": self.places.model, "task": tuple(self.places.tasks[name] for name in unit.settings["task"])}
        given["dtype"] = _dtype(unit)
        if unit.inputs:
            given["init_from"] = str(self.store.expert(unit.inputs[0].key))
        return TrainSettings(**given)

    def _subject(self, unit: Unit) -> ExpertOrDeltas | None:
        """What is written into the base model for an evaluation; None for the base model alone."""
        if not unit.inputs:
            return None
        subject, *masks = (self._open(one) for one in unit.inputs)
        if not unit.settings.get("mask"):
            return subject
        return {name: subject[name].restrict(masks[0][name]) for name in subject if name in masks[0]}

    def _open(self, unit: Unit) -> Expert:
        """What a unit trained, to be read target by target; or a merge, made in memory."""
        if unit.kind == "merge":
            threads = torch.get_num_threads()
            return merge([self._open(one) for one in unit.inputs], **_how(unit), workers=threads)
        return open_expert(self.store.expert(unit.key), local_path(self.places.model))


MAKE: dict[str, Callable[[Performer, Unit, Path, Tell], dict[str, Any]]] = {
    "train": Performer._train,
    "merge": Performer._merge,
}


def trained_result(output: Path, model: PreTrainedModel) -> dict[str, Any]:
    """The result of a training from the directory that it wrote. model: the base model.

    parameters: the numbers that were trained: entries, LoRA's A and B, all of the model's. active_layers: layers that hold any.
    """
    metrics = read_object(output / RUN_FILE)["metrics"]
    told = {name: metrics[name] for name in ("validation_loss", "steps")}
    if (output / MODEL_CONFIG).exists():
        weights = {name: p.numel() for name, p in model.named_parameters() if p.is_floating_point()}
        return {**told, "parameters": sum(weights.values()), "active_layers": _layers(weights)}
    expert = open_expert(output)
    if isinstance(expert, AdapterFile):
        return {**told, **sparse_result(expert)}
    parameters = sum(math.prod(shape) for shape in TensorFile(output / WEIGHTS_FILE).shapes.values())
    return {**told, "parameters": parameters, "active_layers": _layers(expert)}


def sparse_result(expert: AdapterFile) -> dict[str, Any]:
    """How many entries an adapter has, and in how many layers."""
    return {"parameters": expert.nnz, "active_layers": _layers([name for name, delta in expert.items() if delta.nnz])}


def scored(result: EvalResult) -> dict[str, Any]:
    """The result of an evaluation. scores: Rouge-L × 100 of each row, to 4 decimals."""
    each = rouge_l_of_each([answer for _, answer in result.predictions], [row.target for row, _ in result.predictions])
    return {
        **result.scores,
        "rows": result.rows,
        "scores": [round(100 * score, 4) for score in each],
    }


def answers_of(result: EvalResult) -> str:
    """What was answered, as JSON lines."""
    lines = [{**row.as_json(), "answer": answer} for row, answer in result.predictions]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def release_memory() -> None:
    """Give back what a job leaves: cycles, and freed memory that malloc holds on to, gigabytes after a full fine-tuning."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)


def describe(error: BaseException) -> str:
    """An error in one line; its kind too where it is none of ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SparseletError) else f"{type(error).__name__}: {text}"


def _train_or_resume(settings: TrainSettings, output: Path, base: Base, callback: TrainerCallback) -> None:
    """Go on with a run that was interrupted, or start anew where it cannot be gone on with."""
    work = work_directory(output)
    if work.exists():
        try:
            train(settings, output, resume=True, base=base, callbacks=[callback])
        except WriteFailed:  # what is there stays good
            raise
        except Exception as error:  # such as another place of the data, or a damaged checkpoint
            logger.warning("%s cannot be gone on with, training starts anew: %s", work, describe(error))
            shutil.rmtree(work, ignore_errors=True)
    if not output.exists():
        train(settings, output, base=base, callbacks=[callback])


class _Steps(TrainerCallback):
    """Tells the fraction of the optimizer steps that are done."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self.tell = tell

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.tell(state.global_step / max(1, state.max_steps))


def _how(unit: Unit) -> dict[str, Any]:
    """Method and parameters of a merge, as `merge` takes them."""
    return {"method": unit.settings["method"], "parameters": dict(unit.settings["parameters"])}


def _dtype(unit: Unit) -> str:
    return unit.settings.get("dtype") or unit.settings.get("train", {}).get("dtype", "float32")


def _layers(targets: Iterable[str]) -> int:
    """How many numbered layers the targets lie in."""
    return len({layer for layer in map(layer_of, targets) if layer.rpartition(".")[2].isdigit()})


def _bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
