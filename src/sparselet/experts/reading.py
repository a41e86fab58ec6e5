"""Reading what others wrote: the weights of adapters, and fields that change their meaning."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparselet.adapter import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from sparselet.container import TensorFile
from sparselet.errors import MissingFile, UnsupportedExpert
from sparselet.files import check_inside

FLOATS = ("F64", "F32", "F16", "BF16")


def open_weights(path: Path) -> TensorFile:
    """The weights of an adapter directory. Raises MissingFile, UnsafePath, BadContainer."""
    weights = check_inside(path, WEIGHTS_FILE)
    if not weights.is_file():
        pickled = path / "adapter_model.bin"
        hint = (
            f" {pickled.name} is pickled, which is never read; load it with PEFT and save it again." if pickled.exists() else ""
        )
        raise MissingFile(f"{weights} is missing; an adapter is {CONFIG_FILE} and {WEIGHTS_FILE}.{hint}")
    return TensorFile(weights)


def refuse_fields(file: Path, config: Mapping[str, Any], known: Iterable[str], refused: Mapping[str, str]) -> None:
    """Raise UnsupportedExpert for a field that is set and changes what an adapter means, or that nobody here knows.

    known: fields that are read, or that change nothing once the adapter is trained.
    refused: what each of the other known fields does; unset (null, false, empty) they do nothing.
    """
    for field, value in config.items():
        if value is None or value is False or value in ([], {}, "", "none"):
            continue
        if field in refused:
            raise UnsupportedExpert(f"{file}: {field} is {value!r:.60}: {refused[field]}.")
        if field not in known:
            raise UnsupportedExpert(
                f"{file}: {field} is {value!r:.60}, a field that is not known here and may change what the adapter means. "
                "Remove it if it does not."
            )


def describe(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration of a PEFT adapter tells of base model and task."""
    return {key: config[key] for key in ("base_model_name_or_path", "task_type") if isinstance(config.get(key), str)}


def target_of(tensor: str, suffix: str) -> str:
    """The target's name in the name of one of its tensors."""
    return tensor.removeprefix(PREFIX).removesuffix(suffix)
