"""Coefficients of a merge, one for each expert and layer, by gradient steps on validation rows."""

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.adapter import SparseAdapter
from sparselet.apply import apply_temporarily
from sparselet.delta import SparseDelta
from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings
from sparselet.expert import Expert
from sparselet.io.memory import require_memory
from sparselet.masks import layer_of
from sparselet.merging import METHODS, MergeRecipe
from sparselet.merging.engine.plan import Weight, weight_for
from sparselet.merging.methods import get_method
from sparselet.merging.recipe import merge_by
from sparselet.names import Names, as_rows
from sparselet.setting_checks import check_at_least, check_settings
from sparselet.tasks.task import Task
from sparselet.workflows.validation_loss import ValidationLoss

DIGITS = 4  # of the weights in a recipe


@dataclass(frozen=True)
class TuneSettings:
    """How coefficients are tuned. Raises ConfigError."""

    steps: int = 50
    """Steps of Adam; each reads a few rows of every task."""
    rate: float = 0.02
    """Adam's learning rate: about how far a coefficient moves in a step."""
    penalty: float = 0.05
    """Factor on half the sum of the squared distances of the coefficients from their start."""
    task_rows: int = 4
    """Rows of each task in a step, in turn."""

    def __post_init__(self) -> None:
        check_settings(self)
        check_at_least(self, 1, "steps", "task_rows")
        check_at_least(self, 0, "penalty")
        if self.rate <= 0:
            raise ConfigError(f"rate must be above 0, got {self.rate}.")


@dataclass(frozen=True)
class TuneResult:
    """A recipe with weights by pattern, and the losses of the validation targets by task, of the start and of this recipe."""

    recipe: MergeRecipe
    before: Mapping[str, float]
    after: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """The losses as JSON values."""
        return {"before": dict(self.before), "after": dict(self.after)}


def tune(
    recipe: MergeRecipe,
    settings: TuneSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    eval_settings: EvalSettings,
    *,
    experts: Sequence[Expert],
    progress: Callable[[float], None] | None = None,
) -> TuneResult:
    """Lower the mean loss of the tasks' targets over the weights wᵢ + sᵢₗ of expert i in layer l, from s = 0, by Adam.

    AdaMerging (Yang et al. 2024) learns such coefficients by the entropy of answers, without targets. The method must be linear
    in its weights, M = Σ (wᵢ + sᵢₗ)·Pᵢ, so that ∂L/∂sᵢₗ = Σ ⟨∂L/∂W, Pᵢ⟩ over the layer's targets is a gather of the
    weights' gradient and a product. The penalty pulls s to 0. A target without a layer number is its own layer.

    The recipe stays as it is if the tuned one, its weights rounded to four digits, has no lower loss on these rows. Torch's
    threads may change the last bits. experts: those of the recipe, opened. model: its weights are as before afterwards.
    Raises ConfigError (no task, a method that is not linear), NotEnoughMemory, and what merging and applying raise.
    """
    if not tasks:
        raise ConfigError("validation tasks are needed to tune a merge on; set `validation`.")
    if not get_method(recipe.method).linear:
        linear = ", ".join(name for name, method in METHODS.items() if method.linear)
        raise ConfigError(f"method {recipe.method} is not linear in its weights, so they cannot be tuned; {linear} are.")
    losses = ValidationLoss(model, tokenizer, tasks, eval_settings)
    merged = LinearMerge(recipe, experts)
    shift = torch.zeros(merged.coefficients, dtype=torch.float64)
    adam = torch.optim.Adam([shift], lr=settings.rate)
    for step in range(settings.steps):
        shift.grad = settings.penalty * shift
        for rows in losses.rows.values():
            batch = [rows[(step * settings.task_rows + i) % len(rows)] for i in range(min(settings.task_rows, len(rows)))]
            shift.grad += merged.gradient(shift, model, lambda batch=batch: losses.of(batch)) / len(losses.rows)
        adam.step()
        if progress is not None:
            progress(1)
    tuned = merged.recipe(shift)

    measured = []
    for chosen in (recipe, tuned):
        with apply_temporarily(model, merge_by(chosen, experts)):
            measured.append(losses.by_task())
    before, after = measured
    if sum(after.values()) < sum(before.values()):
        return TuneResult(tuned, before, after)
    return TuneResult(recipe, before, before)


