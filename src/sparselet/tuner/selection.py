"""Mask selection in training: `reselect`, and `freeze_masks` to end the selection phase."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparselet import kernels
from sparselet.errors import SelectionError
from sparselet.masks import blocks_to_keep, dropped_layers, layer_of, top_k, top_k_global
from sparselet.scores import Candidate, get_score
from sparselet.tuner.adapted import active_adapters, sparselet_config, sparselet_layers
from sparselet.tuner.config import SparseletConfig
from sparselet.tuner.distributed import average, broadcast_masks, group_of, on_any_process, rebuild
from sparselet.tuner.layer import SparseletLayer
from sparselet.tuner.mask_state import seeded
from sparselet.tuner.weights import is_sharded

Loss = Callable[[nn.Module, Any], Tensor]


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
) -> Selection:
    """Select the active adapter's masks (paper, Algorithm 1; deviation: several batches can be averaged).

    Runs forward and backward on each of `batches` at W + Ŵ with no mask, scores every entry by the config's score, and
    keeps the best. Values that leave the mask are kept during the selection phase and return if selected again; with
    `initial_mask` other than "dense" they are dropped. With `optimizer`, its moments are moved too: entries that stay keep
    theirs, new entries start from zero under the optimizer's own step count. Call it after `optimizer.step()`; gradients
    of the adapter are dropped, those of other parameters are not changed.

    model: a `PeftModel` with exactly one active, trainable sparse adapter; or `DistributedDataParallel` around one. Each
        process then passes its own batches, the same number on all: gradients are averaged over the processes, all get the
        masks of the first, and the wrapper is rebuilt. Scoring passes use the module inside the wrapper.
    batches: arguments of `loss`; by default keyword arguments of the model, whose output must have a `loss`.
    Raises SelectionError (no batch, no loss, several adapters, an optimizer or a wrapper that does not support a changing
    mask), NonFiniteScore.
    """
    group = group_of(model) if isinstance(model, DistributedDataParallel) else None
    module = model.module if isinstance(model, DistributedDataParallel) else model
    config, name, layers = _trained_layers(module)
    if optimizer is not None:
        for layer in layers.values():
            _require_movable(optimizer, layer.sparse_values[name], layer.target_name)
    first = not any(layer.sparse_mask[name].selections for layer in layers.values())
    score = "gm" if first and config.initial_mask == "gradient" else config.score
    scorer = _Scorer(layers, name, config, score, group)
    _score_batches(module, batches, loss, scorer)
    masks = scorer.masks()
    if not scorer.any_nonzero:
        warnings.warn(
            f"every {score} score is 0, so the masks are the lowest indices. Train some steps before the first "
            "selection, or use a score that needs no values, such as gm.",
            stacklevel=2,
        )
    entries = changed = 0
    for target, layer in layers.items():
        previous = _current_mask(layer, name)
        _move_mask(layer, name, masks[target], config, optimizer)
        changed += _count_new(previous, masks[target])
        entries += masks[target].numel()
    if isinstance(model, DistributedDataParallel):
        rebuild(model)
    kept = [target for target in masks if masks[target].numel()]
    return Selection(
        targets=len(kept),
        entries=entries * config.block_size**2,
        changed=changed / max(1, entries),
        active_layers=len({layer_of(target) for target in kept}),
    )


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


class _Scorer:
    """Receives each target's dense gradient inside the backward pass, and scores it at once if nothing else is needed."""

    def __init__(
        self,
        layers: dict[str, SparseletLayer],
        name: str,
        config: SparseletConfig,
        score: str,
        group: "dist.ProcessGroup | None",
    ) -> None:
        self.layers, self.name, self.config, self.group = layers, name, config, group
        self.device = next(iter(layers.values())).base_weight.device
        self.score = get_score(score)
        self.scores_jointly = config.scope == "global" or config.layer_drop
        self.expected: dict[str, int] = {}  # gradients that this backward pass has yet to deliver
        self.is_last = False  # whether this is the last batch
        self.batches = 0
        self.gradients: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}
        self.masks_by_target: dict[str, Tensor] = {}
        self.any_nonzero = False  # whether any score differs from 0
        self.received = dict.fromkeys(layers, False)
        self.unscored = list(layers)  # to be averaged over the processes; the backward pass runs from the last

    def __call__(self, layer: SparseletLayer, gradient: Tensor) -> None:
        target = layer.target_name
        gradient = gradient.detach().to(layer.sparse_values[self.name].dtype)
        self.received[target] = True
        if target in self.gradients:
            gradient += self.gradients.pop(target).to(gradient.device)
        self.expected[target] -= 1
        waits = not self.is_last or self.group is not None or self.expected[target] > 0
        self.gradients[target] = offload(gradient) if self.config.offload and waits else gradient
        if not self.is_last:
            return
        if self.group is None:
            if self.expected[target] == 0:
                self.finish(target)
            return
        # All processes average the targets in the same order, which the order of their backward passes need not be.
        while self.unscored and self.expected[self.unscored[-1]] == 0:
            self.finish(self.unscored.pop())

    def finish(self, target: str) -> None:
        """Score one target by its accumulated gradient, and drop the gradient."""
        layer, config = self.layers[target], self.config
        state = layer.sparse_mask[self.name]
        gradient = self.gradients.pop(target, None)
        if gradient is None:  # another process may have used the target
            gradient = torch.zeros(layer.shape, dtype=layer.sparse_values[self.name].dtype, device=self.device)
        gradient = gradient.to(layer.base_weight.device).div_(self.batches)
        if self.group is not None:
            average(gradient, self.group)
        kept = blocks_to_keep(config.density, gradient.numel() // config.block_size**2)
        # Before its first selection, initial_mask="gradient" has a placeholder mask, which must not influence the score.
        mask = None if state.dense or not state.selections else layer.sparse_indices[self.name]
        values = layer.dense_values(self.name) if "values" in self.score.needs else None
        generator = seeded(config.seed, config.data_fingerprint, target, state.selections)
        scores = self.score(Candidate(gradient, config.block_size, kept, generator, mask, values))
        self.any_nonzero = self.any_nonzero or bool(scores.any())
        if self.scores_jointly:
            self.scores[target] = scores.cpu() if config.offload else scores
        else:
            self.masks_by_target[target] = top_k(scores, kept)

    def masks(self) -> dict[str, Tensor]:
        """The new mask of every target, once all gradients have been scored."""
        for target in list(self.gradients) if self.group is None else self.unscored[::-1]:
            self.finish(target)
        received = self.received if self.group is None else on_any_process(self.received, self.device, self.group)
        missing = [target for target in self.layers if not received[target]]
        if missing:
            raise SelectionError(f"{missing[0]} got no gradient from the scoring batches; is it used in the forward pass?")
        masks = self._masks_jointly() if self.scores_jointly else self.masks_by_target
        if self.group is not None:
            masks = broadcast_masks({target: masks[target] for target in self.layers}, self.device, self.group)
        return masks

    def _masks_jointly(self) -> dict[str, Tensor]:
        """The masks where the selection of a target depends on the scores of all targets."""
        scores = {target: self.scores[target] for target in self.layers}
        dropped = dropped_layers(scores, self.config.density) if self.config.layer_drop else set()
        empty = torch.empty(0, dtype=torch.int32)
        remaining = {target: score for target, score in scores.items() if target not in dropped}
        if self.config.scope == "global":
            selected = top_k_global(remaining, blocks_to_keep(self.config.density, sum(s.numel() for s in scores.values())))
        else:
            selected = {target: top_k(s, blocks_to_keep(self.config.density, s.numel())) for target, s in remaining.items()}
        return {target: selected.get(target, empty) for target in self.layers}


def _score_batches(model: nn.Module, batches: Iterable[Any], loss: Loss | None, scorer: _Scorer) -> None:
    """Forward and backward at W + Ŵ on each batch, with the scorer as recorder; other parameters get no gradient."""
    # Reads one batch ahead, since the scorer needs to know which is the last.
    upcoming = iter(batches)
    batch = next(upcoming, None)
    if batch is None:
        raise SelectionError("no batch to score on; give at least one.")
    adapted = {id(layer.sparse_values[scorer.name]) for layer in scorer.layers.values()}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in adapted]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for layer in scorer.layers.values():
            layer.recorder = scorer
        while batch is not None:
            following = next(upcoming, None)
            scorer.is_last, scorer.batches = following is None, scorer.batches + 1
            for layer in scorer.layers.values():
                layer.calls = 0
            with torch.enable_grad():
                value = model_loss(model, batch) if loss is None else loss(model, batch)
                scorer.expected = {target: layer.calls for target, layer in scorer.layers.items()}
                value.backward()
            batch = following
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for layer in scorer.layers.values():
            layer.recorder = None


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model returns for a batch. Raises SelectionError if it returns none."""
    if not isinstance(batch, Mapping):
        raise SelectionError(
            f"a scoring batch is a {type(batch).__name__}, not keyword arguments of the model; pass loss=, a function of both."
        )
    output = model(**batch)
    value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if value is None:
        raise SelectionError("the model returned no loss for a scoring batch; put labels into it, or pass loss=.")
    return value


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
    layer: SparseletLayer, name: str, blocks: Tensor, config: SparseletConfig, optimizer: torch.optim.Optimizer | None
) -> None:
    """Set one target's mask, and move values and optimizer moments with their entries."""
    state, parameter = layer.sparse_mask[name], layer.sparse_values[name]
    blocks = blocks.to(parameter.device)
    previous = _current_mask(layer, name)
    dense = layer.dense_values(name)
    layer.set_mask(name, blocks, kernels.gather(dense, blocks, config.block_size))
    if config.initial_mask == "dense":
        state.pending = offload(dense) if config.offload else dense
    state.selections += 1
    if optimizer is not None:
        _move_moments(optimizer, parameter, previous, blocks, config.block_size)


