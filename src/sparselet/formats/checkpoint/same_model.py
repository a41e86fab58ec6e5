"""Whether the weights of two checkpoints mean the same model: their configurations, as transformers resolves them."""

from collections.abc import Iterator, Mapping
from typing import Any

from sparselet.errors import WrongBase
from sparselet.model_config import optional_field

# Fields that change neither what a model computes from its weights and a text, nor how its weights are laid out.
_HARMLESS = (
    "_name_or_path _attn_implementation architectures auto_map transformers_version dtype torch_dtype use_cache id2label "
    "label2id num_labels problem_type finetuning_task task_specific_params output_attentions output_hidden_states return_dict "
    "gradient_checkpointing initializer_range initializer_factor init_std initializer_cutoff_factor pretraining_tp "
    "embedding_initializer_range rescale_prenorm_residual bos_token_id eos_token_id sep_token_id cls_token_id "
    "forced_bos_token_id forced_eos_token_id output_router_logits router_aux_loss_coef router_z_loss_coef aux_loss_alpha "
    "vocab_size quantization_config use_mambapy torchscript embd_pdrop resid_pdrop attn_pdrop keys_to_ignore_at_inference"
)
# Positions as these kinds compute them do not depend on how many there may be.
_ANY_LENGTH = ("default", "linear", "llama3", "proportional")


def require_same_meaning(tuned: Any, base: Any, where: str, pads_matter: bool) -> None:
    """Raise WrongBase, naming the field, if the same weights would be another model under `tuned` than under `base`.

    tuned, base: configurations resolved by transformers, so that a difference of spelling is none. where: names the tuned
    one in messages. pads_matter: whether the model counts positions from its padding token (RoBERTa).
    """
    if tuned.model_type != base.model_type:
        _refuse(where, "model_type", tuned.model_type, base.model_type)
    first, second = (dict(_fields(config, pads_matter)) for config in (tuned, base))
    for field in sorted(first.keys() | second.keys()):
        if first.get(field) != second.get(field):
            _refuse(where, field, first.get(field), second.get(field))


def _refuse(where: str, field: str, tuned: Any, base: Any) -> None:
    raise WrongBase(
        f"{where}: {field} is {tuned!r:.80}, the base model's {base!r:.80}; the same weights would mean another model. "
        "Give the model it was tuned from."
    )


def _fields(config: Any, pads_matter: bool, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields that a configuration's class knows and that matter, those of configurations in it by dotted names."""
    parts = {name for name in optional_field(config, "sub_configs") or {} if optional_field(config, name) is not None}
    for part in parts:
        yield from _fields(optional_field(config, part), pads_matter, f"{prefix}{part}.")
    content, declared = config.to_dict(), _declared_fields(config)
    for field, value in content.items():
        if (
            field in parts
            or field not in declared
            or field in _HARMLESS.split()
            or "dropout" in field
            or field.endswith("drop_rate")
        ):
            continue
        if field == "max_position_embeddings" and _any_length(content):
            continue
        if (field == "pad_token_id" and not pads_matter) or (field == "max_window_layers" and "layer_types" in content):
            continue
        yield prefix + field, _plain(value, field)


def _declared_fields(config: Any) -> set[str]:
    """The fields that the class has; others in a file are notes that no model of it reads."""
    annotated = {name for kind in type(config).__mro__ for name in vars(kind).get("__annotations__", {})}
    try:
        return annotated | set(type(config)().to_dict())
    except (TypeError, ValueError, AttributeError):  # of some that are made of others there is no default
        return annotated | set(config.to_dict())


def _any_length(content: Mapping[str, Any]) -> bool:
    rope = content.get("rope_parameters")
    if not isinstance(rope, dict):
        return rope is None
    ropes = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return all(part.get("rope_type", "default") in _ANY_LENGTH for part in ropes)


def _plain(value: Any, field: str) -> Any:
    """A value without differences of spelling: tuples as lists, nulls and the older name of a rope's type left out."""
    if isinstance(value, dict):
        older = {"type"} if field.startswith("rope") or "rope_type" in value else set()
        return {str(k): _plain(v, str(k)) for k, v in value.items() if v is not None and k not in older}
    return [_plain(entry, field) for entry in value] if isinstance(value, (list, tuple)) else value
