"""The PEFT tuner: adds `SparseletLayer`s to a model, and saves and loads their adapters."""

import contextlib
import importlib.metadata
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from sparselet.adapter import SparseAdapter, config_of_targets, require_finite
from sparselet.adapter_format import INDICES, PENDING, PROGRESS, VALUES
from sparselet.delta import block_for
from sparselet.errors import ArgumentError, NoTargets, SparseletError, UnknownTarget
from sparselet.names import base_name
from sparselet.tuner.adapted import base_model, layers_by_path, require_layers, sparselet_config, sparselet_layers
from sparselet.tuner.config import PEFT_TYPE, SparseletConfig
from sparselet.tuner.layer import SparseletLayer, SparseletLinear
from sparselet.tuner.resident import leased
from sparselet.tuner.selection import select_without_data
from sparselet.tuner.state import is_unread, load_target, module_keys, read_state
from sparselet.tuner.targets import describe_linear_layers, is_linear, with_named_targets

TRL_REFERENCE = "ref"  # the name of the reference adapter that TRL adds


class UnselectedMaskWarning(UserWarning):
    """An adapter was saved although its mask was never selected."""


class SparseletModel(BaseTuner):
    """A base model with sparse adapters in its target layers, constructed by `peft.get_peft_model(model, SparseletConfig())`.

    A pass uses the base weights plus the active adapters' changes, built one target at a time (`effective`); the model's own
    weights stay the base model's.
    """

    prefix = "sparse_"
    tuner_layer_cls = SparseletLayer
    target_module_mapping = {}  # noqa: RUF012 (PEFT declares it so; `default_targets` finds the targets)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> SparseletConfig:
        assert isinstance(peft_config, SparseletConfig)
        peft_config.target_modules = with_named_targets(self.model, peft_config).target_modules
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the model. Raises NoTargets if no layer matches, UnknownTarget for a target it does not have."""
        config = cast(SparseletConfig, self.peft_config[adapter_name])
        missing = sorted(set(config.targets or {}) - {base_name(key) for key, _ in model.named_modules()})
        if missing:
            raise UnknownTarget(f"the model has no layer {missing[0]}, which the adapter changes ({len(missing)} such).")
        # All targets are checked before the first is replaced, so that an error leaves the model unchanged.
        config = self._prepare_adapter_config(config, {})
        inner = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        for key, module in model.named_modules():
            if not key.startswith(inner) and self._check_target_module_exists(config, key):
                _check_target(key, module.get_base_layer() if isinstance(module, SparseletLayer) else module, config)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            if "odules" not in str(error) or isinstance(error, ArgumentError):
                raise
            raise NoTargets(f"{error} The model's linear layers are: {describe_linear_layers(model)}.") from error
        _refuse_shared_weights(sparselet_layers(model))
        select_without_data(sparselet_layers(model, adapter_name), adapter_name, config)

    def _check_target_module_exists(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, peft_config: PeftConfig, key: str
    ) -> Any:
        assert isinstance(peft_config, SparseletConfig)
        if peft_config.targets is not None:
            return base_name(key) in peft_config.targets
        return super()._check_target_module_exists(peft_config, key)

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        peft_config: SparseletConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SparseletLayer):
            source = _source_of_copy(target, adapter_name, peft_config)
            target.add_adapter(adapter_name, peft_config)
            if source is not None:
                _copy_adapter(target, source, adapter_name)
            return
        layer = SparseletLinear(target, base_name(current_key))
        layer.set_adapter(adapter_name if adapter_name in self.active_adapters else [])
        layer.add_adapter(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from all layers; if it was merged, the base weights are restored bit for bit."""
        # PEFT skips every module whose name contains the prefix, such as Mixtral's `block_sparse_moe`.
        self.prefix = f"{SparseletModel.prefix}values."
        try:
            super().delete_adapter(adapter_name)
        finally:
            del self.prefix

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters into the weights until `unmerge_adapter`. safe_merge: raise NonFiniteValue before any is merged."""
        if safe_merge:
            _require_finite_merge(self.model, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge and safe_merge:
            _require_finite_merge(self.model, adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT itself would ignore adapter_names.
        if kwargs.get("adapter_names") is not None:
            raise ArgumentError(
                "adapter_names is not supported: all rows of a batch see the weights of the active adapters. Group the rows by "
                "adapter and call set_adapter between the groups."
            )
        with contextlib.nullcontext() if torch.compiler.is_compiling() else leased():
            yield

    # Files

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The adapter's tensors by their names in the file; also adds the record of the targets to `config`."""
        assert isinstance(config, SparseletConfig)
        tensors: dict[str, Tensor] = {}
        layers = layers_by_path(model, adapter_name)
        unselected = [name for name, layer in layers.items() if not layer.sparse_mask[adapter_name].selections]
        for path, layer in layers.items():
            key = base_name(path)
            state, delta = layer.sparse_mask[adapter_name], layer.delta(adapter_name)
            require_finite(delta.values, layer.target_name)
            tensors[f"{key}{VALUES}.{adapter_name}"] = delta.values
            tensors[f"{key}{INDICES}.{adapter_name}"] = delta.indices
            if state.selecting:
                pending = state.pending if state.pending is not None else torch.empty(0)
                tensors[f"{key}{PENDING}.{adapter_name}"] = pending.cpu()
                tensors[f"{key}{PROGRESS}.{adapter_name}"] = torch.tensor([state.selections, int(state.dense)])
        if unselected and config.targets is None:
            warnings.warn(
                f"adapter {adapter_name!r} is saved although the mask of {len(unselected)} of {len(layers)} targets was "
                "never selected: it holds every entry that was trained, and is larger than its density says. "
                "Call sparselet.reselect and sparselet.freeze_masks, or train with sparselet.MaskSchedule().",
                UnselectedMaskWarning,
                stacklevel=4,
            )
        config._record.update(record_of_targets(layers.values()))
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Set each layer's mask from the file, and return the values under the model's names.

        Tensors of `modules_to_save` are returned as they are, other tensors are refused. On an error, an adapter that was added
        for this file is removed.
        Raises UnknownTarget, UnknownTensor, MissingTensor, ShapeMismatch, WrongBase, and a FormatError for wrong entries.
        """
        assert isinstance(config, SparseletConfig)
        try:
            read = read_state(model, config, adapter_name, state_dict)
        except SparseletError:
            _remove_unread(model, adapter_name)
            raise
        tensors = {key: state_dict[key] for key in module_keys(model, adapter_name) if key in state_dict}
        for path, layer in layers_by_path(model, adapter_name).items():
            load_target(layer, adapter_name, read[layer.target_name])
            tensors[f"{path}{VALUES}.{adapter_name}"] = layer.sparse_values[adapter_name].detach()
            tensors[f"{path}{INDICES}.{adapter_name}"] = layer.sparse_indices[adapter_name]
        return tensors


def to_adapter(model: nn.Module, adapter_name: str = "default", metadata: Mapping[str, Any] | None = None) -> SparseAdapter:
    """A model's adapter as a `SparseAdapter`, with the configuration and `metadata` as its metadata.

    model: any module that contains the adapter's layers. Raises ArgumentError for an unknown adapter.
    """
    layers = require_layers(model, adapter_name)
    config = sparselet_config(model, adapter_name).to_dict()
    modules = {
        name.replace(f".modules_to_save.{adapter_name}.", "."): tensor.detach().cpu()
        for name, tensor in base_model(model).state_dict().items()
        if f".modules_to_save.{adapter_name}." in f".{name}"
    }
    return SparseAdapter(
        {name: layer.delta(adapter_name) for name, layer in layers.items()},
        {**config, "inference_mode": True, "versions": versions(), **(metadata or {})},
        {name: layer.base_fingerprint() for name, layer in layers.items()},
        modules,
    )


def record_of_targets(layers: Collection[SparseletLayer]) -> dict[str, Any]:
    """The fields of adapter_config.json about these targets, and the library versions."""
    shapes = {layer.target_name: layer.shape for layer in layers}
    fingerprints = {layer.target_name: layer.base_fingerprint() for layer in layers}
    return {**config_of_targets(shapes, fingerprints), "versions": versions()}


def versions() -> dict[str, str]:
    """The versions of the libraries that determine an adapter's bytes."""
    return {name: importlib.metadata.version(name) for name in ("sparselet", "torch", "peft", "transformers")}


