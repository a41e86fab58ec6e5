"""`MaskSchedule`: the selection phase inside any transformers `Trainer`."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from sparselet.errors import SelectionError
from sparselet.training.processes import refuse_sharding, selected_on, shared_loss
from sparselet.tuner import SparseletConfig, freeze_masks, reselect
from sparselet.tuner.adapted import active_adapters, adapter_config, sparselet_layers
from sparselet.tuner.distributed import group_of, rebuild, require_same_start
from sparselet.tuner.layer import SparseletLayer, seeded
from sparselet.tuner.selection import Loss

logger = logging.getLogger("sparselet")

MIN_SELECTIONS = 4


class MaskSchedule(TrainerCallback):
    """Selects the masks of the active sparse adapter while a `Trainer` runs, and freezes them when the phase ends.

        Trainer(model=peft_model, callbacks=[MaskSchedule()], ...)

    All settings are the adapter's (`SparseletConfig`): a selection after every `reselect_every` optimizer steps during
    the first `selection_epochs` epochs. Where the phase is too short for four selections, the interval shrinks; a phase
    that ends without a selection selects once, at its end; `reselect_every=0` always does so. The log says so.

    Each selection scores on `score_batches` batches drawn from the training data by the adapter's seed and the step, so
    the order of the training data stays as it is, and a resumed run scores on the same rows.

    Over several processes (DistributedDataParallel) each scores on its share of such a batch, which then has as many rows as
    all processes take at a time, and all get the same masks.

    loss: a function of model and batch, for a Trainer with a loss of its own; by default the model's own. Over several
        processes it sees a share of the batch, and all shares count alike.
    rows: the numbers of the training rows that a step's scoring batches are drawn from; by default all.
    """

    def __init__(self, loss: Loss | None = None, rows: Callable[[int], Sequence[int]] | None = None) -> None:
        self.loss = loss
        self.rows = rows
        self.phase = 0
        self.interval = 0
        self.models: list[nn.Module] = []

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse, before a model is taken apart for it, what `on_train_begin` would refuse."""
        refuse_sharding(args, kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Plan the phase; with `initial_mask="gradient"`, select before the first step.

        Raises SelectionError for sharded training, processes without DistributedDataParallel or with different base weights,
        and training data that cannot be indexed.
        """
        self.phase = 0
        refuse_sharding(args, kwargs["model"])
        adapter = _selecting(kwargs["model"])
        if adapter is None:
            return
        config, layers = adapter
        self.models = selected_on(args, kwargs["model"])
        for model in self.models:
            if isinstance(model, DistributedDataParallel):
                require_same_start(layers, group_of(model))
                rebuild(model)  # what was loaded since it was made may have other shapes
        loader = kwargs["train_dataloader"]
        if not has_length(loader.dataset):
            raise SelectionError("scoring batches are drawn from the training data, which must have a length.")
        steps = max(1, -(-len(loader) // args.gradient_accumulation_steps))
        self.phase = max(1, min(round(config.selection_epochs * steps), state.max_steps))
        self.interval = min(config.interval, max(1, self.phase // MIN_SELECTIONS))
        if self.interval < config.interval:
            logger.warning(
                "the selection phase has %d optimizer steps, so masks are selected every %d instead of every %d.",
                self.phase,
                self.interval,
                config.interval,
            )
        if config.initial_mask == "gradient" and not _selections(layers, kwargs["model"]):
            self._select(args, state, kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After an optimizer step: select if the interval is over, and freeze the masks at the end of the phase."""
        if not self.phase or _selecting(kwargs["model"]) is None:
            return
        if self.interval and state.global_step % self.interval == 0 and state.global_step <= self.phase:
            self._select(args, state, kwargs)
        if state.global_step >= self.phase:
            self._end(args, state, kwargs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A phase cut short by the end of training ends here."""
        if self.phase and _selecting(kwargs["model"]) is not None:
            self._end(args, state, kwargs)
        self.models = []

    def _end(self, args: TrainingArguments, state: TrainerState, kwargs: Mapping[str, Any]) -> None:
        adapter = _selecting(kwargs["model"])
        assert adapter is not None
        if not _selections(adapter[1], kwargs["model"]):
            if self.interval:
                logger.warning("the selection phase ended before its first selection, so masks are selected now.")
            self._select(args, state, kwargs)
        freeze_masks(kwargs["model"])
        logger.info("step %d: masks are frozen.", state.global_step)

    def _select(self, args: TrainingArguments, state: TrainerState, kwargs: Mapping[str, Any]) -> None:
        adapter = _selecting(kwargs["model"])
        assert adapter is not None
        rows = None if self.rows is None else self.rows(state.global_step)
        batches = _scoring_batches(kwargs["train_dataloader"], adapter[0], state.global_step, args, rows)
        loss = shared_loss if self.loss is None and args.world_size > 1 else self.loss
        done = reselect(self.models[0], batches, kwargs["optimizer"], loss=loss)
        for model in self.models[1:]:
            assert isinstance(model, DistributedDataParallel)
            rebuild(model)
        logger.info(
            "step %d: masks selected: %d entries in %d targets, %.0f %% of them new.",
            state.global_step,
            done.entries,
            done.targets,
            100 * done.changed,
        )


def _scoring_batches(
    loader: DataLoader[Any], config: SparseletConfig, step: int, args: TrainingArguments, rows: Sequence[int] | None
) -> Iterator[dict[str, Any]]:
    """This process's share of each scoring batch. Raises SelectionError if there is no row for each process."""
    dataset: Any = loader.dataset
    size = args.per_device_train_batch_size * args.world_size
    pool = range(len(dataset)) if rows is None else rows
    if len(pool) < args.world_size:
        raise SelectionError(f"{len(pool)} training rows cannot be shared by {args.world_size} processes; start fewer.")
    order = [pool[i] for i in torch.randperm(len(pool), generator=seeded(config.seed, "scoring", step)).tolist()]
    assert loader.collate_fn is not None
    for i in range(config.score_batches):
        drawn = [order[(i * size + j) % len(order)] for j in range(min(size, len(order)))]
        batch = loader.collate_fn([dataset[row] for row in drawn[args.process_index :: args.world_size]])
        yield {key: value.to(args.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def _selecting(model: Any) -> tuple[SparseletConfig, dict[str, SparseletLayer]] | None:
    """The active adapter's config and layers, while its masks are still being selected."""
    names = active_adapters(model)
    if len(names) != 1:
        raise SelectionError(f"exactly one adapter must be active in training; active are {names}.")
    name = names[0]
    layers = sparselet_layers(model, name)
    if not any(layer.sparse_mask[name].selecting for layer in layers.values()):
        return None
    return adapter_config(model, name), layers


def _selections(layers: Mapping[str, SparseletLayer], model: Any) -> int:
    name = active_adapters(model)[0]
    return max(layer.sparse_mask[name].selections for layer in layers.values())
