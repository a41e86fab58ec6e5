"""`MaskSchedule`: the selection phase inside any transformers `Trainer`."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from sparselet.errors import SelectionError
from sparselet.training.processes import refuse_sharding, selected_on
from sparselet.training.scoring import (
    LossInputs,
    StepInputs,
    collated,
    draw_rows,
    makes_batches,
    trainer_loss,
    trainer_of,
    with_items,
)
from sparselet.tuner import SparseletConfig, freeze_masks, reselect
from sparselet.tuner.adapted import active_adapters, sparselet_config, sparselet_layers
from sparselet.tuner.distributed import group_of, rebuild, require_same_start
from sparselet.tuner.layer import SparseletLayer
from sparselet.tuner.selection import Loss

logger = logging.getLogger("sparselet")

MIN_SELECTIONS = 4


class MaskSchedule(TrainerCallback):
    """Selects the masks of the active sparse adapter while a `Trainer` runs, and freezes them when the phase ends.

        Trainer(model=peft_model, callbacks=[MaskSchedule()], ...)

    All settings are the adapter's (`SparseletConfig`). With `when="static"` masks are selected once, before the first step, and
    nothing is left to do. With `when="refresh"` the same, and then a fraction of each mask is exchanged after every
    `reselect_every` optimizer steps during the first `selection_epochs` epochs. With `when="paper"`: a selection after every
    `reselect_every` optimizer steps during the first `selection_epochs` epochs. Where the phase is too short for four
    selections, the interval shrinks; a phase that ends without a selection selects once, at its end; `reselect_every=0` always
    does so. The log says so.

    Each selection scores on `score_batches` batches drawn from the training data by the adapter's seed and the step, so
    the order of the training data stays as it is, and a resumed run scores on the same rows. A scoring batch has as many rows
    as an optimizer step takes over all accumulation steps and processes (DistributedDataParallel), of which each process
    scores its share, and all get the same masks. The loss is the Trainer's own `compute_loss`, whatever it is.

    A Trainer that makes its batches in the training step, as those that generate do (GRPO, RLOO), is scored on what its
    last `score_batches` steps were trained on; `initial_mask="gradient"` on the first micro-batch.

    loss: a function of model and collated batch, to score by another loss than the Trainer's. It sees one micro-batch of one
        process at a time, and all count alike.
    rows: the numbers of the training rows that a step's scoring batches are drawn from; by default all.
    """

    def __init__(self, loss: Loss | None = None, rows: Callable[[int], Sequence[int]] | None = None) -> None:
        self.loss = loss
        self.rows = rows
        self.phase = 0
        self.interval = 0
        self.models: list[nn.Module] = []
        self.trainer: Trainer | None = None
        self.scoring_loss: Callable[[nn.Module, Any], Tensor] | None = None
        self.step_inputs: StepInputs | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse, before a model is taken apart for it, what `on_train_begin` would refuse."""
        refuse_sharding(args, kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Plan the phase; with `when` "static" or "refresh", or `initial_mask` "gradient", select before the first step.

        Raises SelectionError for sharded training, processes without DistributedDataParallel or with different base weights,
        and training data that cannot be indexed.
        """
        self.phase = 0
        self._forget()
        refuse_sharding(args, kwargs["model"])
        adapter = _selecting(kwargs["model"])
        if adapter is None:
            return
        config, layers = adapter
        self.models = selected_on(args, kwargs["model"])
        for model in self.models:
            if isinstance(model, DistributedDataParallel):
                require_same_start(layers, group_of(model))
                rebuild(model)  # tensors loaded since it was created may have other shapes
        loader = kwargs["train_dataloader"]
        if not has_length(loader.dataset):
            raise SelectionError("scoring batches are drawn from the training data, which must have a length.")
        if config.when != "static":
            self._plan(config, state, -(-len(loader) // args.gradient_accumulation_steps))
        self.trainer = None if self.loss is not None else trainer_of(state)
        self.scoring_loss = self.loss if self.trainer is None else trainer_loss(self.trainer)
        at_once = config.when != "paper" or config.initial_mask == "gradient"
        unselected = at_once and not _selections(layers, kwargs["model"])
        if self.trainer is not None and makes_batches(self.trainer):
            before_first = (lambda inputs: self._select_first(args, state, kwargs, [inputs])) if unselected else None
            self.step_inputs = StepInputs(self.trainer, config.score_batches, before_first)
        elif unselected:
            self._select_first(args, state, kwargs)

    def _plan(self, config: SparseletConfig, state: TrainerState, steps: int) -> None:
        """Set the length of the phase and the interval, of an epoch of so many steps."""
        self.phase = max(1, min(round(config.selection_epochs * max(1, steps)), state.max_steps))
        interval = config.selection.interval
        self.interval = min(interval, max(1, self.phase // MIN_SELECTIONS))
        if self.interval < interval:
            logger.warning(
                "the selection phase has %d optimizer steps, so masks are selected every %d instead of every %d.",
                self.phase,
                self.interval,
                interval,
            )

    def _select_first(
        self,
        args: TrainingArguments,
        state: TrainerState,
        kwargs: Mapping[str, Any],
        inputs: Iterable[LossInputs] | None = None,
    ) -> None:
        """Select before the first step; a static mask is then frozen."""
        self._select(args, state, kwargs, inputs)
        if not self.phase:
            freeze_masks(kwargs["model"])

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
        self._forget()

    def _forget(self) -> None:
        if self.step_inputs is not None:
            self.step_inputs.remove()
        self.models, self.trainer, self.scoring_loss, self.step_inputs = [], None, None, None

    def _end(self, args: TrainingArguments, state: TrainerState, kwargs: Mapping[str, Any]) -> None:
        adapter = _selecting(kwargs["model"])
        assert adapter is not None
        if not _selections(adapter[1], kwargs["model"]):
            if self.interval:
                logger.warning("the selection phase ended before its first selection, so masks are selected now.")
            self._select(args, state, kwargs)
        freeze_masks(kwargs["model"])
        logger.info("step %d: masks are frozen.", state.global_step)

    def _select(
        self,
        args: TrainingArguments,
        state: TrainerState,
        kwargs: Mapping[str, Any],
        inputs: Iterable[LossInputs] | None = None,
    ) -> None:
        batches = self._scoring_batches(args, state, kwargs) if inputs is None else inputs
        progress = state.global_step / self.phase if self.phase else 0.0
        done = reselect(self.models[0], batches, kwargs["optimizer"], loss=self.scoring_loss, progress=min(1.0, progress))
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

    def _scoring_batches(self, args: TrainingArguments, state: TrainerState, kwargs: Mapping[str, Any]) -> Iterable[Any]:
        """What the scoring loss takes, for each micro-batch of this process."""
        if self.step_inputs is not None:
            return list(self.step_inputs.last)
        adapter, loader = _selecting(kwargs["model"]), kwargs["train_dataloader"]
        assert adapter is not None
        rows = None if self.rows is None else self.rows(state.global_step)
        batches = collated(loader, draw_rows(len(loader.dataset), args, adapter[0], state.global_step, rows), args)
        return [part for parts in batches for part in parts] if self.trainer is None else with_items(self.trainer, batches)


def _selecting(model: Any) -> tuple[SparseletConfig, dict[str, SparseletLayer]] | None:
    """The active adapter's config and layers, while its masks are still being selected."""
    names = active_adapters(model)
    if len(names) != 1:
        raise SelectionError(f"exactly one adapter must be active in training; active are {names}.")
    name = names[0]
    layers = sparselet_layers(model, name)
    if not any(layer.sparse_mask[name].selecting for layer in layers.values()):
        return None
    return sparselet_config(model, name), layers


def _selections(layers: Mapping[str, SparseletLayer], model: Any) -> int:
    name = active_adapters(model)[0]
    return max(layer.sparse_mask[name].selections for layer in layers.values())
