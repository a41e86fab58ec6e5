"""Reading what others wrote: JSON objects, and safetensors files tensor by tensor."""

import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from sparselet.adapter import CONFIG_FILE, MAPPED, PREFIX, WEIGHTS_FILE
from sparselet.errors import AbsurdShape, BadConfig, BadContainer, MissingFile, UnsupportedExpert
from sparselet.files import check_inside

FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_JSON_BYTES = 64 * 2**20


class TensorFile:
    """A safetensors file: shapes and dtypes from its header, its tensors when asked for.

    shapes, dtypes: by tensor name. notes: the strings that the header holds beside the tensors.
    Raises BadContainer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._open()
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 - not a mapping
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(part.get_shape()) for name, part in slices.items()}
        self.dtypes: dict[str, str] = {name: part.get_dtype() for name, part in slices.items()}
        self.notes: dict[str, str] = dict(self._file.metadata() or {})

    def read(self, name: str) -> Tensor:
        """A tensor, mapped into memory; not to be written to. What was mapped is let go by and by."""
        with self._lock:  # threads read targets of one file at the same time
            if self._mapped > MAPPED:
                self._open()
            tensor = self._file.get_tensor(name)
            self._mapped += tensor.nbytes
            return tensor

    def _open(self) -> None:
        try:
            self._file = safetensors.safe_open(self.path, framework="pt")
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise BadContainer(f"{self.path} is not a whole safetensors file: {error}") from error
        self._mapped = 0


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises MissingFile, AbsurdShape, BadConfig."""
    if not file.is_file():
        raise MissingFile(f"{file} is missing.")
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise AbsurdShape(f"{file} has {file.stat().st_size} bytes; the limit is {_MAX_JSON_BYTES}.")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadConfig(f"{file}: expected an object, got {type(content).__name__}.")
    return content


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
