"""The transformers `Trainer` of a run: its arguments, batches, validation, and resumable checkpoints."""

import contextlib
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from sparselet.errors import MissingTensor, TrainingDiverged
from sparselet.generation.prefix import model_inputs, token_loss
from sparselet.io.atomic import atomic_write, flush
from sparselet.io.write_errors import convert_write_errors
from sparselet.training.collate import IGNORED, Encoded
from sparselet.training.methods import TrainableModel
from sparselet.training.processes import needs_cpu, share_of_batch
from sparselet.training.run_directory import COMPLETE, checkpoint_step
from sparselet.training.sampling import LengthGroupedSampler, Rows, without_labels
from sparselet.training.settings import TrainSettings
from sparselet.tuner import UnselectedMaskWarning


def make_trainer(
    trainable: TrainableModel,
    collate: Any,
    rows: Mapping[str, Mapping[str, Sequence[Encoded]]],
    settings: TrainSettings,
    work: Path,
    callbacks: Sequence[TrainerCallback],
) -> "RunTrainer":
    """The Trainer of a run, which keeps its checkpoints in `work`. rows: of the splits `train` and `validation`, by task.

    settings: with a number as `learning_rate`.
    """
    share = share_of_batch(settings.batch_size, settings.gradient_accumulation)
    arguments = TrainingArguments(
        output_dir=str(work.absolute()),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=share,
        per_device_eval_batch_size=share,
        gradient_accumulation_steps=settings.gradient_accumulation,
        activation_checkpointing=settings.gradient_checkpointing,
        learning_rate=cast(float, settings.learning_rate),
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
        use_cpu=needs_cpu(),
    )
    all_callbacks: list[TrainerCallback] = [_SaveEvery(settings.save_steps), _LossRecord(), *trainable.callbacks, *callbacks]
    if settings.patience:
        all_callbacks.append(_EarlyStopping(early_stopping_patience=settings.patience))
    validation = {task: sorted(task_rows, key=length) for task, task_rows in rows["validation"].items()}
    trainer = RunTrainer(
        model=trainable.module,
        args=arguments,
        data_collator=without_labels(collate, IGNORED),
        train_dataset=Rows([row for task_rows in rows["train"].values() for row in task_rows]),
        eval_dataset=cast(Any, validation),
        compute_loss_func=partial(token_loss, cast(Any, trainable.module).config.is_encoder_decoder),
        callbacks=all_callbacks,
    )
    trainer.sizes = [len(task_rows) for task_rows in rows["train"].values()]
    trainer.autocast = trainable.autocast
    trainer.remove_callback(PrinterCallback)  # the command line shows its own progress
    return trainer


def length(row: Encoded) -> int:
    """Tokens of a row."""
    return len(row["prompt"]) + len(row["target"])