def register() -> None:
    """Register the method with PEFT, for `get_peft_model`, `PeftModel.from_pretrained` and all of its functions. Idempotent."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SparseletConfig  # pyright: ignore[reportArgumentType]
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = SparseletModel  # pyright: ignore[reportArgumentType]
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = SparseletModel.prefix  # pyright: ignore[reportArgumentType]


def _require_finite_merge(model: nn.Module, adapter_names: list[str] | None) -> None:
    for layer in sparselet_layers(model).values():
        layer.require_finite_merge(layer.active_adapters if adapter_names is None else adapter_names)


def _check_target(name: str, module: nn.Module, config: SparseletConfig) -> None:
    if not is_linear(module):
        raise ArgumentError(
            f"{name} is a {type(module).__name__}; only nn.Linear and Conv1D with floating-point weights can be targets, "
            "not quantized layers."
        )
    if config.targets is None:
        rows, columns = cast(nn.Parameter, module.weight).shape
        block_for(config.block_size, (rows, columns), name=name)


def _remove_unread(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter whose tensors were never loaded, so that the model is as before."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, SparseletModel) or not is_unread(sparselet_layers(model, adapter_name).values(), adapter_name):
        return
    if len(tuner.peft_config) > 1:
        tuner.delete_adapter(adapter_name)
    else:
        tuner.unload()


def _source_of_copy(layer: SparseletLayer, adapter_name: str, config: SparseletConfig) -> str | None:
    """The adapter that a new adapter copies: the one with the same configuration object, or None.

    TRL adds its reference adapter "ref" with the policy's configuration object, and then copies parameters by names that ours
    do not have. A second adapter from the configuration of a loaded one has no other values to start from.
    """
    if adapter_name != TRL_REFERENCE and config.targets is None:
        return None
    return next((name for name, existing in layer.sparse_config.items() if existing is config), None)


def _copy_adapter(layer: SparseletLayer, source: str, name: str) -> None:
    state, values = layer.sparse_mask[source], layer.sparse_values[source].detach().clone()
    if state.dense:
        layer.set_dense(name, values)
    else:
        layer.set_mask(name, layer.sparse_indices[source].clone(), values)
    layer.sparse_mask[name].selecting = state.selecting
    layer.sparse_mask[name].selections = state.selections


def _refuse_shared_weights(layers: Mapping[str, SparseletLayer]) -> None:
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        owner = owners.setdefault(id(weight), name)
        if owner != name:
            raise ArgumentError(f"{name} and {owner} share one weight, so they cannot both be targets; exclude one.")


register()
