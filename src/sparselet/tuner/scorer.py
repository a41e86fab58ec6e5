"""One pass over scoring batches: what scores need of each target is gathered inside it, and each target is scored there."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparselet import kernels
from sparselet.errors import SelectionError
from sparselet.masks import blocks_to_keep, dropped_layers, top_k, top_k_by_row, top_k_global
from sparselet.model_config import optional_field
from sparselet.scores import Candidate, Score, grow_and_drop
from sparselet.tuner.config import SparseletConfig
from sparselet.tuner.distributed import average, broadcast_masks, on_any_process
from sparselet.tuner.layer import SparseletLayer
from sparselet.tuner.mask_state import seeded
from sparselet.tuner.moments import Seeds

Loss = Callable[[nn.Module, Any], Tensor]


class Scorer:
    """Receives each target's dense gradient inside the backward pass, and scores it there where it can.

    exchange: fraction of each mask that is exchanged: the blocks that moved least leave it, and the score says which come. None
        chooses all blocks by the score.
    """

    def __init__(
        self,
        layers: dict[str, SparseletLayer],
        name: str,
        config: SparseletConfig,
        score: Score,
        group: "dist.ProcessGroup | None",
        exchange: float | None = None,
    ) -> None:
        self.layers, self.name, self.config, self.group = layers, name, config, group
        self.device = next(iter(layers.values())).base_weight.device
        self.score, self.exchange = score, exchange
        self.scores_jointly = config.scope == "global" or config.layer_drop
        self.seeded = exchange is not None and not self.scores_jointly
        self.needs = {*score.needs, *(("gradient", "squares") if self.seeded else ())}
        self.expected: dict[str, int] = {}  # gradients still to come in this backward pass
        self.is_last = False  # whether this is the last batch
        self.batches = 0
        self.partial: dict[str, Tensor] = {}  # of this batch, where a target is used several times
        self.gradients: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}
        self.masks_by_target: dict[str, Tensor] = {}
        self.seeds: dict[str, Seeds] = {}
        self.any_nonzero = False
        self.received = dict.fromkeys(layers, False)
        self.unscored = list(layers)  # to be averaged over the processes; the backward pass reaches the last one first

    @property
    def needs_data(self) -> bool:
        """Whether scoring batches are needed."""
        return self.needs_gradient or "inputs" in self.needs

    @property
    def needs_gradient(self) -> bool:
        """Whether a backward pass is needed."""
        return not {"gradient", "squares"}.isdisjoint(self.needs)

    def read_input(self, layer: SparseletLayer, x: Tensor) -> None:
        """Add Σx² of a target's input [..., in] to its sum over all tokens, if the score needs it."""
        if "inputs" not in self.needs:
            return
        total = x.detach().reshape(-1, x.shape[-1]).float().square().sum(0)
        self.inputs[layer.target_name] = total + self.inputs.get(layer.target_name, 0)
        self.received[layer.target_name] = True

    def __call__(self, layer: SparseletLayer, gradient: Tensor) -> None:
        target = layer.target_name
        gradient = gradient.detach().to(layer.sparse_values[self.name].dtype)
        self.received[target] = True
        if target in self.partial:
            gradient += self.partial.pop(target).to(gradient.device)
        self.expected[target] -= 1
        if self.expected[target] > 0:
            self.partial[target] = self._stored(gradient)
            return
        self._add(target, gradient)
        if not self.is_last:
            return
        if self.group is None:
            self.finish(target)
            return
        # All processes average the targets in the same order, which the order of their backward passes need not be.
        while self.unscored and self.expected[self.unscored[-1]] == 0:
            self.finish(self.unscored.pop())

    def _stored(self, tensor: Tensor) -> Tensor:
        return offload(tensor) if self.config.offload else tensor

    def _add(self, target: str, gradient: Tensor) -> None:
        """Add a whole batch's gradient of a target to its sums."""
        waits = not self.is_last or self.group is not None
        if "squares" in self.needs:
            squares = gradient.square()
            if target in self.squares:
                squares += self.squares.pop(target).to(gradient.device)
            self.squares[target] = self._stored(squares) if waits else squares
        if target in self.gradients:
            gradient += self.gradients.pop(target).to(gradient.device)
        self.gradients[target] = self._stored(gradient) if waits else gradient

    def _mean(self, sums: dict[str, Tensor], target: str) -> Tensor:
        """The mean over all scoring batches, of all processes."""
        layer = self.layers[target]
        total = sums.pop(target, None)
        if total is None:  # of this process; another may have used the target
            total = torch.zeros(layer.shape, dtype=layer.sparse_values[self.name].dtype)
        total = total.to(self.device).div_(max(1, self.batches))
        if self.group is not None:
            average(total, self.group)
        return total

    def finish(self, target: str) -> None:
        """Score one target by what was gathered of it, and drop that."""
        layer, config = self.layers[target], self.config
        state = layer.sparse_mask[self.name]
        if target in self.partial:
            self._add(target, self.partial.pop(target))
        gradient = self._mean(self.gradients, target) if self.needs_gradient else None
        squares = self._mean(self.squares, target) if "squares" in self.needs else None
        kept = blocks_to_keep(config.density, math.prod(layer.shape) // math.prod(state.block))
        # Before its first selection a sparse start has a placeholder mask, which must not influence the score.
        mask = None if state.dense or not state.selections else layer.sparse_indices[self.name]
        values = layer.dense_values(self.name) if "values" in self.needs or self.exchange is not None else None
        candidate = Candidate(
            shape=layer.shape,
            block=state.block,
            kept=kept,
            generator=seeded(config.seed, config.data_fingerprint, target, state.selections),
            mask=mask,
            gradient=gradient,
            squares=squares,
            values=values,
            weight=layer.effective_weight().to(layer.sparse_values[self.name].dtype) if "weight" in self.needs else None,
            inputs=self._input_norms(layer) if "inputs" in self.needs else None,
        )
        scores = self.score(candidate).to(self.device)
        self.any_nonzero = self.any_nonzero or bool(scores.any())
        if self.exchange is not None and mask is not None and values is not None:
            moved = kernels.block_sum(values.abs(), state.block)
            scores = grow_and_drop(moved, scores, mask, kept, self.exchange)
        if state.excluded is not None:
            scores = scores.index_fill(0, state.excluded.long().to(scores.device), torch.finfo(scores.dtype).min)
        if self.scores_jointly:
            self.scores[target] = scores.cpu() if config.offload else scores
            return
        chosen = self.masks_by_target[target] = self._best(layer, scores, kept)
        if self.seeded and gradient is not None and squares is not None:
            parts = (kernels.gather(dense.contiguous(), chosen, state.block) for dense in (gradient, squares))
            self.seeds[target] = Seeds(*parts)

    def _best(self, layer: SparseletLayer, scores: Tensor, kept: int) -> Tensor:
        if self.config.balance == "row" and self.exchange is None:
            rows = layer.shape[0] // layer.sparse_mask[self.name].block[0]
            return self._allowed(layer, top_k_by_row(scores, kept, rows, layer.transposed))
        return self._allowed(layer, top_k(scores, kept))

    def _allowed(self, layer: SparseletLayer, chosen: Tensor) -> Tensor:
        """The chosen blocks without excluded ones, which have the lowest scores."""
        excluded = layer.sparse_mask[self.name].excluded
        return chosen if excluded is None else chosen[~torch.isin(chosen, excluded.to(chosen.device))]

    def _input_norms(self, layer: SparseletLayer) -> Tensor:
        total = self.inputs.pop(layer.target_name, None)
        if total is None:  # of this process
            total = torch.zeros(layer.in_features)
        total = total.to(self.device)
        if self.group is not None:
            average(total, self.group)
        norms = total.sqrt()
        return norms[:, None] if layer.transposed else norms[None, :]

    def masks(self) -> dict[str, Tensor]:
        """The new mask of every target, once all batches have passed."""
        if self.needs_data:
            received = self.received if self.group is None else on_any_process(self.received, self.device, self.group)
            missing = [target for target in self.layers if not received[target]]
            if missing:
                raise SelectionError(f"{missing[0]} got no gradient from the scoring batches; is it used in the forward pass?")
        for target in self.unscored[::-1]:
            if target not in self.masks_by_target and target not in self.scores:
                self.finish(target)
        masks = self._masks_jointly() if self.scores_jointly else self.masks_by_target
        if self.group is not None:
            masks = broadcast_masks({target: masks[target] for target in self.layers}, self.device, self.group)
        return masks

    def _masks_jointly(self) -> dict[str, Tensor]:
        """The masks, where what one target keeps depends on the others."""
        scores = {target: self.scores[target] for target in self.layers}
        dropped = dropped_layers(scores, self.config.density) if self.config.layer_drop else set()
        nothing = torch.empty(0, dtype=torch.int32)
        remaining = {target: score for target, score in scores.items() if target not in dropped}
        if self.config.scope == "global":
            chosen = top_k_global(remaining, blocks_to_keep(self.config.density, sum(s.numel() for s in scores.values())))
            chosen = {target: self._allowed(self.layers[target], blocks) for target, blocks in chosen.items()}
        else:
            chosen = {
                target: self._best(self.layers[target], s, blocks_to_keep(self.config.density, s.numel()))
                for target, s in remaining.items()
            }
        return {target: chosen.get(target, nothing) for target in self.layers}


def score_batches(model: nn.Module, batches: Iterable[Any], loss: Loss | None, scorer: Scorer) -> None:
    """Forward, and backward where the score needs gradients, at W + Ŵ on each batch; other parameters get no gradient.

    Raises SelectionError where the score needs a batch and there is none.
    """
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
            with torch.set_grad_enabled(scorer.needs_gradient):
                value = model_loss(model, batch) if loss is None else loss(model, batch)
                scorer.expected = {target: layer.calls for target, layer in scorer.layers.items()}
                if scorer.needs_gradient:
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
    value = output.get("loss") if isinstance(output, Mapping) else optional_field(output, "loss")
    if value is None:
        raise SelectionError("the model returned no loss for a scoring batch; put labels into it, or pass loss=.")
    return value


def offload(dense: Tensor) -> Tensor:
    """A copy of `dense` in CPU memory, `dense` itself if it is there; pinned for CUDA, which copies at the bus's full speed."""
    return torch.empty_like(dense, device="cpu", pin_memory=True).copy_(dense) if _on_cuda(dense) else dense.cpu()


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"
