"""`train`: one run of one method on one task or several, on top of transformers' `Trainer`."""

import contextlib
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from peft import TaskType
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState, set_seed

from sparselet.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, SparseAdapter
from sparselet.adapter_format import METHOD
from sparselet.apply import target_weights
from sparselet.errors import ConfigError
from sparselet.generation.prompts import PromptFormat, prompt_format
from sparselet.hub.sources import local_directory
from sparselet.io.atomic import atomic_directory
from sparselet.io.json_files import read_object, write_json
from sparselet.io.paths import utf8_path
from sparselet.io.temporaries import remove_directory
from sparselet.io.write_errors import convert_write_errors
from sparselet.models import load_model, load_tokenizer
from sparselet.profiles.file import PROFILE_FILE, write_profile
from sparselet.selection_settings import selection_values
from sparselet.tasks.task import Task, load_task
from sparselet.training.collate import Encoded, collator, encode
from sparselet.training.freezing import frozen_entries
from sparselet.training.learning_rate import default_learning_rate, search_learning_rate
from sparselet.training.methods import TRAIN_METHODS, TrainableModel, TrainContext, find_targets
from sparselet.training.processes import (
    agreed,
    convert_lost_process,
    first_then_others,
    from_first,
    is_first,
    join_processes,
    refuse_parallelism,
    require_equal,
    share_of_batch,
)
from sparselet.training.profiling import MakeProfile, profiler
from sparselet.training.run_directory import (
    DATA,
    FROZEN,
    INITIAL,
    RUN_FILE,
    check_directories,
    claimed,
    is_finished,
    last_checkpoint,
    remove_finished,
    work_directory,
)
from sparselet.training.settings import TrainSettings
from sparselet.training.trainer import make_trainer
from sparselet.tuner import SparseletConfig
from sparselet.tuner.model import versions
from sparselet.tuner.targets import PRESETS

RATE_FILE = "learning_rate.json"  # in the work directory: the result of a search
SHORT_STEPS, SHORT_ROWS = 32, 64  # optimizer steps and validation rows of a search's run

LoadedModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Trained:
    """The result of a run that is not a sparse adapter: a LoRA directory or a checkpoint."""

    path: Path
    method: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class RunInputs:
    """What the settings of a run refer to. identity: settings and hashes of these, equal for a run that is resumed."""

    tasks: Sequence[Task]
    initial: SparseAdapter | None
    frozen: Sequence[AdapterFile]
    identity: Mapping[str, Any]


