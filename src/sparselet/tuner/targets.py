"""Which layers of a model are its query, key and value projections."""

from collections import Counter
from typing import cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from sparselet.errors import NoTargets

# The children of an attention module that project to queries, keys and values, apart or fused, and who names them so.
LAYOUTS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, BART, Phi-2, ViT
    ("qkv_proj",),  # Phi-3
    ("query_key_value",),  # GPT-NeoX, BLOOM, Falcon
    ("c_attn",),  # GPT-2
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA
    ("q", "k", "v"),  # T5
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("Wqkv",),  # MPT, ModernBERT
)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is `y = x Wᵀ + b` or GPT-2's `Conv1D`, `y = x W + b`, with an ordinary floating weight."""
    return isinstance(module, (nn.Linear, Conv1D)) and module.weight.is_floating_point()


def find_qkv(model: nn.Module) -> list[str]:
    """The names that the model's query, key and value projections end in, such as `["k_proj", "q_proj", "v_proj"]`.

    A layout counts only where one module holds all of its parts and all of them are linear.
    Raises NoTargets, listing the linear layers there are.
    """
    found: set[str] = set()
    for module in model.modules():
        children = dict(module.named_children())
        for layout in LAYOUTS:
            parts = [children.get(name) for name in layout]
            if all(part is not None and is_linear(getattr(part, "base_layer", part)) for part in parts):
                found.update(layout)
    if not found:
        raise NoTargets(
            f"no query, key and value projections were found in {type(model).__name__}. Name the layers in "
            f"target_modules; its linear layers are: {describe_linear_layers(model)}."
        )
    return sorted(found)


def describe_linear_layers(model: nn.Module) -> str:
    """The linear layers of a model by the last part of their names, with shape and count, for messages."""
    layers = Counter(
        (name.rpartition(".")[2], tuple(cast(nn.Parameter, module.weight).shape))
        for name, module in model.named_modules()
        if is_linear(module)
    )
    return ", ".join(f"{name} {list(shape)} ×{count}" for (name, shape), count in sorted(layers.items())) or "none"
