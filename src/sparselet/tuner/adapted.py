"""The sparse layers of a model, whether added by PEFT, `inject_adapter_in_model` or transformers' `add_adapter`.

These are functions, not methods of the tuner: PEFT forwards attributes that a tuner lacks to the base model, so a method would
hide the base model's attribute of that name.
"""

from torch import Tensor, nn

from sparselet.errors import ArgumentError
from sparselet.tuner.config import SparseletConfig
from sparselet.tuner.layer import SparseletLayer


def layers_by_path(model: nn.Module, adapter_name: str | None = None) -> dict[str, SparseletLayer]:
    """The adapted layers by their module path in `model`, in its order; with `adapter_name`, those that have this adapter."""
    return {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, SparseletLayer) and (adapter_name is None or adapter_name in layer.sparse_values)
    }


def sparselet_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, SparseletLayer]:
    """The adapted layers by target name: their path in the base model, however it is wrapped. As `layers_by_path` else."""
    return {layer.target_name: layer for layer in layers_by_path(model, adapter_name).values()}


def require_layers(model: nn.Module, adapter_name: str) -> dict[str, SparseletLayer]:
    """The layers that have an adapter. Raises ArgumentError if there is none."""
    layers = sparselet_layers(model, adapter_name)
    if not layers:
        names = sorted({name for layer in sparselet_layers(model).values() for name in layer.sparse_values})
        if names:
            raise ArgumentError(f"no sparse adapter is called {adapter_name!r}; there are {', '.join(names)}.")
        raise ArgumentError("the model has no sparse adapter; wrap it with peft.get_peft_model(model, SparseletConfig()).")
    return layers


def unadapted_weight(layer: SparseletLayer) -> Tensor:
    """The base model's weight of a layer as a new tensor, whether or not adapters are in it."""
    return layer._build(())


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the active sparse adapters. Raises ArgumentError if the model has no sparse adapter."""
    layers = sparselet_layers(model).values()
    if not any(layer.sparse_values for layer in layers):
        require_layers(model, "")
    names = dict.fromkeys(name for layer in layers for name in layer.active_adapters)
    return [name for name in names if any(name in layer.sparse_values for layer in layers)]


def sparselet_config(model: nn.Module, adapter_name: str) -> SparseletConfig:
    """The configuration of an adapter. Raises ArgumentError for an unknown adapter."""
    return next(iter(require_layers(model, adapter_name).values())).sparse_config[adapter_name]


def base_model(model: nn.Module) -> nn.Module:
    """The base model inside `model`, in which the target names are module paths; `model` itself where nothing is adapted."""
    for path, layer in layers_by_path(model).items():
        if f".{path}".endswith(f".{layer.target_name}"):
            return model.get_submodule(path.removesuffix(layer.target_name).rstrip("."))
    return model
