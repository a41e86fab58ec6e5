"""The sparse layers of a model, whoever put them there: PEFT, `inject_adapter_in_model` or transformers' `add_adapter`.

These are functions, and not methods of the tuner: PEFT hands on the attributes that a tuner lacks to the base model, so a
method would hide the base model's attribute of that name.
"""

from torch import nn

from sparselet.errors import ArgumentError
from sparselet.tuner.config import SparseletConfig
from sparselet.tuner.layer import SparseletLayer


def sparselet_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, SparseletLayer]:
    """The adapted layers by target name, in the model's order; with `adapter_name`, those that have this adapter."""
    return {
        layer.target_name: layer
        for layer in model.modules()
        if isinstance(layer, SparseletLayer) and (adapter_name is None or adapter_name in layer.sparse_values)
    }


def require_layers(model: nn.Module, adapter_name: str) -> dict[str, SparseletLayer]:
    """The layers that have an adapter. Raises ArgumentError where there is none."""
    layers = sparselet_layers(model, adapter_name)
    if not layers:
        names = sorted({name for layer in sparselet_layers(model).values() for name in layer.sparse_values})
        if names:
            raise ArgumentError(f"no sparse adapter is called {adapter_name!r}; there are {', '.join(names)}.")
        raise ArgumentError("the model has no sparse adapter; wrap it with peft.get_peft_model(model, SparseletConfig()).")
    return layers


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the active sparse adapters. Raises ArgumentError where the model has no sparse adapter."""
    layers = sparselet_layers(model).values()
    if not any(layer.sparse_values for layer in layers):
        require_layers(model, "")
    names = dict.fromkeys(name for layer in layers for name in layer.active_adapters)
    return [name for name in names if any(name in layer.sparse_values for layer in layers)]


def adapter_config(model: nn.Module, adapter_name: str) -> SparseletConfig:
    """The configuration of an adapter. Raises ArgumentError for an unknown adapter."""
    return next(iter(require_layers(model, adapter_name).values())).sparse_config[adapter_name]


def base_model(model: nn.Module) -> nn.Module:
    """The module that the target names start from, however it is wrapped; `model` itself where nothing is adapted."""
    for name, module in model.named_modules():
        if isinstance(module, SparseletLayer) and f".{name}".endswith(f".{module.target_name}"):
            return model.get_submodule(name.removesuffix(module.target_name).rstrip("."))
    return model