def train(
    settings: TrainSettings,
    output: str | Path,
    *,
    resume: bool = False,
    base: LoadedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> SparseAdapter | Trained:
    """Train by `settings.method` and save the result as the directory `output`, which appears when it is complete.

    Until then checkpoints are kept in `work_directory(output)`.
    resume: continue from the last complete checkpoint of a run with the same settings; on the CPU the files have the bytes of
        an uninterrupted run.
    base: the base model and tokenizer if they are loaded already; the model has its own weights again afterwards.
    callbacks: more `TrainerCallback`s, such as a progress bar.

    In several processes, started by torchrun or `accelerate launch`, each calls this and trains on its share of every batch;
    the first writes, and all return the same or all raise.

    Returns the adapter of the methods sparse and full-qkv, a `Trained` of the others. Raises OutputExists, ConfigError,
    TaskError, ModelError, WriteFailed, what reading an adapter raises, WrongBase and what the tuner raises.
    """
    refuse_parallelism()
    share_of_batch(settings.batch_size, settings.gradient_accumulation)  # raises where it cannot be divided
    join_processes()
    output = Path(output)
    work = work_directory(output)
    finished, checkpoint = False, None
    with contextlib.ExitStack() as stack:
        with agreed():
            if is_first():
                finished = is_finished(output, work)
                if not finished:
                    check_directories(output, work, resume)
            inputs = _load_inputs(settings)
            if finished:
                remove_finished(output, work, inputs.identity)
            elif is_first():
                checkpoint = stack.enter_context(claimed(work, inputs.identity, resume))
        require_equal(inputs.identity)
        finished, checkpoint = from_first((finished, checkpoint))
        if finished:
            return _read_result(output)
        try:
            result = _run(settings, inputs, output, work, checkpoint, base, callbacks)
        except BaseException:
            if is_first() and last_checkpoint(work) is None:
                shutil.rmtree(work, ignore_errors=True)
            raise
        with agreed():
            if is_first():
                remove_directory(work)
    return result


def _run(
    settings: TrainSettings,
    inputs: RunInputs,
    output: Path,
    work: Path,
    checkpoint: Path | None,
    base: LoadedModel | None,
    callbacks: Sequence[TrainerCallback],
) -> SparseAdapter | Trained:
    """Train in the work directory, from the checkpoint if there is one, and write the output."""
    started = time.time()
    model, tokenizer = base or first_then_others(
        lambda: (load_model(settings.model, settings.dtype), load_tokenizer(settings.model))
    )
    if inputs.initial is not None:
        target_weights(model, inputs.initial)  # raises where it does not fit
    rate = _learning_rate(settings, inputs, (model, tokenizer), work, callbacks)
    chosen = replace(settings, learning_rate=rate["peak"])
    with _trained(chosen, inputs, (model, tokenizer), work, checkpoint, callbacks, keep=base is not None) as (
        trainable,
        state,
        make_profile,
    ):
        metadata = _metadata(inputs, settings, state)
        record = {
            "settings": asdict(settings),
            "learning_rate": rate,
            "versions": versions(),
            "seconds": time.time() - started,
            "started": started,
            "resumed": checkpoint is not None,
            "history": state.log_history,
            DATA: inputs.identity[DATA],
            "task": metadata["task"],
            "metrics": metadata["metrics"],
        }
        adapter = None
        with agreed():
            if is_first():
                with atomic_directory(output) as directory:
                    adapter = trainable.write(directory, metadata)
                    write_json(directory / RUN_FILE, record)
                    profile = make_profile(metadata["task"], trainable.autocast) if make_profile else None
                    if profile is not None:
                        write_profile(profile, directory / PROFILE_FILE)
                    if adapter is not None:
                        adapter.profile = profile
    return _read_result(output) if adapter is None else adapter


@contextlib.contextmanager
def _trained(
    settings: TrainSettings,
    inputs: RunInputs,
    base: LoadedModel,
    work: Path,
    checkpoint: Path | None,
    callbacks: Sequence[TrainerCallback],
    keep: bool,
) -> Iterator[tuple[TrainableModel, TrainerState, MakeProfile | None]]:
    """Within the block the model is trained, with its best weights. keep: it has its own weights again afterwards.

    Also yields the function that profiles it, in the first process if `settings.profile`.
    """
    model, tokenizer = base
    set_seed(settings.seed)
    form = prompt_format(model, tokenizer, settings.chat_template)
    rows = _encode_rows(inputs.tasks, settings, form)
    # Activations that are computed again in the backward pass cannot read a cache of keys and values.
    collate = collator(model, form, share=not settings.gradient_checkpointing)
    sizes = [len(task_rows) for task_rows in rows["train"].values()]
    config, frozen = adapter_config(settings, model, inputs.identity[DATA]), frozen_entries(model, inputs.frozen)
    context = TrainContext(model, form, config, inputs.initial, sizes, keep, frozen)
    method = TRAIN_METHODS[settings.method]
    parameters = {name: vars(settings)[name] for name in method.parameters}
    make_profile = profiler(context, method, rows["train"]) if settings.profile and is_first() else None
    with preserve_requires_grad(model), method.prepare(context, **parameters) as trainable:
        with preserve_switches(model, settings), utf8_path(work) as directory:
            trainer = make_trainer(trainable, collate, rows, settings, directory, callbacks)
            with (
                convert_lost_process(),
                convert_write_errors(work, "Complete checkpoints are kept; set `resume=True` to continue."),
            ):
                trainer.train(resume_from_checkpoint=str(directory / checkpoint.name) if checkpoint else None)
        yield trainable, trainer.state, make_profile


def _learning_rate(
    settings: TrainSettings, inputs: RunInputs, base: LoadedModel, work: Path, callbacks: Sequence[TrainerCallback]
) -> dict[str, Any]:
    """`peak`: the learning rate of a run. If it was searched for: also `losses`, and the `seconds` that the search took.

    A resumed run has the rate of its start.
    """
    if settings.learning_rate not in (None, "auto"):
        return {"peak": settings.learning_rate}
    start = default_learning_rate(settings.method, base[0].config)
    if settings.learning_rate is None:
        return {"peak": start}
    file = work / RATE_FILE
    if file.is_file():
        return read_object(file)
    started, rows_needed = time.time(), SHORT_STEPS * settings.batch_size
    rows = sum(len(task.rows("train", settings.train_rows)) for task in inputs.tasks)
    short = replace(
        settings,
        train_rows=-(-min(rows_needed, rows) // len(inputs.tasks)),
        validation_rows=min(SHORT_ROWS, settings.validation_rows or SHORT_ROWS),
        epochs=max(1.0, rows_needed / rows),
        patience=0,
        save_steps=0,
        report_to=(),
        profile=False,
    )

    def loss_at(rate: float) -> float:
        directory = work / f"rate-{rate:.2g}"
        try:
            run = replace(short, learning_rate=rate)
            with _trained(run, inputs, base, directory, None, callbacks, keep=True) as (_, state, _):
                return state.best_metric or 0.0
        finally:
            if is_first():
                shutil.rmtree(directory, ignore_errors=True)

    peak, losses = search_learning_rate(start, loss_at)
    searched = {"peak": peak, "losses": {f"{r:.3g}": loss for r, loss in losses.items()}, "seconds": time.time() - started}
    if is_first():
        write_json(file, searched)
    return searched


def adapter_config(settings: TrainSettings, model: PreTrainedModel, data_fingerprint: str) -> SparseletConfig:
    """The settings of masks and targets as the tuner's configuration. Raises ConfigError, NoTargets, ArgumentError."""
    names = list(settings.target_modules)
    preset = names[0] if len(names) == 1 and names[0].lower() in PRESETS else None
    config = SparseletConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM,
        **selection_values(settings),
        target_modules=preset or names or None,
        exclude_modules=list(settings.exclude_modules) or None,
        layers_to_transform=list(settings.layers) or None,
        data_fingerprint=data_fingerprint,
    )
    if settings.entries is not None:
        size = sum(cast(nn.Parameter, model.get_submodule(name).weight).numel() for name in find_targets(model, config))
        if int(settings.entries) > size:
            raise ConfigError(f"entries must be at most the {size} of the targets, got {settings.entries}.")
        config.density = int(settings.entries) / size
    return config


def _load_inputs(settings: TrainSettings) -> RunInputs:
    """Read the tasks and the initial adapter. Raises ConfigError, TaskError, FormatError."""
    columns = {"input": settings.input_column, "target": settings.target_column}
    tasks = [load_task(source, ("train", "validation"), columns) for source in settings.tasks]
    names = [task.name for task in tasks]
    duplicate = next((name for name in sorted(names) if names.count(name) > 1), None)
    if duplicate:
        raise ConfigError(f"task: {duplicate} is the name of {names.count(duplicate)} tasks. Give each once, by its own name.")
    identity = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}
    hashes = [task.fingerprint() for task in tasks]
    identity[DATA] = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]
    initial = None
    if settings.init_from is not None:
        path = local_directory(settings.init_from) or Path(settings.init_from)
        initial = _read_initial_adapter(path)
        identity[INITIAL] = _weights_sha256(path)
    frozen = [AdapterFile(local_directory(name) or Path(name)) for name in settings.freeze]
    if frozen:
        identity[FROZEN] = [_weights_sha256(adapter.path) for adapter in frozen]
    return RunInputs(tasks, initial, frozen, identity)


