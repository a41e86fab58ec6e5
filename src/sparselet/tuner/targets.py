"""Which layers of a model are its query, key and value projections."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as ALL_LINEAR
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparselet.errors import NoTargets

ConfigT = TypeVar("ConfigT", bound=PeftConfig)

# Names of the query, key and value projections in an attention module, separate or fused, and models that use them.
LAYOUTS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, BART, Phi-2, ViT
    ("qkv_proj",),  # Phi-3
    ("query_key_value",),  # GPT-NeoX, BLOOM, Falcon
    ("c_attn",),  # GPT-2
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA
    ("q", "k", "v"),  # T5
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("Wqkv",),  # MPT, ModernBERT
    ("in_proj",),  # DeBERTa
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa-v2
    ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj"),  # DeepSeek-V2-Lite: keys and values through a low rank (MLA)
    ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),  # DeepSeek, MiniCPM3
    ("q_a_proj", "q_b_proj", "kv_proj"),  # DeepSeek-V4
    ("project_q", "project_k", "project_v"),  # CPM-Ant
    ("Wq", "Wk", "Wv"),  # CTRL
    ("q_head", "k_head", "v_head"),  # Funnel
    ("layer_1", "layer_2"),  # XLNet's feed-forward layers: its projections are three-dimensional tensors, not layers
)

IN_ATTENTION = {("in_proj",)}  # only in attention modules: Mamba's mixers have a layer of this name too


def is_linear(module: nn.Module) -> bool:
    """Whether a module is `y = x Wᵀ + b` or GPT-2's `Conv1D`, `y = x W + b`, with a floating-point weight."""
    return isinstance(module, (nn.Linear, Conv1D)) and module.weight.is_floating_point()


def default_targets(model: nn.Module, config: PeftConfig) -> list[str]:
    """The target_modules for a configuration whose own are None or a preset, by its other fields."""
    chosen: Any = copy.copy(config)
    preset = "qkv" if chosen.target_modules is None else str(chosen.target_modules).lower()
    if preset == "qkv":
        chosen.target_modules, full_names = find_qkv(model)
        if full_names is None:
            return chosen.target_modules
    else:
        full_names = PRESETS[preset](model)
        chosen.target_modules = sorted({name.rpartition(".")[2] for name in full_names})
    # By endings, since PEFT checks the layer number only where target_modules has no full names.
    return sorted(name for name in full_names if check_target_module_exists(chosen, name))


def _all_linear(model: nn.Module) -> set[str]:
    """All linear layers but the output layer, as PEFT's "all-linear" has them."""
    config: Any = PeftConfig()
    config.target_modules = ALL_LINEAR
    linear: Any = _maybe_include_all_linear_layers(config, model)
    return set(linear.target_modules)


def _qkv(model: nn.Module) -> set[str]:
    """The query, key and value projections."""
    endings, full_names = find_qkv(model)
    return set(full_names or [name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings])


def _attention(model: nn.Module) -> set[str]:
    """All linear layers of the modules that hold the query, key and value projections."""
    projections = _qkv(model)
    parents = tuple({f"{name.rpartition('.')[0]}." for name in projections})
    return {name for name in _all_linear(model) if name.startswith(parents)} | projections


def _mlp(model: nn.Module) -> set[str]:
    """All linear layers that text reaches outside of attention."""
    reached = _reached_by_text(model)
    layers = {name for name in _all_linear(model) - _attention(model) if reached(name)}
    if not layers:
        raise NoTargets(f"no linear layers outside of attention in {type(model).__name__}: {describe_linear_layers(model)}.")
    return layers


# Values of target_modules that stand for layers by what they do; "qkv" is the default.
PRESETS: dict[str, Callable[[nn.Module], set[str]]] = {
    "qkv": _qkv,
    "attention": _attention,
    "mlp": _mlp,
    "all": _all_linear,
    ALL_LINEAR: _all_linear,
}


def with_named_targets(model: nn.Module, config: ConfigT) -> ConfigT:
    """The configuration, with the names of layers in the place of a preset or of no `target_modules`."""
    names: Any = vars(config)["target_modules"]
    if names is not None and not (isinstance(names, str) and names.lower() in PRESETS):
        return config
    named: Any = copy.copy(config)
    named.target_modules = default_targets(model, config)
    return named


def find_qkv(model: nn.Module) -> tuple[list[str], list[str] | None]:
    """The names that the query, key and value projections end in, such as `["k_proj", "q_proj", "v_proj"]`.

    A layout matches where one module has all of its parts and all of them are linear. In a model of several modalities only
    the language model is searched, since rows are text: no row reaches a vision tower, or layers that attend to one.
    Also returns the full names where those endings alone would match further layers, else None.
    Raises NoTargets, which lists the model's linear layers.
    """
    reached = _reached_by_text(model)
    projections: dict[str, None] = {}
    for name, module in model.named_modules():
        if reached(name):
            children = dict(module.named_children())
            layouts = [layout for layout in LAYOUTS if _matches(module, children, layout)]
            projections.update(dict.fromkeys(f"{name}.{part}".lstrip(".") for layout in layouts for part in layout))
    if not projections:
        raise NoTargets(
            f"no query, key and value projections were found in {type(model).__name__}. Name the layers in "
            f"target_modules; its linear layers are: {describe_linear_layers(model)}."
        )
    endings = {name.rpartition(".")[2] for name in projections}
    ambiguous = any(name.rpartition(".")[2] in endings and not reached(name) for name, _ in model.named_modules())
    return sorted(endings), sorted(projections) if ambiguous else None


def _matches(module: nn.Module, children: Mapping[str, nn.Module], layout: tuple[str, ...]) -> bool:
    if layout in IN_ATTENTION and "ttention" not in type(module).__name__:
        return False
    parts = [children.get(name) for name in layout]
    bases = [part.get_base_layer() if isinstance(part, BaseTunerLayer) else part for part in parts]
    return all(base is not None and is_linear(base) for base in bases)


def _reached_by_text(model: nn.Module) -> Callable[[str], bool]:
    """A function of a layer's name: whether rows of text reach that layer."""
    if not isinstance(model, PreTrainedModel) or not isinstance(model.config, PreTrainedConfig):
        return lambda name: True
    config = model.config
    text = config.get_text_config()
    parts = {f"{name}.": part for name, part in model.named_modules() if name and isinstance(part, PreTrainedModel)}
    language = tuple(name for name, part in parts.items() if part.config is text and text is not config)
    foreign = tuple(name for name, part in parts.items() if "text" not in part.input_modalities)
    if "text" not in model.input_modalities:
        return lambda name: True
    crosses = () if text.is_encoder_decoder or config.is_encoder_decoder else ("cross", "encoder_attn")

    def reached(name: str) -> bool:
        inside = not language or name.startswith(language)
        return inside and not name.startswith(foreign) and not any(word in name for word in crosses)

    return reached


def describe_linear_layers(model: nn.Module) -> str:
    """The linear layers of a model by the last part of their names, with shape and count, for messages."""
    layers = Counter(
        (name.rpartition(".")[2], tuple(cast(nn.Parameter, module.weight).shape))
        for name, module in model.named_modules()
        if is_linear(module)
    )
    return ", ".join(f"{name} {list(shape)} ×{count}" for (name, shape), count in sorted(layers.items())) or "none"
