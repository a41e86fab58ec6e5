"""`train`: one sparse expert on one task, a thin recipe over transformers' `Trainer`.

While it runs, checkpoints are kept in `<output>.partial`; the finished adapter appears under `<output>` at once.
"""

import contextlib
import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from peft import TaskType, get_peft_model
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from sparselet.adapter import SparseAdapter
from sparselet.errors import ConfigError, OutputExists
from sparselet.files import atomic_directory, naming_failure, refuse_existing, write_json
from sparselet.models import load_model, load_tokenizer
from sparselet.tasks import Task, load_task
from sparselet.training.collate import Encoded, collator, encode
from sparselet.training.schedule import MaskSchedule
from sparselet.training.settings import TrainSettings
from sparselet.tuner import SparseletConfig, UnselectedMaskWarning, to_adapter
from sparselet.tuner.layer import seeded

logger = logging.getLogger("sparselet")

COMPLETE = "complete"  # marks a checkpoint that was written to its end
RUN_FILE = "run.json"
DATA = "data_fingerprint"


def train(
    settings: TrainSettings,
    output: str | Path,
    *,
    resume: bool = False,
    base: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> SparseAdapter:
    """Train one expert and save it as the directory `output`.

    resume: go on from the last whole checkpoint of a run that was stopped; on the CPU the adapter's bytes are those of
        an undisturbed run. The settings must be the same.
    base: the base model and tokenizer if they are loaded already; the model is given back with its own weights.
    callbacks: more `TrainerCallback`s, such as a progress bar.

    Raises OutputExists, ConfigError, TaskError, ModelError, WriteFailed and whatever the tuner refuses.
    """
    output = Path(output)
    refuse_existing(output)
    work = work_directory(output)
    if work.exists() and not resume:
        raise OutputExists(f"{work} holds an unfinished run. Go on with --resume, or remove it first.")
    if resume and not work.exists():
        logger.warning("there is nothing to resume at %s; training starts from the beginning.", work)
    columns = {"input": settings.input_column, "target": settings.target_column}
    task = load_task(settings.task, ("train", "validation"), columns)
    checkpoint = _prepare(work, settings, task)
    started = time.time()
    try:
        model, tokenizer = base or (load_model(settings.model, settings.dtype), load_tokenizer(settings.model))
        set_seed(settings.seed)
        with _wrapped(model, settings, task.fingerprint()) as wrapped:
            rows = {
                split: encode(
                    task.rows(split, limit),
                    tokenizer,
                    settings.chat_template,
                    settings.max_input_length,
                    bool(model.config.is_encoder_decoder),
                )
                for split, limit in (("train", settings.train_rows), ("validation", settings.validation_rows))
            }
            trainer = _trainer(wrapped, collator(model, tokenizer), rows, settings, work, callbacks)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            adapter = to_adapter(wrapped, metadata=_metadata(task, settings, trainer.state))
        history = trainer.state.log_history
    except BaseException:
        if _keep_whole(work) is None:
            shutil.rmtree(work, ignore_errors=True)
        raise
    run = {"settings": asdict(settings), "versions": adapter.metadata["versions"], "seconds": time.time() - started}
    with atomic_directory(output) as directory:
        adapter.save(directory)
        write_json(directory / RUN_FILE, {**run, "started": started, "resumed": bool(checkpoint), "history": history})
    shutil.rmtree(work, ignore_errors=True)
    return adapter


@contextlib.contextmanager
def _wrapped(model: PreTrainedModel, settings: TrainSettings, data_fingerprint: str) -> Iterator[Any]:
    """The model with a new adapter; afterwards it is as before, whatever happened."""
    training, use_cache = model.training, getattr(model.config, "use_cache", None)
    wrapped: Any = get_peft_model(model, peft_config(settings, model, data_fingerprint))
    try:
        yield wrapped
    finally:
        wrapped.unload()
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        model.config.use_cache = use_cache  # the Trainer switches it off
        model.train(training)


def peft_config(settings: TrainSettings, model: PreTrainedModel, data_fingerprint: str) -> SparseletConfig:
    """The tuner's configuration that these settings ask for, for data of this fingerprint."""
    return SparseletConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM,
        density=settings.density,
        block_size=settings.block_size,
        score=settings.score,
        scope=settings.scope,
        layer_drop=settings.layer_drop,
        initial_mask=settings.initial_mask,
        reselect_every=settings.reselect_every,
        selection_epochs=settings.selection_epochs,
        score_batches=settings.score_batches,
        offload=settings.offload,
        target_modules=list(settings.target_modules) or None,
        exclude_modules=list(settings.exclude_modules) or None,
        layers_to_transform=list(settings.layers) or None,
        seed=settings.seed,
        data_fingerprint=data_fingerprint,
    )


def work_directory(output: Path) -> Path:
    """Where a run keeps its checkpoints until it has finished."""
    return output.with_name(output.name + ".partial")


