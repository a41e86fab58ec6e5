"""`SteeringVector`: the vector, where it is added and how strongly, as one directory that is checked when it is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sparselet import kernels
from sparselet.errors import (
    BadConfig,
    BadDtype,
    BadShape,
    MissingTensor,
    NonFiniteValue,
    UnknownTensor,
    UnsupportedVersion,
    prefix_errors,
)
from sparselet.fingerprint import Fingerprint
from sparselet.io.atomic import atomic_directory, atomic_write
from sparselet.io.json_files import read_object, write_json
from sparselet.io.paths import check_inside
from sparselet.io.tensor_files import TensorFile
from sparselet.setting_checks import LARGEST

STEERING_FILE, STEERING_TENSORS = "steering.json", "steering.safetensors"
STEERING_VERSION = 1
_TENSOR = "vector"


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """v, added as strength · v to what block `layer` writes.

    values: float32 [width], not normalised. layer: number of the block, from 0; its output is `hidden_states[layer + 1]` in
    transformers, of the last block before the final norm. strength: γ; a negative one steers the other way.
    base: the base model's name. fingerprint: of its input embedding. record: how the vector was made.
    Raises BadShape, NonFiniteValue.
    """

    values: Tensor
    layer: int
    strength: float
    base: str | None = None
    fingerprint: Fingerprint | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = self.values
        if values.dtype != torch.float32 or values.ndim != 1 or not len(values):
            raise BadShape(f"a steering vector is float32 [width], got {values.dtype} {list(values.shape)}.")
        if not kernels.all_finite(values):
            raise NonFiniteValue(
                f"{int((~values.isfinite()).sum())} of {len(values)} entries of a steering vector are not finite."
            )

    @property
    def width(self) -> int:
        """Entries of the vector."""
        return len(self.values)

    def save(self, path: str | Path) -> Path:
        """Write the vector as the new directory `path`, whole or not at all. Raises OutputExists, WriteFailed."""
        content = {
            "version": STEERING_VERSION,
            "layer": self.layer,
            "strength": self.strength,
            "width": self.width,
            "base_model_name_or_path": self.base,
            "fingerprint": None if self.fingerprint is None else dict(self.fingerprint),
            "record": dict(self.record),
        }
        with atomic_directory(path) as directory:
            with atomic_write(directory / STEERING_TENSORS) as file:
                file.write(safetensors.torch.save({_TENSOR: self.values.detach().cpu().contiguous()}, {"format": "pt"}))
            write_json(directory / STEERING_FILE, content)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read and check a directory.

        Raises MissingFile, UnsafePath, BadConfig, UnsupportedVersion, BadContainer, MissingTensor, UnknownTensor, BadDtype,
        BadShape and NonFiniteValue, which name the file, the field, what was expected and what came.
        """
        file = check_inside(Path(path), STEERING_FILE)
        content = read_object(file)
        _check_fields(content, file)
        tensors = TensorFile(check_inside(Path(path), STEERING_TENSORS))
        if _TENSOR not in tensors.shapes:
            raise MissingTensor(f"{tensors.path}: {_TENSOR} is missing.")
        for name in sorted(tensors.shapes.keys() - {_TENSOR}):
            raise UnknownTensor(f"{tensors.path}: {name} is not of a steering vector, whose only tensor is {_TENSOR}.")
        if tensors.dtypes[_TENSOR] != "F32":
            raise BadDtype(f"{tensors.path}: {_TENSOR} is {tensors.dtypes[_TENSOR]}; expected F32.")
        if list(tensors.shapes[_TENSOR]) != [content["width"]]:
            shape = list(tensors.shapes[_TENSOR])
            raise BadShape(f"{tensors.path}: {_TENSOR} has shape {shape}; `width` in {file.name} is {content['width']}.")
        names = ("layer", "strength", "base_model_name_or_path", "fingerprint", "record")
        with prefix_errors(tensors.path):
            return cls(tensors.read(_TENSOR), *(content[name] for name in names))


def is_steering(path: object) -> bool:
    """Whether a path is the directory of a steering vector."""
    return isinstance(path, str | Path) and (Path(path) / STEERING_FILE).is_file()


def _check_fields(content: Mapping[str, Any], file: Path) -> None:
    version = content.get("version")
    if type(version) is int and version > STEERING_VERSION:
        raise UnsupportedVersion(f"{file}: version {version} is newer than {STEERING_VERSION}; upgrade sparselet.")
    strength, fingerprint = content.get("strength"), content.get("fingerprint")
    keys = ("dtype", "sample", "signs")
    is_number = isinstance(strength, int | float) and not isinstance(strength, bool) and abs(strength) < LARGEST
    is_fingerprint = isinstance(fingerprint, dict) and all(isinstance(fingerprint.get(key), str) for key in keys)
    kinds: dict[str, tuple[bool, str]] = {
        "version": (version == STEERING_VERSION, f"{STEERING_VERSION}"),
        "layer": (type(content.get("layer")) is int and 0 <= content["layer"] < LARGEST, "a block's number, from 0"),
        "width": (type(content.get("width")) is int and 0 < content["width"] < LARGEST, "a positive integer"),
        "strength": (is_number, "a finite number"),
        "base_model_name_or_path": (isinstance(content.get("base_model_name_or_path", 0), str | None), "text or null"),
        "fingerprint": (fingerprint is None or is_fingerprint, f"null or an object of {', '.join(keys)}"),
        "record": (isinstance(content.get("record"), dict), "an object"),
    }
    for name, (is_right, expected) in kinds.items():
        if not is_right or name not in content:
            raise BadConfig(f"{file}: {name} is {content.get(name)!r:.60}; expected {expected}.")
