"""`train`: one run of one method on one task or several, on top of transformers' `Trainer`.

While it runs, checkpoints are kept in `<output>.partial`; what was trained appears under `<output>` at once.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState, set_seed

from sparselet.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, SparseAdapter
from sparselet.apply import target_weights
from sparselet.errors import ConfigError, OutputExists
from sparselet.generation.prompts import PromptFormat, prompt_format
from sparselet.hub.sources import local_directory
from sparselet.io.atomic import atomic_directory
from sparselet.io.json_files import read_object, write_json
from sparselet.io.paths import check_output, parents_of, utf8_path
from sparselet.io.temporaries import fitting_name, held, remove_directory, remove_left
from sparselet.io.write_errors import convert_write_errors
from sparselet.models import load_model, load_tokenizer
from sparselet.tasks.task import Task, load_task
from sparselet.training.collate import Collator, Encoded, collator, encode
from sparselet.training.methods import TRAIN_METHODS, TrainableModel, TrainContext
from sparselet.training.processes import (
    agreed,
    first_then_others,
    from_first,
    is_first,
    join_processes,
    naming_lost_process,
    refuse_parallelism,
    require_equal,
    share_of_batch,
)
from sparselet.training.settings import TrainSettings
from sparselet.training.trainer import COMPLETE, checkpoint_step, make_trainer
from sparselet.tuner.model import versions

logger = logging.getLogger("sparselet")

RUN_FILE = "run.json"
DATA, START = "data_fingerprint", "init_from_sha256"


@dataclass(frozen=True)
class Trained:
    """What a run wrote that is not a sparse adapter: a LoRA directory or a checkpoint."""

    path: Path
    method: str
    metrics: Mapping[str, Any]


def train(
    settings: TrainSettings,
    output: str | Path,
    *,
    resume: bool = False,
    base: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> SparseAdapter | Trained:
    """Train by `settings.method` and save the result as the directory `output`.

    resume: go on from the last whole checkpoint of a run that was stopped; on the CPU the files' bytes are those of an
        undisturbed run. The settings must be the same.
    base: the base model and tokenizer if they are loaded already; the model is given back with its own weights.
    callbacks: more `TrainerCallback`s, such as a progress bar.

    In several processes, which torchrun or `accelerate launch` has started, all call this, each trains on its share of every
    batch, the first writes, and all return the same, or all raise.

    Returns the adapter of the methods sparse and full-qkv, a `Trained` of the others. Raises OutputExists, ConfigError,
    TaskError, ModelError, WriteFailed, what reading an adapter raises, WrongBase and whatever the tuner refuses.
    """
    refuse_parallelism()
    share_of_batch(settings.batch_size, settings.gradient_accumulation)  # raises where it cannot be divided
    join_processes()
    output = Path(output)
    work = work_directory(output)
    finished, checkpoint = False, None
    with contextlib.ExitStack() as claim:
        with agreed():
            if is_first():
                finished = os.path.isfile(output / RUN_FILE) and os.path.isdir(work)
                if not finished:
                    remove_left(work)
                    check_output(output)
                    _check_work(work, resume)
            tasks = _load_tasks(settings)
            place = None if settings.init_from is None else local_directory(settings.init_from) or Path(settings.init_from)
            start = None if place is None else _load_start(place)
            known = _described(settings, tasks, place)
            if finished:  # by a run that was killed before it had removed its checkpoints
                _finish(output, work, known)
            elif is_first():
                claim.enter_context(parents_of(work))
                checkpoint = claim.enter_context(_claimed(work, known, resume))
        require_equal(known)
        finished, checkpoint = from_first((finished, checkpoint))
        if finished:
            return _written(output)
        try:
            trained = _train(settings, output, work, tasks, start, known, checkpoint, base, callbacks)
        except BaseException:
            if is_first() and _keep_whole(work) is None:
                shutil.rmtree(work, ignore_errors=True)
            raise
        with agreed():
            if is_first():
                remove_directory(work)
    return trained


def _train(
    settings: TrainSettings,
    output: Path,
    work: Path,
    tasks: Sequence[Task],
    start: SparseAdapter | None,
    known: Mapping[str, Any],
    checkpoint: Path | None,
    base: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None,
    callbacks: Sequence[TrainerCallback],
) -> SparseAdapter | Trained:
    """Train in the work directory, from the checkpoint if there is one, and write the output."""
    started = time.time()
    model, tokenizer = base or first_then_others(
        lambda: (load_model(settings.model, settings.dtype), load_tokenizer(settings.model))
    )
    if start is not None:
        target_weights(model, start)  # raises where it does not fit
    set_seed(settings.seed)
    form = prompt_format(model, tokenizer, settings.chat_template)
    rows = _rows(tasks, settings, form)
    # What is recomputed in the backward pass cannot go on from a cache.
    collate = collator(model, form, share=not settings.gradient_checkpointing)
    sizes = [len(own) for own in rows["train"].values()]
    context = TrainContext(model, form, settings, start, sizes, known[DATA], keep=base is not None)
    with preserve_requires_grad(model), TRAIN_METHODS[settings.method](context) as trainable:
        state = _fit(context, trainable, collate, rows, work, checkpoint, callbacks)
        metadata = _metadata(tasks, settings, state, start)
        run = {"settings": asdict(settings), "versions": versions(), "seconds": time.time() - started}
        run |= {"started": started, "resumed": bool(checkpoint), "history": state.log_history, DATA: known[DATA]}
        run |= {key: metadata[key] for key in ("task", "metrics")}
        adapter = None
        with agreed():
            if is_first():
                with atomic_directory(output) as directory:
                    adapter = trainable.write(directory, metadata)
                    write_json(directory / RUN_FILE, run)
    return _written(output) if adapter is None else adapter


def work_directory(output: Path) -> Path:
    """Where a run keeps its checkpoints until it has finished."""
    if output.name in ("", ".."):
        output = Path(os.path.realpath(output))
    return output.with_name(fitting_name(output.parent, output.name, ".partial"))


def _load_tasks(settings: TrainSettings) -> list[Task]:
    columns = {"input": settings.input_column, "target": settings.target_column}
    tasks = [load_task(source, ("train", "validation"), columns) for source in settings.tasks]
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"task: {twice[0]} is the name of {names.count(twice[0])} tasks. Give each once, under its own name.")
    return tasks


def _load_start(path: Path) -> SparseAdapter:
    """The adapter that a second stage starts from. Raises ConfigError where it is none, and a FormatError."""
    file = AdapterFile(path)
    if file.unfinished:
        raise ConfigError(f"init_from: {path} was saved while its mask was still being selected. Train it to its end first.")
    if file.trained_modules:
        raise ConfigError(f"init_from: {path} trained modules in full (modules_to_save), which a second stage does not take.")
    if not file.nnz:
        raise ConfigError(f"init_from: {path} has no entries, so there is nothing to start from.")
    return SparseAdapter({name: file[name] for name in file}, file.metadata, file.fingerprints)


def _described(settings: TrainSettings, tasks: Sequence[Task], start: Path | None) -> dict[str, Any]:
    """What a run is known by: its settings and what they refer to, as JSON gives it back. start: of `init_from`."""
    described = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}
    parts = [task.fingerprint() for task in tasks]
    described[DATA] = parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    if start is not None:
        with open(start / WEIGHTS_FILE, "rb") as file:
            described[START] = hashlib.file_digest(file, "sha256").hexdigest()
    return described


def _rows(tasks: Sequence[Task], settings: TrainSettings, form: PromptFormat) -> dict[str, dict[str, list[Encoded]]]:
    """The rows of both splits as tokens, by task."""
    limits = {"train": settings.train_rows, "validation": settings.validation_rows}
    return {
        split: {
            task.name: encode(task.rows(split, limit), form, settings.max_input_length, f"task {task.name}, split {split}")
            for task in tasks
        }
        for split, limit in limits.items()
    }


def _fit(
    context: TrainContext,
    trainable: TrainableModel,
    collate: Collator,
    rows: Mapping[str, Mapping[str, Sequence[Encoded]]],
    work: Path,
    checkpoint: Path | None,
    callbacks: Sequence[TrainerCallback],
) -> TrainerState:
    """Train from the checkpoint, if there is one, to the end; the best weights are in the model then."""
    with preserve_switches(context.model, context.settings), utf8_path(work) as place:
        every = [*trainable.callbacks, *callbacks]
        trainer = make_trainer(trainable.module, collate, rows, context.settings, place, every, trainable.autocast)
        with naming_lost_process(), convert_write_errors(work, "Checkpoints that are whole are kept for --resume."):
            trainer.train(resume_from_checkpoint=str(place / checkpoint.name) if checkpoint else None)
    return trainer.state


@contextlib.contextmanager
def preserve_requires_grad(model: PreTrainedModel) -> Iterator[None]:
    """Afterwards the same parameters require gradients as before."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def preserve_switches(model: PreTrainedModel, settings: TrainSettings) -> Iterator[None]:
    """Afterwards the model's switches, which a Trainer turns, are as before."""
    training, use_cache = model.training, getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        if settings.gradient_checkpointing:
            model.activation_checkpointing_disable()
            model.disable_input_require_grads()
        model.config.use_cache = use_cache
        model.train(training)