def _prepare(work: Path, settings: TrainSettings, task: Task) -> Path | None:
    """Make the work directory, or find the checkpoint to go on from. Raises ConfigError, WriteFailed."""
    # Through JSON, so that a run compares equal to what was written of it.
    described = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}
    described[DATA] = task.fingerprint()
    if not work.exists():
        with naming_failure(work):
            work.mkdir(parents=True)
        try:
            write_json(work / RUN_FILE, described)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        return None
    before = _read_run(work)
    changed = sorted(key for key in described if before.get(key) != described[key])
    if changed == [DATA]:
        raise ConfigError(f"the run at {work} was started with other rows in {settings.task}. Remove it to start again.")
    if changed:
        raise ConfigError(
            f"the run at {work} was started with {changed[0]} = {before.get(changed[0])!r}, not {described[changed[0]]!r}. "
            "Resume with the settings it was started with, or remove it first."
        )
    return _keep_whole(work)


def _keep_whole(work: Path) -> Path | None:
    """Remove the checkpoints that were not written to their end. Returns the last of the others."""
    for path in work.glob("checkpoint-*"):
        if not (path / COMPLETE).is_file():
            shutil.rmtree(path, ignore_errors=True)
    return max(work.glob("checkpoint-*"), key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _read_run(work: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((work / RUN_FILE).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{work / RUN_FILE} cannot be read, so the run cannot be resumed: {error}. Remove {work}.") from error


def _trainer(
    model: Any,
    collate: Any,
    rows: dict[str, list[Encoded]],
    settings: TrainSettings,
    work: Path,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(work.absolute()),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size // settings.gradient_accumulation,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        activation_checkpointing=settings.gradient_checkpointing,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        optim="adamw_torch_fused",
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        restore_callback_states_from_checkpoint=True,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_strategy="epoch",
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
    )
    extra: list[TrainerCallback] = [MaskSchedule(), _SaveEvery(settings.save_steps), *callbacks]
    if settings.patience:
        extra.append(EarlyStoppingCallback(early_stopping_patience=settings.patience))
    trainer = _Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=cast(Any, rows["train"]),
        eval_dataset=cast(Any, sorted(rows["validation"], key=_length)),
        callbacks=extra,
    )
    trainer.remove_callback(PrinterCallback)  # the command line shows its own progress
    return trainer


def _metadata(task: Task, settings: TrainSettings, state: TrainerState) -> dict[str, Any]:
    return {
        # The name that was asked for, which means the same on other machines, not a directory of the cache.
        "base_model_name_or_path": settings.model,
        "task": task.name,
        "chat_template": settings.chat_template,
        "metrics": {
            "validation_loss": state.best_metric,
            "best_step": state.best_global_step,
            "steps": state.global_step,
        },
    }


class _Trainer(Trainer):
    """A Trainer whose sampler groups rows by length and depends on seed and epoch alone, so that a resumed run sees the
    batches of an undisturbed one (transformers' own draws from the global generator); and that marks its checkpoints
    once they are whole."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows = cast(list[Encoded], self.train_dataset)
        return _LengthGroupedSampler([_length(row) for row in rows], self.args.train_batch_size, self.args.seed)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.args.output_dir is not None
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        # The last step of an epoch may be saved twice: after the step, and after the evaluation.
        (checkpoint / COMPLETE).unlink(missing_ok=True)
        with warnings.catch_warnings(), naming_failure(checkpoint, "Checkpoints before it are kept for --resume."):
            warnings.simplefilter("ignore", UnselectedMaskWarning)  # the masks will be selected when it goes on
            super()._save_checkpoint(model, trial)
            (checkpoint / COMPLETE).touch()
            self._drop_checkpoints(checkpoint.parent)

    def _drop_checkpoints(self, work: Path) -> None:
        """Keep the last two checkpoints and the best one. transformers would do so before the last one is marked."""
        best = work / f"checkpoint-{self.state.best_global_step}"
        for path in sorted(work.glob("checkpoint-*"), key=_step)[:-2]:
            if path != best:
                (path / COMPLETE).unlink(missing_ok=True)  # first, so that what is half removed is not taken for whole
                shutil.rmtree(path)


class _LengthGroupedSampler(Sampler[int]):
    """Random order, then sorted by length within groups of eight batches, then the batches shuffled."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = seeded(self.seed, "order", self.epoch)
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        group = 8 * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), group):
            rows = sorted(order[start : start + group], key=lambda row: -self.lengths[row])
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        # A short batch must stay last, or all batches after it would be cut at other rows.
        whole, rest = [b for b in batches if len(b) == self.batch_size], [b for b in batches if len(b) < self.batch_size]
        for i in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[i]
        for batch in rest:
            yield from batch


class _SaveEvery(TrainerCallback):
    """Asks for checkpoints between epochs."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            control.should_save = True


def _length(row: Encoded) -> int:
    return len(row["prompt"]) + len(row["target"])
