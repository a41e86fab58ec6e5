"""Adapters of PEFT that hold single entries: SHiRA (Bhardwaj et al. 2024) and Super-Tuning (arXiv 2607.09287).

Both store a 1-D tensor of values and where each goes: SHiRA as rows and columns [2, K], Super-Tuning as flat row-major
positions [K]. PEFT adds the values to the base weight, scaled by 1; a position that occurs twice counts twice, so its
values are summed here. A value of 0 stays selected: the mask is the set of entries that were trained, whatever came of
them. Only where sparselet wrote the file itself are the zeros left out that it had to append (the writer).

Neither stores the shapes of the targets. They come from the file where sparselet wrote it, and otherwise from the base
model's files.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselet.adapter import CONFIG_FILE, PREFIX, check_target_name, require_finite
from sparselet.delta import SparseDelta, check_shape
from sparselet.errors import (
    BadConfig,
    BadDtype,
    BadShape,
    ConfigError,
    FormatError,
    IndexOutOfBounds,
    UnknownTensor,
    UnsupportedExpert,
    prefix_errors,
)
from sparselet.fingerprint import require_same_base
from sparselet.formats.base_model import BaseModel
from sparselet.formats.expert import ExpertFile, leave_out
from sparselet.formats.reading import FLOATS, describe, open_weights, refuse_fields, target_of, tensors_of_targets
from sparselet.io.tensor_files import TensorFile

NOTE = "sparselet.targets"  # in the file's header: {target: {"shape", "nnz", "fingerprint"}} of what was exported


@dataclass(frozen=True)
class Layout:
    """How a kind of adapter names its tensors and which fields its configuration has.

    known: fields that are read here, or that change nothing once the adapter is trained. refused: what the others do.
    """

    values: str
    indices: str
    read_fields: str
    refused: Mapping[str, str]


_COMMON = (
    "peft_type auto_mapping base_model_name_or_path revision task_type inference_mode peft_version target_modules init_weights"
)
_IN_FULL = "modules were trained in full, which are not read; merge with PEFT and give the checkpoint"
_HYBRID = "this is the hybrid with LoRA, whose ΔW is not sparse; merge with PEFT and give the checkpoint"
SHIRA = Layout(
    ".shira_weight",
    ".shira_indices",
    f"{_COMMON} r mask_type random_seed fan_in_fan_out",
    {"modules_to_save": _IN_FULL},
)
SUPER_TUNING = Layout(
    ".supertuning_values",
    ".supertuning_indices",
    f"{_COMMON} sparsity select_top lora_dropout save_precomputed_indices",
    {"modules_to_save": _IN_FULL, "r": _HYBRID, "lora_alpha": _HYBRID},
)


class EntriesFile(ExpertFile):
    """A PEFT adapter of single entries, as element masks with ascending unique indices and float32 values.

    layout: SHIRA or SUPER_TUNING. base: the base model, for the names and shapes of the targets. without: patterns of
    targets, by their names in the file, that are not read.

    Raises, at opening, ConfigError (the shapes are not known), UnsupportedExpert, BadConfig, MissingFile, BadContainer,
    UnknownTensor, MissingTensor, BadDtype, BadShape, WrongBase, UnsafePath.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        base: BaseModel | None,
        without: Iterable[str] = (),
        *,
        layout: Layout,
    ) -> None:
        file = path / CONFIG_FILE
        refuse_fields(file, config, layout.read_fields.split(), layout.refused)
        if config.get("save_precomputed_indices") is False:
            raise UnsupportedExpert(
                f"{file}: save_precomputed_indices is false, so the file does not hold the indices. Load the adapter with "
                "PEFT and save it with save_precomputed_indices=True."
            )
        self._layout = layout
        self._tensors = open_weights(path)
        pairs = _pairs(self._tensors, layout)
        noted = _read_note(self._tensors, layout, pairs)
        left_out = leave_out(pairs, without)
        pairs = {name: pair for name, pair in pairs.items() if name not in left_out}
        targets = {name: name for name in pairs} if base is None else base.targets(pairs, str(path))
        self._pairs = {target: pairs[name] for name, target in targets.items()}
        self._noted = {target: noted[name] for name, target in targets.items()} if noted else {}
        shapes = {target: self._shape(target, base) for target in self._pairs}
        for target, shape in shapes.items():
            _check_count(self._tensors, config, layout, self._pairs[target][0], target, shape)
        super().__init__(path, shapes, describe(config), left_out)

    @property
    def fingerprints(self) -> dict[str, dict[str, str] | None]:
        """The base model's, by target, where sparselet wrote the file."""
        return {name: self._noted[name]["fingerprint"] if self._noted else None for name in self.shapes}

    def __getitem__(self, name: str) -> SparseDelta:
        shape = self.shapes[name]
        where = f"{self._tensors.path}: {name}"
        values = self._tensors.read(self._pairs[name][0]).float()
        positions = self._positions(name, shape)
        if self._noted and not values[self._noted[name]["nnz"] :].any():
            values, positions = values[: self._noted[name]["nnz"]], positions[: self._noted[name]["nnz"]]
        require_finite(values, where)
        indices, place = torch.unique(positions, return_inverse=True)
        total = torch.zeros(len(indices)).index_add_(0, place, values)
        with prefix_errors(where):
            return SparseDelta(shape, indices, total)

    @property
    def nnz(self) -> int:
        """Selected entries of all targets, by the file's header; one that is stored twice counts twice."""
        if self._noted:
            return sum(self._noted[name]["nnz"] for name in self.shapes)
        return sum(self._tensors.shapes[values][0] for values, _ in self._pairs.values())

    def check_values(self) -> None:
        """Read every value once. Raises NonFiniteValue, naming file and tensor, if one is NaN or infinite."""
        for values, _ in self._pairs.values():
            require_finite(self._tensors.read(values), f"{self._tensors.path}: {values}")

    def _positions(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Where each value goes, flat and row-major, int64 [K]. Raises IndexOutOfBounds, BadDtype."""
        tensor = self._pairs[name][1]
        stored = self._tensors.read(tensor)
        indices = stored.to(torch.int64)
        if not torch.equal(indices.to(stored.dtype), stored):  # float32 where PEFT saved it on Windows
            raise BadDtype(f"{self._tensors.path}: {tensor} holds numbers that are not integers.")
        if self._layout is SUPER_TUNING:
            return indices
        for side, axis in enumerate(indices):
            if axis.numel() and (axis.min() < 0 or axis.max() >= shape[side]):
                wrong = int(axis.min()) if axis.min() < 0 else int(axis.max())
                raise IndexOutOfBounds(f"{self._tensors.path}: {tensor}: {wrong} lies outside a target of {list(shape)}.")
        return indices[0] * shape[1] + indices[1]

    def _shape(self, name: str, base: BaseModel | None) -> tuple[int, int]:
        noted = check_shape(tuple(self._noted[name]["shape"])) if self._noted else None
        if base is None:
            if noted is None:
                raise ConfigError(
                    f"{self._tensors.path} does not hold the shapes of the weights it changes; set `base` to the base model."
                )
            return noted
        layer = base.names.layers[name]
        if not layer.linear or layer.transposed:
            kind = type(layer.module).__name__
            raise UnsupportedExpert(f"{self._tensors.path}: {name} is a {kind} in {base.name}; PEFT changes nn.Linear only.")
        if noted is not None:
            base.check_shapes({name: noted}, str(self._tensors.path))
        return base.shape(name)


def _pairs(tensors: TensorFile, layout: Layout) -> dict[str, tuple[str, str]]:
    """The tensors of values and of indices of each target."""
    names = set()
    for tensor in tensors.shapes:
        suffix = next((suffix for suffix in (layout.values, layout.indices) if tensor.endswith(suffix)), None)
        if suffix is None or not tensor.startswith(PREFIX):
            raise UnknownTensor(f"{tensors.path}: {tensor} is not {PREFIX}<target>{layout.values} or {layout.indices}.")
        names.add(target_of(tensor, suffix))
        check_target_name(target_of(tensor, suffix))
    pairs = tensors_of_targets(tensors, (layout.values, layout.indices), sorted(names))
    for name, (values, indices) in pairs.items():
        count, shape = tensors.shapes[values], tensors.shapes[indices]
        if len(count) != 1 or shape != ((2, *count) if layout is SHIRA else count):
            expected = "[K] and [2, K]" if layout is SHIRA else "[K] and [K]"
            raise BadShape(f"{tensors.path}: {name}: values {list(count)} and indices {list(shape)}; expected {expected}.")
        if tensors.dtypes[values] not in FLOATS or tensors.dtypes[indices] not in ("I32", "I64", "F32"):
            raise BadDtype(
                f"{tensors.path}: {name}: values are {tensors.dtypes[values]} and indices {tensors.dtypes[indices]}; "
                f"expected one of {', '.join(FLOATS)}, and integers."
            )
    return pairs


def _read_note(tensors: TensorFile, layout: Layout, pairs: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """What sparselet noted of each target when it wrote the file; empty if it did not, or not of these targets."""
    if NOTE not in tensors.notes:
        return {}
    try:
        note = json.loads(tensors.notes[NOTE])
        for name in note:
            check_shape(tuple(note[name]["shape"]))
            if not 0 <= note[name]["nnz"] <= tensors.shapes[PREFIX + name + layout.values][0]:
                raise ValueError(f"nnz of {name} is {note[name]['nnz']}")
            if note[name]["fingerprint"] is not None:
                require_same_base({name: note[name]["fingerprint"]}, {name: note[name]["fingerprint"]}, NOTE)
        is_recorded = note.keys() == pairs.keys()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, FormatError) as error:
        raise BadConfig(f"{tensors.path}: {NOTE} in the header is damaged: {error}.") from error
    return note if is_recorded else {}


def _check_count(
    tensors: TensorFile, config: Mapping[str, Any], layout: Layout, values: str, name: str, shape: tuple[int, int]
) -> None:
    """PEFT knows how many entries a target has; another number means another base model. Raises BadConfig, BadShape."""
    count = tensors.shapes[values][0]
    field, default = ("r", 32) if layout is SHIRA else ("sparsity", 0.99)
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise BadConfig(f"{tensors.path.parent / CONFIG_FILE}: {field} is {value!r:.60}; expected a number.")
    rows, columns = shape
    expected = value * (rows + columns) if layout is SHIRA else int(rows * columns * (1 - value))
    if count != expected:
        raise BadShape(
            f"{tensors.path}: {name} has {count} entries, but {field} {value} of a target of {list(shape)} makes {expected}. "
            "Is this the base model it was trained on?"
        )
