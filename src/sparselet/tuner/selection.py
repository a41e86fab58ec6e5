"""Choosing the masks of a model in training: `reselect`, and `freeze_masks` to end the phase."""

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
from sparselet.tuner.adapted import active_adapters, adapter_config, sparselet_layers
from sparselet.tuner.config import SparseletConfig
from sparselet.tuner.distributed import anywhere, average, first_masks, group_of, rebuild
from sparselet.tuner.layer import SparseletLayer
from sparselet.tuner.mask_state import seeded
from sparselet.tuner.weights import is_sharded

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Selection:
    """What one selection did: targets with a mask, entries kept, the fraction of them that is new, layers kept."""

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
    """Choose the active adapter's masks anew (paper, Algorithm 1; design: several batches are averaged).

    Runs forward and backward on each of `batches` at W + Ŵ with no mask, scores every entry by the config's score, and
    keeps the best. Values that leave the mask are remembered while the phase lasts and return if selected again; with
    `initial_mask` other than "dense" they are dropped. With `optimizer`, its moments follow: entries that stay keep
    theirs, newcomers start from zero under the optimizer's own step count. Call it after `optimizer.step()`; gradients
    of the adapter are dropped, those of other parameters are left alone.

    model: a `PeftModel` with exactly one active, trainable sparse adapter; or `DistributedDataParallel` around one. The
        batches are then this process's own, as many as on the others: gradients are averaged over the processes, all get
        the masks of the first, and the wrapper follows. Scoring itself goes past the wrapper.
    batches: what `loss` takes; by default keyword arguments of the model, whose output must have a `loss`.
    Returns what was done. Raises SelectionError (no batch, no loss, several adapters, an optimizer whose state cannot
    follow, a wrapper that cannot), NonFiniteScore.
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
    _backward(module, batches, loss, scorer)
    masks = scorer.masks()
    if not scorer.informed:
        warnings.warn(
            f"every {score} score is 0, so the masks fall on the lowest indices. Train some steps before the first "
            "selection, or take a score that needs no values, such as gm.",
            stacklevel=2,
        )
    entries = changed = 0
    for target, layer in layers.items():
        before = _blocks(layer, name)
        _move_mask(layer, name, masks[target], config, optimizer)
        changed += _newcomers(before, masks[target])
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
    """End the selection phase: the masks stay, and everything kept for choosing new ones is dropped.

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
    """Receives each target's dense gradient inside the backward pass, and scores it there where it can."""

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
        self.together = config.scope == "global" or config.layer_drop
        self.expected: dict[str, int] = {}  # gradients still to come in this backward pass
        self.last = False  # whether this is the last batch
        self.batches = 0
        self.gradients: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}
        self.chosen: dict[str, Tensor] = {}
        self.informed = False  # whether any score differs from 0
        self.received = dict.fromkeys(layers, False)
        self.waiting = list(layers)  # to be averaged over the processes; backward comes by them from the end

    def __call__(self, layer: SparseletLayer, gradient: Tensor) -> None:
        target = layer.target_name
        gradient = gradient.detach().to(layer.sparse_values[self.name].dtype)
        self.received[target] = True
        if target in self.gradients:
            gradient += self.gradients.pop(target).to(gradient.device)
        self.expected[target] -= 1
        waits = not self.last or self.group is not None or self.expected[target] > 0
        self.gradients[target] = offloaded(gradient) if self.config.offload and waits else gradient
        if not self.last:
            return
        if self.group is None:
            if self.expected[target] == 0:
                self.finish(target)
            return
        # The processes average the same target at the same time, whatever the order of their backward passes.
        while self.waiting and self.expected[self.waiting[-1]] == 0:
            self.finish(self.waiting.pop())

    def finish(self, target: str) -> None:
        """Score one target by its accumulated gradient, and drop the gradient."""
        layer, config = self.layers[target], self.config
        state = layer.sparse_mask[self.name]
        gradient = self.gradients.pop(target, None)
        if gradient is None:  # here; another process may have used the target
            gradient = torch.zeros(layer.shape, dtype=layer.sparse_values[self.name].dtype, device=self.device)
        gradient = gradient.to(layer.base_weight.device).div_(self.batches)
        if self.group is not None:
            average(gradient, self.group)
        kept = blocks_to_keep(config.density, gradient.numel() // config.block_size**2)
        # The start of initial_mask="gradient" is no mask yet: its entries have no claim to stay.
        mask = None if state.dense or not state.selections else layer.sparse_indices[self.name]
        values = layer.dense_values(self.name) if "values" in self.score.needs else None
        generator = seeded(config.seed, config.data_fingerprint, target, state.selections)
        scores = self.score(Candidate(gradient, config.block_size, kept, generator, mask, values))
        self.informed = self.informed or bool(scores.any())
        if self.together:
            self.scores[target] = scores.cpu() if config.offload else scores
        else:
            self.chosen[target] = top_k(scores, kept)

    def masks(self) -> dict[str, Tensor]:
        """The new mask of every target, once all gradients have been scored."""
        for target in list(self.gradients) if self.group is None else self.waiting[::-1]:
            self.finish(target)
        received = self.received if self.group is None else anywhere(self.received, self.device, self.group)
        missing = [target for target in self.layers if not received[target]]
        if missing:
            raise SelectionError(f"{missing[0]} got no gradient from the scoring batches; is it used in the forward pass?")
        masks = self._over_all_targets() if self.together else self.chosen
        if self.group is not None:
            masks = first_masks({target: masks[target] for target in self.layers}, self.device, self.group)
        return masks

    def _over_all_targets(self) -> dict[str, Tensor]:
        """The masks, where what one target keeps depends on the others."""
        scores = {target: self.scores[target] for target in self.layers}
        dropped = dropped_layers(scores, self.config.density) if self.config.layer_drop else set()
        nothing = torch.empty(0, dtype=torch.int32)
        left = {target: score for target, score in scores.items() if target not in dropped}
        if self.config.scope == "global":
            chosen = top_k_global(left, blocks_to_keep(self.config.density, sum(s.numel() for s in scores.values())))
        else:
            chosen = {target: top_k(s, blocks_to_keep(self.config.density, s.numel())) for target, s in left.items()}
        return {target: chosen.get(target, nothing) for target in self.layers}


def _backward(model: nn.Module, batches: Iterable[Any], loss: Loss | None, scorer: _Scorer) -> None:
    """Forward and backward at W + Ŵ on each batch, with the scorer listening and all other gradients untouched."""
    # Reading one batch ahead tells which is the last.
    upcoming = iter(batches)
    batch = next(upcoming, None)
    if batch is None:
        raise SelectionError("no batch to score on; give at least one.")
    own = {id(layer.sparse_values[scorer.name]) for layer in scorer.layers.values()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        for layer in scorer.layers.values():
            layer.recorder = scorer
        while batch is not None:
            following = next(upcoming, None)
            scorer.last, scorer.batches = following is None, scorer.batches + 1
            for layer in scorer.layers.values():
                layer.calls = 0
            with torch.enable_grad():
                value = own_loss(model, batch) if loss is None else loss(model, batch)
                scorer.expected = {target: layer.calls for target, layer in scorer.layers.items()}
                value.backward()
            batch = following
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
        for layer in scorer.layers.values():
            layer.recorder = None


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model returns for a batch. Raises SelectionError if there is none."""
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
    return adapter_config(model, names[0]), names[0], layers


def _blocks(layer: SparseletLayer, name: str) -> Tensor | None:
    """The present mask, or None while all entries are trained."""
    return None if layer.sparse_mask[name].dense else layer.sparse_indices[name]


def _newcomers(before: Tensor | None, after: Tensor) -> int:
    if before is None:
        return 0
    return int((~torch.isin(after, before.to(after.device), assume_unique=True)).sum())


def _move_mask(
    layer: SparseletLayer, name: str, blocks: Tensor, config: SparseletConfig, optimizer: torch.optim.Optimizer | None
) -> None:
    """Set one target's mask; values and optimizer moments follow their entries."""
    state, parameter = layer.sparse_mask[name], layer.sparse_values[name]
    blocks = blocks.to(parameter.device)
    before = _blocks(layer, name)
    full = layer.dense_values(name)
    layer.set_mask(name, blocks, kernels.gather(full, blocks, config.block_size))
    if config.initial_mask == "dense":
        state.pending = offloaded(full) if config.offload else full
    state.selections += 1
    if optimizer is not None:
        _move_moments(optimizer, parameter, before, blocks, config.block_size)


def offloaded(dense: Tensor) -> Tensor:
    """`dense` in CPU memory, itself if it is there; from CUDA in pinned memory, which is copied at the speed of the bus."""
    return torch.empty_like(dense, device="cpu", pin_memory=True).copy_(dense) if _on_cuda(dense) else dense.cpu()


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The tensors an optimizer keeps of a parameter, but for scalars such as the step count."""
    state = optimizer.state.get(parameter, {})
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim}


def _require_movable(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, target: str) -> None:
    for key, tensor in _moments(optimizer, parameter).items():
        if tensor.shape != parameter.shape:
            raise SelectionError(
                f"{type(optimizer).__name__} keeps {key!r} of {target} with shape {list(tensor.shape)}, not "
                f"{list(parameter.shape)}, so it cannot follow the mask. Use an optimizer with one moment an entry, "
                "such as AdamW."
            )


def _move_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, before: Tensor | None, after: Tensor, block_size: int
) -> None:
    """Carry the optimizer's state of a parameter over from the mask `before` (None: all entries) to `after`."""
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