class RunTrainer(Trainer):
    """A Trainer with the sampler of `sampling`, the loss of `prefix`, and a validation loss that does not depend on batches and
    weights tasks equally. Losses and the decision to stop early survive a resume. Checkpoints are marked when complete, and
    hold trained weights only."""

    sizes: Sequence[int] = ()  # training rows of each task
    autocast: torch.dtype | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        lengths = [length(row) for row in cast(Rows, self.train_dataset).rows]
        # Grouped by the rows of an optimizer step, over all processes and accumulation steps.
        micro_batch = self.args.train_batch_size * self.args.world_size
        step = micro_batch * self.args.gradient_accumulation_steps
        multiple = micro_batch if self.args.world_size > 1 else 1
        return LengthGroupedSampler(lengths, step, self.args.seed, self.sizes, multiple)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # by a callback, before the first epoch of a resumed run
            super()._run_epoch(*args, **kwargs)

    @property
    def _losses(self) -> "_LossRecord":
        return next(c for c in self.callback_handler.callbacks if isinstance(c, _LossRecord))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A forward and backward pass, whose loss is recorded."""
        loss = super().training_step(*args, **kwargs)
        self._losses.add(cast(Tensor, self.accelerator.reduce(loss, "mean")))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the training losses of an uninterrupted run. Raises TrainingDiverged for NaN or infinity."""
        if "loss" in logs:
            logs["loss"] = self._losses.since_logged(self.state.global_step)
        if "train_loss" in logs:
            logs["train_loss"] = self._losses.total / max(1, self.state.global_step)
        for name, value in logs.items():
            if isinstance(value, float) and not math.isfinite(value):
                done = f"{self.state.global_step} of {self.state.max_steps}"
                raise TrainingDiverged(
                    f"training diverged: {name} is {value} after step {done}. Nothing was written; start again with a lower "
                    f"learning rate than {self.args.learning_rate:g}, or look at the rows."
                )
        super().log(logs, start_time)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager[Any]:
        """The context of forward passes."""
        if self.autocast is None:
            return super().autocast_smart_context_manager(cache_enabled)
        return torch.autocast(self.args.device.type, self.autocast, cache_enabled=cache_enabled)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss, of rows that may continue a shared prefix."""
        assert self.model is not None  # which `model` may be a DistributedDataParallel around
        return super().compute_loss(model, model_inputs(self.model, inputs), *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The validation loss: the mean over a task's target tokens; of several tasks the mean of their losses, and each."""
        tasks: Mapping[str, Sequence[Encoded]] = cast(Any, self.eval_dataset) if eval_dataset is None else eval_dataset
        losses = {f"{metric_key_prefix}_{task}_loss": self._validation_loss(rows) for task, rows in tasks.items()}
        metrics = {f"{metric_key_prefix}_loss": sum(losses.values()) / len(losses), **(losses if len(losses) > 1 else {})}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _validation_loss(self, rows: Sequence[Encoded]) -> float:
        """The mean over the rows' target tokens, independent of processes and batches."""
        model: Any = self.model
        model.eval()
        share = rows[self.args.process_index :: self.args.world_size]
        sums = torch.zeros(2, dtype=torch.float64, device="cpu")
        for batch in DataLoader(cast(Any, share), self.args.eval_batch_size, collate_fn=self.data_collator):
            inputs = self._prepare_inputs(batch)
            labels = inputs.pop("labels")
            with self.compute_loss_context_manager():
                outputs = model(**model_inputs(model, inputs))
            loss = token_loss(model.config.is_encoder_decoder, outputs, labels, torch.ones(()))
            sums += torch.tensor([float(loss), float(labels.ne(IGNORED).sum())], dtype=torch.float64)
        total, count = cast(Tensor, self.accelerator.reduce(sums.to(self.args.device), "sum")).tolist()
        return total / count

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.args.output_dir is not None
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        # A step may be saved twice, if a callback of the caller requests it.
        if self.args.should_save and (checkpoint / COMPLETE).exists():
            (checkpoint / COMPLETE).unlink()
            flush(checkpoint)
        self.accelerator.wait_for_everyone()
        with warnings.catch_warnings(), convert_write_errors(checkpoint, "Earlier checkpoints are kept for resuming."):
            warnings.simplefilter("ignore", UnselectedMaskWarning)  # the masks will be selected after a resume
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes the state of its own generators
            if self.args.should_save:
                flush(checkpoint)
                with atomic_write(checkpoint / COMPLETE):
                    pass
                self._drop_checkpoints(checkpoint.parent)

    def _drop_checkpoints(self, work: Path) -> None:
        """Keep the last two checkpoints and the best one. transformers would do so before the last one is marked."""
        best = work / f"checkpoint-{self.state.best_global_step}"
        for path in sorted(work.glob("checkpoint-*"), key=checkpoint_step)[:-2]:
            if path != best:
                (path / COMPLETE).unlink(missing_ok=True)  # first, so that a partly removed checkpoint is not complete
                shutil.rmtree(path)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Of a plain model transformers would save the frozen weights too, under the names of published checkpoints, which
        # for some models are not those it looks for when it resumes.
        if isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
            return
        assert self.model is not None
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}
        safetensors.torch.save_file(tensors, Path(output_dir) / SAFE_WEIGHTS_NAME)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Called for plain models only; the frozen weights are rightly missing.
        assert self.model is not None
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        mismatched = sorted({*trained.intersection(load_result.missing_keys), *load_result.unexpected_keys})
        if mismatched:
            raise MissingTensor(
                f"the checkpoint to resume from does not fit the model: {mismatched[0]} ({len(mismatched)} such)."
            )


class _SaveEvery(TrainerCallback):
    """Requests checkpoints between epochs. The last step of an epoch is saved after its evaluation, which a resumed run would
    otherwise skip."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert state.epoch is not None
        last = state.epoch == round(state.epoch) or state.global_step == state.max_steps
        if self.interval and state.global_step % self.interval == 0 and not last:
            control.should_save = True


class _EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping; a resumed run that had stopped does not train further."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


class _LossRecord(TrainerCallback, ExportableState):
    """The sums of the losses of all steps, and of those since the last log entry; they are saved with each checkpoint."""

    def __init__(self) -> None:
        self.logged, self.pending, self.step = 0.0, torch.zeros(()), 0

    def add(self, loss: Tensor) -> None:
        """Count the loss of a micro-batch."""
        self.pending = self.pending.to(loss.device) + loss

    def since_logged(self, step: int) -> float:
        """The mean loss of the steps since this was last called."""
        total, steps = float(self.pending), step - self.step
        self.logged, self.pending, self.step = self.logged + total, torch.zeros(()), step
        return total / steps

    @property
    def total(self) -> float:
        """The sum of all losses."""
        return self.logged + float(self.pending)

    def state(self) -> dict[str, Any]:
        """The state in a checkpoint."""
        return {"args": {}, "attributes": {"sums": self.sums}}

    @property
    def sums(self) -> list[float]:
        """The sum until the last log entry, the sum since, and the step of that entry."""
        return [self.logged, float(self.pending), self.step]

    @sums.setter
    def sums(self, sums: Sequence[float]) -> None:
        self.logged, self.pending, self.step = sums[0], torch.tensor(sums[1]), int(sums[2])
