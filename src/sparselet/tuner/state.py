"""An adapter's tensors as PEFT passes them: checked against the model, and loaded into its layers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from sparselet.adapter import require_finite
from sparselet.adapter_format import CONFIG_FILE, INDICES, PENDING, PREFIX, PROGRESS, VALUES, check_state
from sparselet.delta import SparseDelta
from sparselet.errors import BadConfig, BadShape, ShapeMismatch, SparseletError, UnknownTarget
from sparselet.fingerprint import require_same_base
from sparselet.tuner.adapted import sparselet_layers
from sparselet.tuner.config import SparseletConfig
from sparselet.tuner.layer import SparseletLayer


@dataclass(frozen=True)
class SavedTarget:
    """One target in a file. selections: None where its selection phase has ended."""

    delta: SparseDelta
    selections: int | None
    dense: bool
    pending: Tensor | None


def read_state(
    model: nn.Module, config: SparseletConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, SavedTarget]:
    """Check all tensors of a file against the model. Returns them by target."""
    layers = sparselet_layers(model, adapter_name)
    allowed = module_keys(model, adapter_name)
    tensors = {f"{PREFIX}{key.removeprefix(PREFIX)}": tensor for key, tensor in state_dict.items() if key not in allowed}
    parts_by_target = _by_target(tensors)
    unknown = sorted(set(parts_by_target) - set(layers))
    if unknown:
        raise UnknownTarget(f"the model has no target {unknown[0]}, which the adapter changes ({len(unknown)} such).")
    if config.targets is None and config.inference_mode and is_unread(layers.values(), adapter_name):
        raise BadConfig(f"{CONFIG_FILE} records no targets; expected an object of target names.")
    check_state("the adapter", {name: layer.shape for name, layer in layers.items()}, tensors)
    _check_targets(config, layers)
    read = {name: _read_target(layers[name], parts) for name, parts in parts_by_target.items()}
    if not config.inference_mode and any(saved.selections is not None for saved in read.values()):
        config.validate()  # training continues with these settings
    return read


def is_unread(layers: Iterable[SparseletLayer], adapter_name: str) -> bool:
    """Whether an adapter was added by its configuration alone, in any of these layers."""
    return any(layer.sparse_mask[adapter_name].unread for layer in layers)


def module_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """PEFT's names for the tensors of `modules_to_save` when it passes them; see `set_peft_model_state_dict`."""
    return {
        f"{name.removeprefix('_fsdp_wrapped_module.')}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in module.adapter_state_dict_load_map(adapter_name).values()
    }


def load_target(layer: SparseletLayer, adapter_name: str, saved: SavedTarget) -> None:
    """Load a target of a file into its layer: mask, values and the state of the selection phase."""
    state = layer.sparse_mask[adapter_name]
    state.block = saved.delta.block
    if saved.dense:
        layer.set_dense(adapter_name, saved.delta.to_dense())
    else:
        layer.set_mask(adapter_name, saved.delta.indices, saved.delta.values)
    state.selecting = saved.selections is not None
    state.selections = 1 if saved.selections is None else saved.selections
    state.pending = saved.pending


def _by_target(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    targets: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, suffix = key.removeprefix(PREFIX).rpartition(".")
        if f".{suffix}" in (VALUES, INDICES, PENDING, PROGRESS):
            targets.setdefault(name, {})[f".{suffix}"] = tensor
    return targets


def _check_targets(config: SparseletConfig, layers: Mapping[str, SparseletLayer]) -> None:
    recorded = config.targets or {}
    for name, layer in layers.items():
        shape = tuple(recorded.get(name, {}).get("shape", layer.shape))
        if shape != layer.shape:
            raise ShapeMismatch(f"{name}: the adapter has shape {list(shape)}, the model has {list(layer.shape)}.")
    fingerprints = {name: recorded[name].get("fingerprint") for name in layers if name in recorded}
    require_same_base(fingerprints, {name: layer.base_fingerprint() for name, layer in layers.items()}, "adapter and model")


def _read_target(layer: SparseletLayer, parts: Mapping[str, Tensor]) -> SavedTarget:
    name = layer.target_name
    values, blocks = parts[VALUES], parts[INDICES]
    try:
        delta = SparseDelta(layer.shape, blocks, values)
    except SparseletError as error:
        raise type(error)(f"{name}: {error}") from error
    require_finite(delta.values, name)
    progress, pending = parts.get(PROGRESS), parts.get(PENDING)
    if progress is None:
        return SavedTarget(delta, None, False, None)
    if progress.dtype != torch.int64 or progress.shape != (2,) or progress.min() < 0 or progress[1] > 1:
        raise BadShape(
            f"{name}{PROGRESS} must be int64 [2], a count and 0 or 1, got {progress.dtype} {progress.tolist()!s:.40}."
        )
    selections, dense = int(progress[0]), bool(progress[1])
    if dense and delta.nnz != delta.size:
        raise BadShape(f"{name}: the file records that all {delta.size} entries are trained, but has {delta.nnz}.")
    if pending is None or not pending.numel():
        return SavedTarget(delta, selections, dense, None)
    if tuple(pending.shape) != layer.shape or not pending.is_floating_point():
        raise BadShape(f"{name}{PENDING} must be floating {list(layer.shape)}, got {pending.dtype} {list(pending.shape)}.")
    require_finite(pending, f"{name}{PENDING}")
    return SavedTarget(delta, selections, dense, pending)