class LinearMerge:
    """A merge as a function of shifts s [N, layers] of its weights: Σ (wᵢ + sᵢₗ)·Pᵢ, Pᵢ what the method leaves of expert i.

    Holds N numbers for each entry of the merge. Raises NotEnoughMemory, and what `merge` raises.
    """

    def __init__(self, recipe: MergeRecipe, experts: Sequence[Expert]) -> None:
        self._recipe, count = recipe, len(experts)
        require_memory(8 * count * sum(expert.nnz for expert in experts), "what a merge leaves of each expert")
        units = torch.eye(count).tolist()
        parts = [merge_by(replace(recipe, weights=tuple(unit)), experts) for unit in units]
        self._places = {name: parts[0][name].expand().indices for name in parts[0]}
        self._parts = {name: torch.stack([part[name].expand().values.float() for part in parts]) for name in parts[0]}
        self._shapes = parts[0].shapes
        layers = list(dict.fromkeys(map(layer_of, self._parts)))
        self._layers = {name: layers.index(layer_of(name)) for name in self._parts}
        self._start = {name: [weight_for(weight, name) for weight in recipe.weights] for name in self._parts}
        self.coefficients = (count, len(layers))

    def adapter(self, shift: Tensor) -> SparseAdapter:
        """The merge, in memory. shift: float64 [N, layers]."""
        deltas = {
            name: SparseDelta(self._shapes[name], self._places[name], self._weights(name, shift).float() @ parts)
            for name, parts in self._parts.items()
        }
        return SparseAdapter(deltas)

    def gradient(self, shift: Tensor, model: PreTrainedModel, loss: Callable[[], Tensor]) -> Tensor:
        """∂L/∂s, float64 [N, layers], of the loss of the model with the merge in its weights, which are then as before."""
        layers, total = Names(model), torch.zeros_like(shift)
        weights = {name: layers.layers[target].parameter for name, target in layers.find(self._parts).items()}
        flags = {name: weight.requires_grad for name, weight in weights.items()}
        try:
            for weight in weights.values():
                weight.requires_grad_()
            with apply_temporarily(model, self.adapter(shift)), torch.enable_grad():
                gradients = torch.autograd.grad(loss(), list(weights.values()), allow_unused=True)
        finally:
            for name, weight in weights.items():
                weight.requires_grad_(flags[name])
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                places = self._places[name].long().to(gradient.device)
                entries = as_rows(gradient).reshape(-1).index_select(0, places).float().cpu()
                total[:, self._layers[name]] += (self._parts[name] @ entries).double()
        return total

    def recipe(self, shift: Tensor) -> MergeRecipe:
        """The recipe with weights by pattern: one for a layer where its targets have one weight, else one for each target."""
        by_expert: list[Weight] = []
        for i in range(len(self._recipe.weights)):
            weights = {name: round(float(self._weights(name, shift)[i]), DIGITS) for name in self._parts}
            by_expert.append(_patterns(weights))
        return replace(self._recipe, weights=tuple(by_expert))

    def _weights(self, name: str, shift: Tensor) -> Tensor:
        return torch.tensor(self._start[name], dtype=torch.float64) + shift[:, self._layers[name]]


def _patterns(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights by target as weights by pattern of target names."""
    by_layer: dict[str, dict[str, float]] = {}
    for name, weight in weights.items():
        by_layer.setdefault(layer_of(name), {})[name] = weight
    patterns: dict[str, float] = {}
    for layer, own in by_layer.items():
        if len(set(own.values())) == 1 and layer not in own:
            patterns[f"{glob.escape(layer)}.*"] = next(iter(own.values()))
        else:
            patterns |= {glob.escape(name): weight for name, weight in own.items()}
    return patterns
