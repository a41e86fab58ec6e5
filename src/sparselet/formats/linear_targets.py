"""What an adapter changes, as far as PEFT's methods for linear layers can hold it."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from sparselet.adapter import as_expert, require_finite
from sparselet.errors import ExportError, UnknownTarget
from sparselet.expert import Expert, ExpertOrDeltas

# Layers by these names are linear in some models; in others they are embeddings, or GPT-2's Conv1D, which stores its weight
# [in, out]. Only the base model tells.
AMBIGUOUS = frozenset(
    ["embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "shared", "c_attn", "q_attn", "c_fc", "c_proj", "c_mlp"]
)


@dataclass(frozen=True)
class Target:
    """What is to be written of one target. transposed: whether the base model stores its weight [in, out] (Conv1D)."""

    shape: tuple[int, int]
    nnz: int
    transposed: bool


def linear_targets(adapter: Expert, base: nn.Module | None) -> dict[str, Target]:
    """The targets that the adapter changes, by name, once every one is known to be a linear layer and finite.

    base: the base model, whose weights are not looked at (it may be on the meta device). Without it all targets are taken
    for `nn.Linear`, and those whose name or shape leaves that in doubt are refused.

    Raises ExportError (nothing to write, another kind of layer, modules trained in full), UnknownTarget, NonFiniteValue.
    """
    refuse_modules(adapter)
    layers: dict[str, Any] = {} if base is None else dict(base.named_modules())
    targets: dict[str, Target] = {}
    for name in sorted(adapter):
        delta = adapter[name]
        require_finite(delta.values, name)
        if not delta.nnz:
            continue
        if base is None and (name.rpartition(".")[2] in AMBIGUOUS or 1 in delta.shape):
            raise ExportError(
                f"the adapter does not say whether {name} {list(delta.shape)} is a linear layer; set `base` to the base model."
            )
        targets[name] = Target(delta.shape, delta.nnz, base is not None and _is_transposed(name, layers.get(name)))
    if not targets:
        raise ExportError("the adapter changes nothing, so there is nothing to write.")
    return targets


def refuse_modules(adapter: ExpertOrDeltas) -> Expert:
    """The adapter as an expert. Raises ExportError if it trained modules in full, which are not deltas of it."""
    expert = as_expert(adapter)
    if expert.trained_modules:
        names = ", ".join(expert.trained_modules)
        raise ExportError(f"the adapter trained {names} in full (modules_to_save), which is not written here.")
    return expert


def _is_transposed(name: str, layer: nn.Module | None) -> bool:
    if layer is None:
        raise UnknownTarget(f"the base model has no target {name}, which the adapter changes.")
    if isinstance(layer, nn.Linear):
        return False
    if type(layer).__name__ == "Conv1D":  # transformers', which need not be installed
        return True
    raise ExportError(f"{name} is a {type(layer).__name__}; this format changes linear layers only.")