def _metadata(
    tasks: Sequence[Task], settings: TrainSettings, state: TrainerState, start: SparseAdapter | None
) -> dict[str, Any]:
    """What is recorded of the result, whatever the method."""
    metadata = {
        # The name that was asked for, which means the same on other machines, not a directory of the cache.
        "base_model_name_or_path": settings.model,
        "task": "+".join(task.name for task in tasks),
        "chat_template": settings.chat_template,
        "metrics": {
            "validation_loss": state.best_metric,
            "best_step": state.best_global_step,
            "steps": state.global_step,
        },
    }
    if settings.method == "sparse" and start is None:
        return metadata
    training: dict[str, Any] = {"method": settings.method}
    if start is not None:
        origin = {
            "task": start.metadata.task,
            "data_fingerprint": start.metadata.data_fingerprint,
            "merge": start.metadata.merge,
            "training": start.metadata.training,
        }
        training["init_from"] = {key: value for key, value in origin.items() if value is not None}
    return {**metadata, "training": training}


def _check_work(work: Path, resume: bool) -> None:
    """Raise OutputExists for a work directory that this run must not use."""
    if os.path.lexists(work) and not work.is_dir():
        raise OutputExists(f"{work}, where checkpoints are kept, is there and no directory. Choose another output.")
    if not resume and any(work.glob(f"checkpoint-*/{COMPLETE}")):
        raise OutputExists(f"{work} holds an unfinished run. Go on with --resume, or remove it first.")
    if resume and not work.exists():
        logger.warning("there is nothing to resume at %s; training starts from the beginning.", work)


