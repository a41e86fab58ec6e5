"""Patches of an engine's weights: absolute values at flat indices of a checkpoint's tensors, with a reverse patch beside them.

The fields of a patch are those of vLLM's `CheckpointWeightPatch`, which `load_checkpoint_weight_patches` takes. Absolute
values, unlike changes, may be written twice, and the reverse patch restores the base weights bit for bit, where adding and
subtracting a change would not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from sparselet import kernels
from sparselet.adapter import require_finite
from sparselet.apply import add
from sparselet.delta import SparseDelta
from sparselet.errors import BadConfig, ExportError, MissingTensor, prefix_errors
from sparselet.expert import Expert
from sparselet.fingerprint import Fingerprint, fingerprint_weight, require_same_base
from sparselet.formats.base_model import BaseModel
from sparselet.formats.linear_targets import refuse_modules
from sparselet.io.atomic import atomic_directory, atomic_write
from sparselet.io.json_files import read_object, write_json
from sparselet.io.tensor_files import SAFETENSORS_DTYPES, TensorFile
from sparselet.names import WEIGHT, as_rows

PATCH_CONFIG, PATCH_FILE, REVERSE_FILE = "patch.json", "patch.safetensors", "reverse.safetensors"
PATCH_FORMAT_VERSION = 1
_INDICES, _VALUES = ".indices", ".values"


class WeightPatch(NamedTuple):
    """New values of one tensor of a checkpoint: `CheckpointWeightPatch(*patch)` is vLLM's own.

    name: the tensor's, in the checkpoint. shape: of the whole tensor. dtype: of `values`. indices: int32 or int64, flat
    positions in `shape`, ascending and unique.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor


@dataclass(frozen=True)
class PatchedTarget:
    """What a patch of one tensor is made of. base: the base weight. delta: the change.

    before: the indices that the previous patch changed, which get their base values where `delta` has none any more.
    """

    base: Tensor
    delta: SparseDelta
    before: Tensor | None = None

    def values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Indices, W + ΔW there, summed in float32 and rounded once, and W there."""
        rows, delta = as_rows(self.base.detach()), self.delta.expand()
        if self.before is not None:
            left = self.before[~torch.isin(self.before, delta.indices, assume_unique=True)]
            delta = delta + SparseDelta(delta.shape, left, delta.values.new_zeros(len(left)))
        old = kernels.gather(rows, delta.indices.to(rows.device)).cpu()
        return delta.indices, add(old, delta.values, dtype), old.to(dtype)


def write_patch(
    output: str | Path,
    targets: Mapping[str, PatchedTarget],
    fingerprints: Mapping[str, Fingerprint],
    dtype: torch.dtype,
    version: int = 1,
    previous: int | None = None,
) -> Path:
    """Write a patch of the tensors `targets`, by their names in the checkpoint, and its reverse, as a directory.

    fingerprints: of the base weights. version: rises with every patch of one engine. previous: the version that the engine has
    when it takes this patch; None for the base weights.
    Raises NonFiniteValue where `dtype` cannot hold a value; OutputExists, WriteFailed.
    """
    forward: dict[str, Tensor] = {}
    reverse: dict[str, Tensor] = {}
    described = {}
    for name, target in targets.items():
        indices, new, old = target.values(dtype)
        require_finite(new, name)
        for tensors, values in ((forward, new), (reverse, old)):
            tensors |= {name + _INDICES: indices.clone(), name + _VALUES: values.contiguous()}
        described[name] = {"shape": list(target.base.shape), "fingerprint": dict(fingerprints[name])}
    content = {
        "format_version": PATCH_FORMAT_VERSION,
        "version": version,
        "previous": previous,
        "dtype": str(dtype).removeprefix("torch."),
        "targets": described,
    }
    with atomic_directory(output) as directory:
        for file, tensors in ((PATCH_FILE, forward), (REVERSE_FILE, reverse)):
            with atomic_write(directory / file) as stream:
                stream.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))
        write_json(directory / PATCH_CONFIG, content)
    return Path(output)


def read_patch(directory: str | Path, reverse: bool = False) -> list[WeightPatch]:
    """The patches in a directory, or with `reverse` those that undo them, checked.

        load_checkpoint_weight_patches(model, [CheckpointWeightPatch(*patch) for patch in read_patch("patch")])

    Raises MissingFile, BadConfig, MissingTensor, NonFiniteValue, and what `SparseDelta` raises for wrong indices.
    """
    file = Path(directory) / PATCH_CONFIG
    content = read_object(file)
    if content.get("format_version") != PATCH_FORMAT_VERSION or not isinstance(content.get("targets"), dict):
        raise BadConfig(f"{file}: expected a weight patch of format_version {PATCH_FORMAT_VERSION}.")
    tensors = TensorFile(Path(directory) / (REVERSE_FILE if reverse else PATCH_FILE))
    return [_read(tensors, name, described, str(file)) for name, described in content["targets"].items()]


def _read(tensors: TensorFile, name: str, described: Any, file: str) -> WeightPatch:
    shape = described.get("shape") if isinstance(described, dict) else None
    if not isinstance(shape, list) or len(shape) < 1 or not all(type(side) is int and side > 0 for side in shape):
        raise BadConfig(f"{file}: {name} needs a shape of positive whole numbers, got {shape!r:.60}.")
    for part in (name + _INDICES, name + _VALUES):
        if part not in tensors.shapes:
            raise MissingTensor(f"{tensors.path} does not hold {part}.")
    indices, values = tensors.read(name + _INDICES), tensors.read(name + _VALUES)
    with prefix_errors(f"{tensors.path}: {name}"):
        SparseDelta((math.prod(shape[:-1]), shape[-1]), indices, values)
    require_finite(values, f"{tensors.path}: {name}")
    return WeightPatch(name, tuple(shape), values.dtype, values, indices)


def export_weight_patch(expert: Expert, output: str | Path, base: BaseModel, dtype: torch.dtype) -> Path:
    """Write an expert as a patch of its base model's checkpoint, read target by target.

    Raises ExportError for a target that is no tensor of its own in the checkpoint, or is quantised there; WrongBase, and what
    `write_patch` raises.
    """
    expert = refuse_modules(expert)
    names = checkpoint_names(base, list(expert))
    targets, fingerprints, own = {}, {}, {}
    for target, name in names.items():
        weight = base.files.read(name)
        targets[name] = PatchedTarget(weight, expert[target])
        own[target] = fingerprints[name] = fingerprint_weight(weight)
    require_same_base(expert.fingerprints, own, "the expert and its base model's checkpoint")
    return write_patch(output, targets, fingerprints, dtype)


def checkpoint_names(base: BaseModel, targets: Sequence[str]) -> dict[str, str]:
    """What the tensor of each target is called in the base model's files. Raises UnknownTarget, ExportError."""
    own_names = base.targets(targets, "the expert")
    placed = base.names.place(base.files.shapes)
    tensors = {parameter: tensor for tensor, (parameter, pattern) in placed.items() if pattern is None}
    names = {}
    for target, own in own_names.items():
        tensor = tensors.get(own + WEIGHT) or tensors.get(own)
        if tensor is None:
            raise ExportError(f"{target} is no tensor of its own in the checkpoint of {base.name}; leave it out.")
        if not SAFETENSORS_DTYPES[base.files.dtypes[tensor]].is_floating_point:
            raise ExportError(f"{target} is {base.files.dtypes[tensor]} in the checkpoint of {base.name}, which is quantised.")
        names[target] = tensor
    return names
