"""A transformers `Trainer` for a run: its arguments, batches, validation, and checkpoints that can be gone on from."""

import contextlib
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from sparselet.errors import MissingTensor
from sparselet.files import atomic_write, flush, naming_failure
from sparselet.training.collate import Encoded
from sparselet.training.prefix import begun
from sparselet.training.sampling import LengthGroupedSampler
from sparselet.training.settings import TrainSettings
from sparselet.tuner import UnselectedMaskWarning

COMPLETE = "complete"  # marks a checkpoint that was written to its end


def make_trainer(
    model: nn.Module,
    collate: Any,
    rows: Mapping[str, Mapping[str, Sequence[Encoded]]],
    settings: TrainSettings,
    work: Path,
    callbacks: Sequence[TrainerCallback],
    autocast: torch.dtype | None = None,
) -> "RunTrainer":
    """The Trainer of a run, which keeps its checkpoints in `work`.

    rows: of the splits `train` and `validation`, by task. autocast: compute in this dtype, whatever the weights' is.
    """
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
    extra: list[TrainerCallback] = [_SaveEvery(settings.save_steps), *callbacks]
    if settings.patience:
        extra.append(EarlyStoppingCallback(early_stopping_patience=settings.patience))
    validation = {task: sorted(own, key=length) for task, own in rows["validation"].items()}
    trainer = RunTrainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=cast(Any, [row for own in rows["train"].values() for row in own]),
        eval_dataset=cast(Any, validation if len(validation) > 1 else next(iter(validation.values()))),
        callbacks=extra,
    )
    trainer.sizes = [len(own) for own in rows["train"].values()]
    trainer.autocast = autocast
    trainer.remove_callback(PrinterCallback)  # the command line shows its own progress
    return trainer


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer steps done when a checkpoint was written, by its name."""
    return int(checkpoint.name.rpartition("-")[2])


def length(row: Encoded) -> int:
    """Tokens of a row."""
    return len(row["prompt"]) + len(row["target"])


class RunTrainer(Trainer):
    """A Trainer with the sampler of `sampling`, a validation loss in which tasks count alike, and checkpoints that are
    marked once they are whole and hold no more than what is trained."""

    sizes: Sequence[int] = ()  # training rows of each task
    autocast: torch.dtype | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        lengths = [length(row) for row in cast(list[Encoded], self.train_dataset)]
        return LengthGroupedSampler(lengths, self.args.train_batch_size, self.args.seed, self.sizes)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager[Any]:
        """What forward passes run in."""
        if self.autocast is None:
            return super().autocast_smart_context_manager(cache_enabled)
        return torch.autocast(self.args.device.type, self.autocast, cache_enabled=cache_enabled)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss, of rows that may go on from a shared beginning."""
        return super().compute_loss(model, begun(model, inputs), *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The validation loss; of several tasks the mean of theirs, with each task's beside it."""
        tasks = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(tasks, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        for task, rows in tasks.items():
            prefix = f"{metric_key_prefix}_{task}"
            found = self.evaluation_loop(self.get_eval_dataloader(rows), "Evaluation", True, ignore_keys, prefix).metrics
            assert found is not None
            metrics[f"{prefix}_loss"] = found[f"{prefix}_loss"]
        metrics[f"{metric_key_prefix}_loss"] = sum(metrics.values()) / len(metrics)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.args.output_dir is not None
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        # The last step of an epoch may be saved twice: after the step, and after the evaluation.
        if (checkpoint / COMPLETE).exists():
            (checkpoint / COMPLETE).unlink()
            flush(checkpoint)
        with warnings.catch_warnings(), naming_failure(checkpoint, "Checkpoints before it are kept for --resume."):
            warnings.simplefilter("ignore", UnselectedMaskWarning)  # the masks will be selected when it goes on
            super()._save_checkpoint(model, trial)
            flush(checkpoint)
            with atomic_write(checkpoint / COMPLETE):
                pass
            self._drop_checkpoints(checkpoint.parent)

    def _drop_checkpoints(self, work: Path) -> None:
        """Keep the last two checkpoints and the best one. transformers would do so before the last one is marked."""
        best = work / f"checkpoint-{self.state.best_global_step}"
        for path in sorted(work.glob("checkpoint-*"), key=checkpoint_step)[:-2]:
            if path != best:
                (path / COMPLETE).unlink(missing_ok=True)  # first, so that what is half removed is not taken for whole
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
        wrong = sorted({*trained.intersection(load_result.missing_keys), *load_result.unexpected_keys})
        if wrong:
            raise MissingTensor(f"the checkpoint to go on from does not fit the model: {wrong[0]} ({len(wrong)} such).")


class _SaveEvery(TrainerCallback):
    """Asks for checkpoints between epochs."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            control.should_save = True