@contextlib.contextmanager
def _claimed(work: Path, described: Mapping[str, Any], resume: bool) -> Iterator[Path | None]:
    """Within the block the work directory is this run's alone. Yields the checkpoint to go on from, None to start.

    Without `resume` only a run that has saved no checkpoint is gone on with, which is to start it again.
    Raises OutputExists, ConfigError, WriteFailed.
    """
    remove_left(work)
    if work.exists() and _is_nothing(work):
        remove_directory(work)
    if not work.exists():
        with atomic_directory(work) as directory:
            write_json(directory / RUN_FILE, described)
    with held(work) as alone:
        if not alone:
            raise OutputExists(f"another process trains in {work}. Wait for it, or choose another output.")
        _check_work(work, resume)
        _check_described(work, described)
        yield _keep_whole(work)


def _is_nothing(work: Path) -> bool:
    """Whether a work directory is that of a run that was killed before its record was written."""
    return all(name.startswith(f".{RUN_FILE}.") and name.endswith(".tmp") for name in os.listdir(work))


def _check_described(work: Path, described: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the run in the work directory is the one described."""
    before = _read_run(work)
    changed = sorted(key for key in described if before.get(key) != described[key])
    other = {DATA: f"other rows in {described['task']}", START: f"another adapter at {described['init_from']}"}
    if changed and changed[0] in other and set(changed) <= set(other):
        raise ConfigError(f"the run at {work} was started with {other[changed[0]]}. Remove it to start again.")
    if changed:
        raise ConfigError(
            f"the run at {work} was started with {changed[0]} = {before.get(changed[0])!r}, not {described[changed[0]]!r}. "
            "Resume with the settings it was started with, or remove it first."
        )


def _finish(output: Path, work: Path, described: Mapping[str, Any]) -> None:
    """Remove the work directory of a run that was killed after its output was written. Raises OutputExists for another run."""
    run = read_object(output / RUN_FILE)
    same = {key: value for key, value in described.items() if key not in (DATA, START)}
    if run.get(DATA) != described[DATA] or run.get("settings") != same:
        raise OutputExists(f"{output} exists already. Choose another output, or remove it first.")
    with held(work) as alone:
        if alone:
            remove_directory(work)
    logger.info("%s was written by a run that was killed after that; it is whole.", output)


def _written(output: Path) -> SparseAdapter | Trained:
    """What a run has written."""
    run = read_object(output / RUN_FILE)
    if (output / CONFIG_FILE).is_file() and run["settings"]["method"] != "lora":
        return SparseAdapter.load(output)
    return Trained(output, run["settings"]["method"], run["metrics"])


def _keep_whole(work: Path) -> Path | None:
    """Remove the checkpoints that were not written to their end. Returns the last of the others."""
    for path in work.glob("checkpoint-*"):
        if not (path / COMPLETE).is_file():
            shutil.rmtree(path, ignore_errors=True)
    return max(work.glob("checkpoint-*"), key=checkpoint_step, default=None)


def _read_run(work: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((work / RUN_FILE).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{work / RUN_FILE} cannot be read, so the run cannot be resumed: {error}. Remove {work}.") from error
