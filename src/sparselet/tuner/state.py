"""An adapter's tensors as PEFT hands them on: checked against the model, and given to its layers."""

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
class Saved:
    """What a file holds of one target. Without `selections` its selection phase has ended."""

    delta: SparseDelta
    selections: int | None
    dense: bool
    pending: Tensor | None


def read_state(
    model: nn.Module, config: SparseletConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Saved]:
    """Check all tensors of a file against the model, and return what they hold by target."""
    layers = sparselet_layers(model, adapter_name)
    allowed = module_keys(model, adapter_name)
    own = {f"{PREFIX}{key.removeprefix(PREFIX)}": tensor for key, tensor in state_dict.items() if key not in allowed}
    files = _by_target(own)
    unknown = sorted(set(files) - set(layers))
    if unknown:
        raise UnknownTarget(f"the model has no target {unknown[0]}, which the adapter changes ({len(unknown)} such).")
    if config.targets is None and config.inference_mode and is_unread(layers.values(), adapter_name):
        raise BadConfig(f"{CONFIG_FILE} records no targets, so it is no adapter's; expected an object of target names.")
    check_state("the adapter", {name: layer.shape for name, layer in layers.items()}, own)
    _check_targets(config, layers)
    read = {name: _read_target(layers[name], parts) for name, parts in files.items()}
    if not config.inference_mode and any(saved.selections is not None for saved in read.values()):
        config.validate()  # training goes on by them
    return read


def is_unread(layers: Iterable[SparseletLayer], adapter_name: str) -> bool:
    return any(layer.sparse_mask[adapter_name].unread for layer in layers)


def module_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """The names that PEFT gives the tensors of `modules_to_save` before it hands them on; see `set_peft_model_state_dict`."""
    return {
        f"{name.removeprefix('_fsdp_wrapped_module.')}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in module.adapter_state_dict_load_map(adapter_name).values()
    }


def load_target(layer: SparseletLayer, adapter_name: str, saved: Saved) -> None:
    state = layer.sparse_mask[adapter_name]
    state.block_size = saved.delta.block_size
    if saved.dense:
        layer.set_dense(adapter_name, saved.delta.to_dense())
    else:
        layer.set_mask(adapter_name, saved.delta.indices, saved.delta.values, saved.delta.block_size)
    state.selecting = saved.selections is not None
    state.selections = 1 if saved.selections is None else saved.selections
    state.pending = saved.pending


def _by_target(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    files: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.removeprefix(PREFIX).rpartition(".")
        if f".{kind}" in (VALUES, INDICES, PENDING, PROGRESS):
            files.setdefault(name, {})[f".{kind}"] = tensor
    return files


def _check_targets(config: SparseletConfig, layers: Mapping[str, SparseletLayer]) -> None:
    recorded = config.targets or {}
    for name, layer in layers.items():
        shape = tuple(recorded.get(name, {}).get("shape", layer.shape))
        if shape != layer.shape:
            raise ShapeMismatch(f"{name}: the adapter was made for shape {list(shape)}, the model has {list(layer.shape)}.")
    fingerprints = {name: recorded[name].get("fingerprint") for name in layers if name in recorded}
    require_same_base(fingerprints, {name: layer.base_fingerprint() for name, layer in layers.items()}, "adapter and model")


def _read_target(layer: SparseletLayer, parts: Mapping[str, Tensor]) -> Saved:
    name = layer.target_name
    values, blocks = parts[VALUES], parts[INDICES]
    try:
        delta = SparseDelta(layer.shape, blocks, values, values.shape[1] if values.ndim == 3 else 1)
    except SparseletError as error:
        raise type(error)(f"{name}: {error}") from error
    require_finite(delta.values, name)
    progress, pending = parts.get(PROGRESS), parts.get(PENDING)
    if progress is None:
        return Saved(delta, None, False, None)
    if progress.dtype != torch.int64 or progress.shape != (2,) or progress.min() < 0 or progress[1] > 1:
        raise BadShape(
            f"{name}{PROGRESS} must be int64 [2], a count and 0 or 1, got {progress.dtype} {progress.tolist()!s:.40}."
        )
    selections, dense = int(progress[0]), bool(progress[1])
    if dense and delta.nnz != delta.size:
        raise BadShape(f"{name}: all {delta.size} entries are said to be trained, but {delta.nnz} are in the file.")
    if pending is None or not pending.numel():
        return Saved(delta, selections, dense, None)
    if tuple(pending.shape) != layer.shape or not pending.is_floating_point():
        raise BadShape(f"{name}{PENDING} must be floating {list(layer.shape)}, got {pending.dtype} {list(pending.shape)}.")
    require_finite(pending, f"{name}{PENDING}")
    return Saved(delta, selections, dense, pending)