def offload(dense: Tensor) -> Tensor:
    """A copy of `dense` in CPU memory, `dense` itself if it is there; pinned for CUDA, which copies at the bus's full speed."""
    return torch.empty_like(dense, device="cpu", pin_memory=True).copy_(dense) if _on_cuda(dense) else dense.cpu()


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """An optimizer's state tensors of a parameter, without scalars such as the step count."""
    state = optimizer.state.get(parameter, {})
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim}


def _require_movable(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, target: str) -> None:
    """Raise SelectionError unless all moments of a parameter have its shape."""
    for key, tensor in _moments(optimizer, parameter).items():
        if tensor.shape != parameter.shape:
            raise SelectionError(
                f"{type(optimizer).__name__} keeps {key!r} of {target} with shape {list(tensor.shape)}, not "
                f"{list(parameter.shape)}, so they cannot be moved with the mask. Use an optimizer with one moment per entry, "
                "such as AdamW."
            )


def _move_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, before: Tensor | None, after: Tensor, block_size: int
) -> None:
    """Move the optimizer's moments of a parameter from the mask `before` (None: all entries) to `after`."""
    for key, tensor in _moments(optimizer, parameter).items():
        if before is None:
            optimizer.state[parameter][key] = kernels.gather(tensor.contiguous(), after, block_size)
            continue
        moved = torch.zeros((len(after), *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        if len(before):
            place = torch.searchsorted(before, after).clamp_max(len(before) - 1)
            stays = before[place] == after
            moved[stays] = tensor[place[stays]]
        optimizer.state[parameter][key] = moved
