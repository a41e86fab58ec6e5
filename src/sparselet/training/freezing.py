"""Entries that training must not change: the masks of adapters, such as the cores of earlier tasks."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparselet.adapter import AdapterFile
from sparselet.apply import target_weights
from sparselet.delta import SparseDelta
from sparselet.errors import ConfigError, prefix_errors
from sparselet.names import Names, target_name
from sparselet.tuner.layer import SparseletLayer
from sparselet.tuner.selection import select_without_data


class FrozenEntries(TrainerCallback):
    """Keeps entries of parameters bit for bit: their gradients are 0, and after each optimizer step they are written back.

    Writing back also undoes weight decay and moments; gradients of 0 keep the entries out of gradient clipping.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[nn.Parameter, torch.Size, Tensor, Tensor]] = []
        self.hooks: list[Any] = []

    def keep(self, parameter: nn.Parameter, entries: Tensor) -> None:
        """Keep these entries, flat int64 [n], at their current values for as long as the parameter has its current shape."""
        entries, shape = entries.to(parameter.device), parameter.shape
        self.kept.append((parameter, shape, entries, parameter.detach().reshape(-1)[entries].clone()))

        def strike(updated: Tensor) -> None:
            if updated.grad is not None and updated.grad.shape == shape:
                updated.grad.view(-1).index_fill_(0, entries.to(updated.device), 0)

        self.hooks.append(parameter.register_post_accumulate_grad_hook(strike))

    @torch.no_grad()
    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the entries back."""
        for parameter, shape, entries, values in self.kept:
            if parameter.shape == shape:
                place = parameter.device
                parameter.view(-1).index_copy_(0, entries.to(place), values.to(place))


def frozen_entries(model: nn.Module, adapters: Sequence[AdapterFile]) -> dict[str, Tensor]:
    """The entries of all masks by the model's target names, flat int64, ascending.

    Raises UnknownTarget, ShapeMismatch and WrongBase for a mask that is not of this model, naming the adapter.
    """
    entries: dict[str, Tensor] = {}
    for adapter in adapters:
        with prefix_errors(f"freeze: {adapter.path}"):
            target_weights(model, adapter)
            for name, target in Names(model).find(adapter).items():
                masks = [entries[target]] if target in entries else []
                entries[target] = torch.cat([*masks, adapter[name].expand().indices.long()]).unique()
    return entries


@contextlib.contextmanager
def freeze_weights(frozen: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> Iterator[FrozenEntries]:
    """Within the block the callback keeps entries of the trained parameters, which are named as in the model."""
    callback = FrozenEntries()
    for name, parameter in parameters.items():
        if (target := target_name(name)) in frozen:
            callback.keep(parameter, frozen[target])
    try:
        yield callback
    finally:
        for hook in callback.hooks:
            hook.remove()


def freeze_layers(layers: Mapping[str, SparseletLayer], adapter: str, frozen: Mapping[str, Tensor]) -> FrozenEntries:
    """Keep the entries of a sparse adapter: those in its mask stay as they are, and no selection chooses the others.

    A block with a frozen entry is left out whole. Raises ConfigError if no entry can be trained.
    """
    callback = FrozenEntries()
    for target, entries in frozen.items():
        layer = layers.get(target)
        if layer is not None and len(entries):
            layer.sparse_mask[adapter].excluded = _blocks(entries, layer, adapter).to(layer.base_weight.device)
    _select_again(layers, adapter)
    free = 0
    for target, layer in layers.items():
        state, parameter = layer.sparse_mask[adapter], layer.sparse_values[adapter]
        kept = torch.empty(0, dtype=torch.int64)
        if target in frozen and (state.dense or state.selections):
            kept = frozen[target] if state.dense else _places(layer.delta(adapter), frozen[target])
        if len(kept):
            callback.keep(parameter, kept)
        free += parameter.numel() - len(kept)
    if not free:
        raise ConfigError("freeze: the adapters cover every entry that would be trained. Leave some out, or train more.")
    return callback


def _select_again(layers: Mapping[str, SparseletLayer], adapter: str) -> None:
    """Select masks that were selected without data, before the frozen entries were known, without these."""
    config = next(iter(layers.values())).sparse_config[adapter]
    if config.targets is not None:  # of the adapter that a second stage starts from
        return
    if config.when != "paper":
        for layer in layers.values():
            layer.sparse_mask[adapter].selections, layer.sparse_mask[adapter].selecting = 0, True
        select_without_data(layers, adapter, config)
        return
    for layer in layers.values():  # a random start
        state, mask = layer.sparse_mask[adapter], layer.sparse_indices[adapter]
        if state.excluded is not None and state.selections:
            layer.set_mask(adapter, mask[~torch.isin(mask, state.excluded)])


def _blocks(entries: Tensor, layer: SparseletLayer, adapter: str) -> Tensor:
    """The blocks that hold these entries, ascending."""
    (_, columns), (h, w) = layer.shape, layer.sparse_mask[adapter].block
    return (entries // columns // h * (columns // w) + entries % columns // w).unique()


def _places(delta: SparseDelta, entries: Tensor) -> Tensor:
    """Where a delta's flat values hold these entries of the target, int64."""
    places = torch.arange(delta.nnz, dtype=torch.float64).view(delta.values.shape)
    mask = SparseDelta(delta.shape, entries, torch.zeros(len(entries)))
    return SparseDelta(delta.shape, delta.indices, places).restrict(mask).values.long()
