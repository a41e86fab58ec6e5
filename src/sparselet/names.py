"""The targets of a model, and which of them a name from elsewhere means.

A target is a parameter of a model. A module's `weight` has the name of its module; any other parameter, such as a bias, has its
full name: `model.norm`, `model.layers.0.self_attn.q_proj`, `model.layers.0.self_attn.q_proj.bias`.

Files and wrapped models have different names for it: modules that wrap a model add a part to every name (`torch.compile`
`_orig_mod`, DDP `module`), a model without its head lacks the first part, and transformers rewrites, as it loads them, names in
files that were written for another class or version. `Names` has a model's rules.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparselet.errors import UnknownTarget, UnsupportedExpert

WEIGHT = ".weight"

# Parts that modules around a model or a layer add to the names below them.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_DATA_PARALLEL = "module."


def unwrapped(name: str) -> str:
    """A name without the parts that torch.compile, DDP, FSDP and checkpointing add."""
    return base_name(name).removeprefix(_DATA_PARALLEL)


def base_name(name: str) -> str:
    """A name without the parts that torch.compile, FSDP and checkpointing add, in a model that DDP does not wrap."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def target_name(parameter: str) -> str:
    """The name of the target whose tensor is `parameter`."""
    return parameter.removesuffix(WEIGHT)


def as_rows(weight: Tensor) -> Tensor:
    """A parameter as the target's two sides [rows, columns]: [n] as [1, n]; of more sides all but the last are joined."""
    return weight.reshape(1, -1) if weight.ndim < 2 else weight.reshape(-1, weight.shape[-1])


@dataclass(frozen=True)
class Layer:
    """The module that a target belongs to."""

    module: nn.Module
    parameter: nn.Parameter
    is_weight: bool

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored [in, out], as GPT-2's `Conv1D` does."""
        return self.is_weight and type(self.module).__name__ == "Conv1D"  # transformers', which need not be installed

    @property
    def linear(self) -> bool:
        """Whether the target is the weight of an `nn.Linear` or a `Conv1D`."""
        return self.is_weight and (isinstance(self.module, nn.Linear) or self.transposed)


class Names:
    """The targets of a model, which may lie on the meta device and holds no adapters.

    model: without the wrappers of torch.compile and DDP. layers: by target, in the model's order. shared: for each target all
    targets that are the same parameter, in the model's order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = _bare(model)
        self.layers: dict[str, Layer] = {}
        groups: dict[int, list[str]] = {}
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                target = target_name(unwrapped(f"{prefix}.{name}" if prefix else name))
                self.layers[target] = Layer(module, parameter, name == "weight")
                groups.setdefault(id(parameter), []).append(target)
        self.shared = {name: tuple(group) for group in groups.values() for name in group}

    def find(self, names: Iterable[str], where: str = "the adapter") -> dict[str, str]:
        """The target that each name means, whether it names a module or a parameter.

        Raises UnknownTarget, also if two names mean one target.
        """
        targets: dict[str, str] = {}
        owners: dict[str, str] = {}
        for name in names:
            target = next((n for n in (name, unwrapped(name)) if n in self.layers), None)
            if target is None:
                placed = self.place([name + WEIGHT, name])  # a converted tensor belongs to no single target
                renamed = {tensor: parameter for tensor, (parameter, pattern) in placed.items() if pattern is None}
                candidates = (target_name(renamed.get(name + WEIGHT, "")), renamed.get(name))
                target = next((candidate for candidate in candidates if candidate in self.layers), None)
            if target is None:
                raise UnknownTarget(f"{where}: the model has no target {name}, which the adapter changes.")
            owner = owners.setdefault(target, name)
            if owner != name:
                raise UnknownTarget(f"{where}: {owner} and {name} are both {target} in the model; only one can be meant.")
            targets[name] = target
        return targets

    def place(self, tensors: Iterable[str]) -> dict[str, tuple[str, str | None]]:
        """Where transformers puts each tensor of a checkpoint: the name in the model's state dict (which may lack it), and the
        pattern of the conversion that joins several tensors into one parameter or splits one, if there is such a conversion."""
        state = self.model.state_dict()
        renamed = _renaming(self.model, self.rules(), state)
        placed: dict[str, tuple[str, str | None]] = {}
        for tensor in sorted(tensors, key=_natural):
            candidates = [renamed(name) for name in dict.fromkeys((tensor, unwrapped(tensor)))]
            placed[tensor] = next((candidate for candidate in candidates if candidate[0] in state), candidates[-1])
        return placed

    def rules(self) -> list[Any]:
        """transformers' renamings and conversions for the model; none for other models."""
        transformers = sys.modules.get("transformers")  # imported by every model of that library
        if transformers is None or not isinstance(self.model, transformers.PreTrainedModel):
            return []
        from transformers.conversion_mapping import get_model_conversion_mapping

        return get_model_conversion_mapping(self.model)


def refuse_shared(names: Names, targets: Iterable[str], where: str = "the adapter") -> None:
    """Raise UnsupportedExpert if a target shares its weight with another layer, so that it cannot be changed alone.

    An embedding that comes first in the model represents all layers that share its weight: its change is a change of the shared
    weight, as a full checkpoint's is. The change of an output layer tied to it is not: PEFT changes one of the two.
    """
    for target in targets:
        group = names.shared[target]
        if len(group) > 1 and (target != group[0] or names.layers[target].linear):
            sharing = next(name for name in group if name != target)
            raise UnsupportedExpert(
                f"{where}: {target} shares its weight with {sharing} in the base model; PEFT changes one of the two, which no "
                "ΔW of the shared weight does. Leave the target out, or use a base model that keeps the two apart "
                "(tie_word_embeddings false)."
            )


def _bare(model: nn.Module) -> nn.Module:
    """The model without the modules that wrap all of it."""
    while (inner := model._modules.get("_orig_mod") or model._modules.get("module")) and len(model._modules) == 1:
        model = inner
    return model


def _renaming(model: Any, rules: list[Any], state: dict[str, Tensor]) -> Callable[[str], tuple[str, str | None]]:
    """A function that renames a tensor as transformers does on loading. A name that the model itself has stays."""
    if not rules:
        return lambda tensor: (tensor, None)
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def renamed(tensor: str) -> tuple[str, str | None]:
        placed = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        return (tensor, None) if placed[0] not in state and tensor in state else placed

    return renamed


def _natural(name: str) -> list[tuple[Any, ...]]:
    """The order in which transformers reads tensors: numbers in a name by value."""
    parts = [(part.rstrip("0123456789"), part) for part in name.split(".")]
    return [(0, int(part)) if part.isdigit() else (1, text, int(part[len(text) :] or -1)) for text, part in parts]
