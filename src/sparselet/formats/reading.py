"""Reading what others wrote: the weights of adapters, and fields that change their meaning."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparselet.adapter import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from sparselet.adapter_metadata import AdapterMetadata
from sparselet.errors import MissingFile, MissingTensor, UnknownTensor, UnsupportedExpert
from sparselet.io.paths import check_inside
from sparselet.io.tensor_files import TensorFile
from sparselet.names import unwrapped

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


def refuse_fields(file: Path, config: Mapping[str, Any], read_fields: Iterable[str], refused: Mapping[str, str]) -> None:
    """Raise UnsupportedExpert for a field that is set and changes what an adapter means, or that nobody here knows.

    known: fields that are read, or that change nothing once the adapter is trained.
    refused: what each of the other known fields does; unset (null, false, empty) they do nothing.
    """
    for field, value in config.items():
        if value is None or value is False or value in ([], {}, "", "none"):
            continue
        if field in refused:
            raise UnsupportedExpert(f"{file}: {field} is {value!r:.60}: {refused[field]}.")
        if field not in read_fields:
            raise UnsupportedExpert(
                f"{file}: {field} is {value!r:.60}, a field that is not known here and may change what the adapter means. "
                "Remove it if it does not."
            )


def refuse_quantised(config: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedExpert if a model's configuration says that its weights are quantised."""
    for part in (config, config.get("text_config")):
        settings = (part.get("quantization_config") or part.get("compression_config")) if isinstance(part, dict) else None
        if settings:
            method = settings.get("quant_method", "a method without a name") if isinstance(settings, dict) else settings
            raise UnsupportedExpert(
                f"{where}: the weights are quantised by {method!s:.40} (quantization_config in config.json), so they cannot be "
                "compared. Give the model it was quantised from, or load it with transformers, dequantize() it, and save it."
            )


def describe(config: Mapping[str, Any]) -> AdapterMetadata:
    """What the configuration of a PEFT adapter tells of base model and task."""
    base, task_type = (config.get(field) for field in ("base_model_name_or_path", "task_type"))
    return AdapterMetadata(base if isinstance(base, str) else None, task_type if isinstance(task_type, str) else None)


def target_of(tensor: str, suffix: str) -> str:
    """The target's name in the name of one of its tensors, without what torch.compile and the like add to it."""
    return unwrapped(tensor.removesuffix(suffix).removeprefix(PREFIX))


def tensors_of_targets(tensors: TensorFile, suffixes: tuple[str, str], names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The two tensors of each target. Raises MissingTensor for one of two, UnknownTensor for two of a kind."""
    pairs: dict[str, dict[str, str]] = {name: {} for name in names}
    for tensor in tensors.shapes:
        suffix = next(suffix for suffix in suffixes if tensor.endswith(suffix))
        other = pairs[target_of(tensor, suffix)].setdefault(suffix, tensor)
        if other != tensor:
            raise UnknownTensor(f"{tensors.path}: {other} and {tensor} are both {suffix} of {target_of(tensor, suffix)}.")
    for name, pair in pairs.items():
        for suffix, other in (suffixes, suffixes[::-1]):
            if suffix not in pair:
                raise MissingTensor(f"{tensors.path}: {PREFIX}{name}{suffix} is missing, but {pair[other]} is there.")
    return {name: (pair[suffixes[0]], pair[suffixes[1]]) for name, pair in pairs.items()}
