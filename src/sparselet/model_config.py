"""A base model's configuration, as transformers resolves it: checked before anything of the claimed size is created.

No code of a model's repository is ever run, and the user is never asked to allow it.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparselet.errors import AbsurdShape, MissingExtra, ModelError
from sparselet.io.printable import reason

_MANY = 4096  # layers or experts: beyond any model; the skeleton creates each of them
_COUNTED = re.compile(r"(^|_)(layers?|experts|depth)$")


def read_config(name: str) -> Any:
    """The configuration of a model directory or hub name `org/name[@revision]`, resolved by transformers.

    Raises ModelError (it cannot be read, or the model is code of its own), AbsurdShape, MissingExtra.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtra("reading a model's configuration needs transformers: pip install 'sparselet[train]'.") from error
    local = Path(name).is_dir()
    repository, _, revision = (name, "", "") if local else name.partition("@")
    try:
        content, _ = transformers.PreTrainedConfig.get_config_dict(repository, revision=revision or None)
        _refuse_code(name, content)
        _refuse_counts(name, content)
        config = transformers.AutoConfig.from_pretrained(repository, revision=revision or None, trust_remote_code=False)
        fields = config.to_dict()
    except (ModelError, AbsurdShape):
        raise
    except Exception as error:  # transformers, its field checks and the hub's library have too many classes of errors
        raise ModelError(f"cannot read the configuration of {name}: {reason(error)}") from error
    _refuse_counts(name, fields)
    return config


def optional_field(owner: Any, name: str) -> Any:
    """An attribute that only some classes of another library have, such as a field of a configuration; None without it."""
    return getattr(owner, name, None)


def _refuse_code(name: str, content: Mapping[str, Any]) -> None:
    """Raise ModelError if only code of the repository can build the model, or a field names code on the hub."""
    import transformers

    model_type = content.get("model_type")
    if content.get("auto_map") and not (isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING):
        raise ModelError(
            f"{name} is a model with code of its own (auto_map in config.json), which is never run; its model_type "
            f"{model_type!r:.60} is none of transformers' own."
        )
    for field, value in _fields(content):
        if field.strip("_") == "attn_implementation" and isinstance(value, str) and "/" in value:
            raise ModelError(f"{name}: {field} in config.json is {value!r:.60}, code on the hub, which is never run.")


def _refuse_counts(name: str, content: Mapping[str, Any]) -> None:
    for field, value in _fields(content):
        if _COUNTED.search(field) and isinstance(value, int) and value > _MANY:
            raise AbsurdShape(f"{name}: {field} is {value:.6g} in config.json; the limit is {_MANY}.")


def _fields(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields of a configuration and of the configurations in it."""
    for field, value in content.items():
        yield str(field), value
        if isinstance(value, Mapping):
            yield from _fields(value)
