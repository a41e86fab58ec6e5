"""Scoring batches of a selection in a `Trainer`: rows of the training data, by the Trainer's own loss."""

import gc
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState, TrainingArguments

from sparselet.errors import SelectionError
from sparselet.tuner import SparseletConfig
from sparselet.tuner.mask_state import seeded


@dataclass(frozen=True)
class LossInputs:
    """Arguments of a Trainer's `compute_loss` beside the model: a micro-batch, and the number of labels in its full batch."""

    batch: Any
    items: Tensor | int | None


def trainer_of(state: TrainerState) -> Trainer | None:
    """The Trainer that has this state; callbacks do not get it. Searches all objects, in a fraction of a second."""
    # By type, since proxies and lazy modules may answer `isinstance` by doing things.
    return next((o for o in gc.get_objects() if Trainer in type(o).__mro__ and vars(o).get("state") is state), None)


def trainer_loss(trainer: Trainer) -> Callable[[nn.Module, LossInputs], Tensor]:
    """The loss that a Trainer trains with, as `reselect` takes it: its own `compute_loss`, in its own precision.

    Over several processes the mean of their losses is the loss of the full batch, as in training.
    """
    compute_loss = trainer.compute_loss

    def loss(model: nn.Module, inputs: LossInputs) -> Tensor:
        with trainer.compute_loss_context_manager():
            # A copy, since losses take the labels out of their batch.
            batch = dict(inputs.batch) if isinstance(inputs.batch, dict) else inputs.batch
            return cast(Tensor, compute_loss(model, batch, num_items_in_batch=inputs.items))

    return loss


def makes_batches(trainer: Trainer) -> bool:
    """Whether a Trainer makes what its loss takes in the training step, as those do that generate (GRPO, RLOO).

    Rows of its training data are then no batch for the loss.
    """
    return type(trainer)._prepare_inputs is not Trainer._prepare_inputs


def draw_rows(
    size: int, args: TrainingArguments, config: SparseletConfig, step: int, rows: Sequence[int] | None
) -> list[list[list[int]]]:
    """For each scoring batch this process's share of its rows, by micro-batch, drawn by the adapter's seed and the step.

    size: rows of the training data. rows: the numbers to draw from; by default all. A scoring batch has as many rows as an
    optimizer step takes over all processes and accumulation steps, in micro-batches of one forward pass; all processes get
    the same number of them. Raises SelectionError if there is no row for each process.
    """
    pool = range(size) if rows is None else rows
    if len(pool) < args.world_size:
        raise SelectionError(f"{len(pool)} training rows cannot be shared by {args.world_size} processes; start fewer.")
    order = [pool[i] for i in torch.randperm(len(pool), generator=seeded(config.seed, "scoring", step)).tolist()]
    micro_batch = args.per_device_train_batch_size * args.world_size
    batch_size = micro_batch * args.gradient_accumulation_steps
    batches = []
    for i in range(config.score_batches):
        drawn = [order[(i * batch_size + j) % len(order)] for j in range(min(batch_size, len(order)))]
        parts = min(-(-len(drawn) // micro_batch), len(drawn) // args.world_size)
        batches.append([drawn[part::parts][args.process_index :: args.world_size] for part in range(parts)])
    return batches


def collated(loader: DataLoader[Any], batches: Sequence[Sequence[Sequence[int]]], args: TrainingArguments) -> list[list[Any]]:
    """The rows of `draw_rows` as the Trainer's collator makes them, whatever it returns, on the training device."""
    dataset: Any = loader.dataset
    assert loader.collate_fn is not None
    return [[send_to_device(loader.collate_fn([dataset[i] for i in part]), args.device) for part in parts] for parts in batches]


def with_items(trainer: Trainer, batches: Sequence[Sequence[Any]]) -> list[LossInputs]:
    """The micro-batches of scoring batches, one after another, each with the number of labels in its scoring batch."""
    inputs = []
    for parts in batches:
        batch, items = trainer.get_batch_samples(iter(parts), len(parts), trainer.args.device)
        inputs += [LossInputs(part, items) for part in batch]
    return inputs


class StepInputs:
    """Records the inputs of a Trainer's loss in its last `steps` optimizer steps.

    For the time of a training it stands before the Trainer's `compute_loss`. before_first: called once, with the inputs of
    the first loss, before it is computed.
    """

    def __init__(self, trainer: Trainer, steps: int, before_first: Callable[[LossInputs], None] | None) -> None:
        self.trainer, self.before_first = trainer, before_first
        self.last: deque[LossInputs] = deque(maxlen=steps * trainer.args.gradient_accumulation_steps)
        self.compute_loss = trainer.compute_loss
        vars(trainer)["compute_loss"] = self

    def __call__(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own loss."""
        if torch.is_grad_enabled():  # not in evaluation
            batch = dict(inputs) if isinstance(inputs, dict) else inputs
            self.last.append(LossInputs(batch, kwargs.get("num_items_in_batch")))
            before_first, self.before_first = self.before_first, None
            if before_first is not None:
                before_first(self.last[-1])
        return self.compute_loss(model, inputs, *args, **kwargs)

    def remove(self) -> None:
        """Leave the Trainer as it was."""
        if vars(self.trainer).get("compute_loss") is self:
            del vars(self.trainer)["compute_loss"]
