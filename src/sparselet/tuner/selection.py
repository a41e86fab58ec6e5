"""Mask selection in training: `reselect`, and `freeze_masks` to end the selection phase."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparselet import kernels
from sparselet.errors import SelectionError
from sparselet.masks import layer_of
from sparselet.scores import get_score
from sparselet.tuner.adapted import active_adapters, sparselet_config, sparselet_layers
from sparselet.tuner.config import SparseletConfig
from sparselet.tuner.distributed import group_of, rebuild
from sparselet.tuner.layer import SparseletLayer
from sparselet.tuner.moments import Seeds, move_moments, require_movable
from sparselet.tuner.scorer import Loss, Scorer, offload, score_batches
from sparselet.tuner.weights import is_sharded


@dataclass(frozen=True)
class Selection:
    """The result of one selection: targets with entries, entries kept, their fraction that is new, layers with entries."""

    targets: int
    entries: int
    changed: float
    active_layers: int


def reselect(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss: Loss | None = None,
    progress: float = 0.0,
) -> Selection:
    """Select the active adapter's masks (paper, Algorithm 1; deviation: several batches can be averaged).

    Runs forward and backward on each of `batches` at W + Ŵ with no mask, scores every entry by the config's score, and
    keeps the best. With `when="paper"` values that leave the mask are kept during the selection phase and return if selected
    again; with `initial_mask` other than "dense" they are dropped. With `when="refresh"` every selection after the first
    exchanges a fraction `replaced · (1 − progress)` of each mask: the entries that moved least leave it, and the score chooses
    new ones. With `optimizer`, its moments are moved too: entries that stay keep theirs, new entries start from zero under the
    optimizer's own step count, or from the scoring batches' gradients (refresh; `moments.move_moments`). Call it after
    `optimizer.step()`; gradients of the adapter are dropped, those of other parameters are not changed.

    model: a `PeftModel` with exactly one active, trainable sparse adapter; or `DistributedDataParallel` around one. Each
        process then passes its own batches, the same number on all: gradients are averaged over the processes, all get the
        masks of the first, and the wrapper is rebuilt. Scoring passes use the module inside the wrapper.
    batches: arguments of `loss`; by default keyword arguments of the model, whose output must have a `loss`. Not read if the
        score needs no data. progress: of the selection phase, from 0 to 1.
    Raises SelectionError (no batch, no loss, several adapters, an optimizer or a wrapper that does not support a changing
    mask), NonFiniteScore.
    """
    group = group_of(model) if isinstance(model, DistributedDataParallel) else None
    module = model.module if isinstance(model, DistributedDataParallel) else model
    config, name, layers = _trained_layers(module)
    if optimizer is not None:
        for layer in layers.values():
            require_movable(optimizer, layer.sparse_values[name], layer.target_name)
    first = not any(layer.sparse_mask[name].selections for layer in layers.values())
    score = "gm" if first and config.when == "paper" and config.initial_mask == "gradient" else config.score
    exchange = config.replaced * (1 - progress) if config.when == "refresh" and not first else None
    scorer = Scorer(layers, name, config, get_score(score), group, exchange)
    if scorer.needs_data:
        score_batches(module, batches, loss, scorer)
    masks = scorer.masks()
    if not scorer.any_nonzero:
        warnings.warn(
            f"every {score} score is 0, so the masks are the lowest indices. Train some steps before the first "
            "selection, or use a score that needs no values, such as gm.",
            stacklevel=2,
        )
    blocks = changed = 0
    for target, layer in layers.items():
        previous = _current_mask(layer, name)
        _move_mask(layer, name, masks[target], config, optimizer, scorer.seeds.get(target))
        changed += _count_new(previous, masks[target])
        blocks += masks[target].numel()
    if isinstance(model, DistributedDataParallel):
        rebuild(model)
    kept = [target for target in masks if masks[target].numel()]
    return Selection(
        targets=len(kept),
        entries=sum(layer.sparse_values[name].numel() for layer in layers.values()),
        changed=changed / max(1, blocks),
        active_layers=len({layer_of(target) for target in kept}),
    )


def select_without_data(layers: Mapping[str, SparseletLayer], name: str, config: SparseletConfig) -> None:
    """Select the masks of a new adapter where that takes no data; static ones are then frozen.

    With `when` "static" or "refresh" and a score of the weights alone, or at random. An adapter that has masks keeps them.
    """
    score = get_score(config.score)
    if config.when == "paper" or score.needs_data or not layers:
        return
    if any(layer.sparse_mask[name].selections or not layer.sparse_mask[name].selecting for layer in layers.values()):
        return
    masks = Scorer(dict(layers), name, config, score, None).masks()
    for target, layer in layers.items():
        layer.set_mask(name, masks[target])
        layer.sparse_mask[name].selections = 1
        layer.sparse_mask[name].selecting = config.when == "refresh"


def freeze_masks(model: nn.Module) -> None:
    """End the selection phase: the masks stay, and off-mask values are dropped.

    Raises SelectionError if a mask was never selected.
    """
    _, name, layers = _trained_layers(model)
    unselected = [target for target, layer in layers.items() if not layer.sparse_mask[name].selections]
    if unselected:
        raise SelectionError(f"the mask of {unselected[0]} was never selected; call sparselet.reselect(model, batches) first.")
    for layer in layers.values():
        layer.sparse_mask[name].pending = None
        layer.sparse_mask[name].selecting = False


def _trained_layers(model: nn.Module) -> tuple[SparseletConfig, str, dict[str, SparseletLayer]]:
    """The active adapter's configuration, name and trainable layers. Raises SelectionError if masks cannot be selected."""
    names = active_adapters(model)
    if len(names) != 1:
        raise SelectionError(f"exactly one adapter must be active to select its mask; active are {names}.")
    layers = {
        target: layer
        for target, layer in sparselet_layers(model, names[0]).items()
        if layer.sparse_values[names[0]].requires_grad
    }
    if not layers:
        raise SelectionError(f"adapter {names[0]!r} is not trainable, so its mask cannot be selected.")
    if any(is_sharded(layer.base_weight) for layer in layers.values()):
        raise SelectionError(
            "the weights are DTensors, of which each process holds a part, so masks cannot be selected. Select and freeze them "
            "before the model is sharded, or train with DistributedDataParallel."
        )
    if any(layer.merged_adapters for layer in layers.values()):
        raise SelectionError(f"adapter {names[0]!r} is merged, so no gradient reaches it; call unmerge_adapter() first.")
    if not all(layer.sparse_mask[names[0]].selecting for layer in layers.values()):
        raise SelectionError(f"the masks of adapter {names[0]!r} are frozen; its selection phase has ended.")
    return sparselet_config(model, names[0]), names[0], layers


def _current_mask(layer: SparseletLayer, name: str) -> Tensor | None:
    """The current mask, or None while all entries are trained."""
    return None if layer.sparse_mask[name].dense else layer.sparse_indices[name]


def _count_new(before: Tensor | None, after: Tensor) -> int:
    if before is None:
        return 0
    return int((~torch.isin(after, before.to(after.device), assume_unique=True)).sum())


def _move_mask(
    layer: SparseletLayer,
    name: str,
    blocks: Tensor,
    config: SparseletConfig,
    optimizer: torch.optim.Optimizer | None,
    seeds: Seeds | None,
) -> None:
    """Set one target's mask, and move values and optimizer moments with their entries."""
    state, parameter = layer.sparse_mask[name], layer.sparse_values[name]
    blocks = blocks.to(parameter.device)
    previous = _current_mask(layer, name)
    dense = layer.dense_values(name)
    layer.set_mask(name, blocks, kernels.gather(dense, blocks, state.block))
    if config.when == "paper" and config.initial_mask == "dense":
        state.pending = offload(dense) if config.offload else dense
    state.selections += 1
    if optimizer is not None:
        move_moments(optimizer, parameter, previous, blocks, state.block, seeds)