def _weights_sha256(adapter: Path) -> str:
    with open(adapter / WEIGHTS_FILE, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_initial_adapter(path: Path) -> SparseAdapter:
    """The adapter that a second stage starts from. Raises ConfigError for one without a complete mask, and FormatError."""
    file = AdapterFile(path)
    if file.unfinished:
        raise ConfigError(f"init_from: {path} was saved while its mask was still being selected. Train it to its end first.")
    if file.trained_modules:
        raise ConfigError(f"init_from: {path} trained modules in full (modules_to_save), which a second stage does not take.")
    if not file.nnz:
        raise ConfigError(f"init_from: {path} has no entries, so there is nothing to start from.")
    return SparseAdapter({name: file[name] for name in file}, file.metadata, file.fingerprints)


def _encode_rows(tasks: Sequence[Task], settings: TrainSettings, form: PromptFormat) -> dict[str, dict[str, list[Encoded]]]:
    """The rows of both splits as tokens, by task."""
    limits = {"train": settings.train_rows, "validation": settings.validation_rows}
    return {
        split: {
            task.name: encode(task.rows(split, limit), form, settings.max_input_length, f"task {task.name}, split {split}")
            for task in tasks
        }
        for split, limit in limits.items()
    }


@contextlib.contextmanager
def preserve_requires_grad(model: PreTrainedModel) -> Iterator[None]:
    """After the block the parameters that required gradients before it do so, and no others."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def preserve_switches(model: PreTrainedModel, settings: TrainSettings) -> Iterator[None]:
    """After the block the model's mode and `use_cache`, which a Trainer changes, are as before it."""
    training, use_cache = model.training, model.config.to_dict().get("use_cache")
    try:
        yield
    finally:
        if settings.gradient_checkpointing:
            model.activation_checkpointing_disable()
            model.disable_input_require_grads()
        model.config.use_cache = use_cache
        model.train(training)


def _metadata(inputs: RunInputs, settings: TrainSettings, state: TrainerState) -> dict[str, Any]:
    """The metadata of a result, whatever the method."""
    metadata = {
        "base_model_name_or_path": settings.model,  # the name in the settings, which is valid on other machines too
        "task": "+".join(task.name for task in inputs.tasks),
        "chat_template": settings.chat_template,
        "metrics": {
            "validation_loss": state.best_metric,
            "best_step": state.best_global_step,
            "steps": state.global_step,
        },
    }
    if settings.method == "sparse" and inputs.initial is None:
        return metadata
    training: dict[str, Any] = {"method": settings.method}
    if inputs.initial is not None:
        origin = inputs.initial.metadata
        keys = ("task", "data_fingerprint", "merge", "training")
        training["init_from"] = {key: value for key, value in vars(origin).items() if key in keys and value is not None}
    return {**metadata, "training": training}


def _read_result(output: Path) -> SparseAdapter | Trained:
    """The result of a finished run."""
    run = read_object(output / RUN_FILE)
    if (output / CONFIG_FILE).is_file() and read_object(output / CONFIG_FILE).get("peft_type") == METHOD:
        return SparseAdapter.load(output)
    return Trained(output, run["settings"]["method"], run["metrics"])
