"""The adapter format of docs/format.md: its names, and the checks of configuration and tensors.

`SparseAdapter.load` and loading through PEFT make the same checks.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselet.delta import check_shape, index_dtype
from sparselet.errors import (
    BadConfig,
    BadDtype,
    BadShape,
    MissingTensor,
    UnknownTensor,
    UnsafePath,
    UnsupportedVersion,
    prefix_errors,
)
from sparselet.io.tensor_files import SAFETENSORS_DTYPES, TensorFile

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT_VERSION = 1
PREFIX = "base_model.model."  # PEFT's, before every name in the weights file
VALUES, INDICES = ".sparse_values", ".sparse_indices"
# In training checkpoints whose selection phase has not ended (docs/format.md); not needed to apply the adapter.
PENDING, PROGRESS = ".sparse_pending", ".sparse_progress"

METHOD = "SPARSELET"  # peft_type
PLACEHOLDER = "{input}"  # in an adapter's prompt, once: where the input goes
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")  # PEFT's
VALUE_DTYPES = ("F64", "F32", "F16", "BF16")


def check_config(config: Mapping[str, Any], where: str) -> tuple[dict[str, tuple[int, int]], dict[str, dict[str, str] | None]]:
    """Check the fields of adapter_config.json that decide which tensors are read and which weights they change.

    where: the file's name in messages. Returns shapes and fingerprints by target. Raises BadConfig, UnsupportedVersion,
    UnsafePath, AbsurdShape.
    """
    if config.get("peft_type") != METHOD:
        raise BadConfig(f"{where}: peft_type is {config.get('peft_type')!r}; a sparse adapter has {METHOD!r}.")
    version = config.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BadConfig(f"{where}: format_version is {version!r}; expected a positive integer.")
    if version > FORMAT_VERSION:
        raise UnsupportedVersion(f"{where}: format_version {version} is newer than {FORMAT_VERSION}; upgrade sparselet.")
    targets = config.get("targets")
    if not isinstance(targets, dict):
        raise BadConfig(f"{where}: targets is {type(targets).__name__}; expected an object of target names.")
    shapes: dict[str, tuple[int, int]] = {}
    fingerprints: dict[str, dict[str, str] | None] = {}
    for name in sorted(targets):
        with prefix_errors(f"{where}: target {name}"):
            check_target_name(name)
            shapes[name], fingerprints[name] = _read_target(targets[name])
    for field, (holds, expected) in _FIELD_RULES.items():
        value = config.get(field)
        if value is not None and not holds(value):
            raise BadConfig(f"{where}: {field} is {value!r:.80}; expected {expected}.")
    return shapes, fingerprints


def _is_object(value: Any, kind: type = object) -> bool:
    """Whether a value is an object whose values are all of one type."""
    return isinstance(value, dict) and all(isinstance(part, kind) for part in value.values())


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(name, str) and name for name in value)


def _is_merge(value: Any) -> bool:
    experts = value.get("experts", []) if isinstance(value, dict) else None
    return isinstance(experts, list) and all(map(_is_object, experts))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_prompt(value: Any) -> bool:
    """Whether a value is a text with the placeholder of the input in it, once."""
    return isinstance(value, str) and value.count(PLACEHOLDER) == 1


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_NAMES_RULE = (lambda value: isinstance(value, str) or _is_names(value), "a name, a list of names or null")
_FIELD_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "modules_to_save": (_is_names, "a list of names or null"),
    "target_modules": _NAMES_RULE,
    "exclude_modules": _NAMES_RULE,
    "layers_pattern": _NAMES_RULE,
    "base_model_name_or_path": (_is_text, "a name, a path or null"),
    "revision": (_is_text, "a revision or null"),
    "task_type": (TASK_TYPES.__contains__, f"null or one of {', '.join(TASK_TYPES)}"),
    "inference_mode": (_is_flag, "true or false"),
    "auto_mapping": (lambda value: _is_object(value, str), "an object of names or null"),
    "task": (_is_text, "text or null"),
    "data_fingerprint": (_is_text, "text or null"),
    "chat_template": (_is_flag, "true, false or null"),
    "prompt": (is_prompt, f"text with {PLACEHOLDER} in it, once, or null"),
    "metrics": (_is_object, "an object or null"),
    "merge": (_is_merge, "an object with a list of experts, or null"),
}


def _read_target(record: Any) -> tuple[tuple[int, int], dict[str, str] | None]:
    if not isinstance(record, dict) or not isinstance(record.get("shape"), list):
        raise BadConfig(f"expected an object with a shape, got {record!r:.80}.")
    fingerprint, keys = record.get("fingerprint"), ("dtype", "sample", "signs")
    if fingerprint is not None and not (_is_object(fingerprint) and all(map(_is_text, map(fingerprint.get, keys)))):
        raise BadConfig(f"fingerprint is {fingerprint!r:.80}; expected {', '.join(keys)}, or null.")
    return check_shape(tuple(record["shape"])), fingerprint


def check_target_name(name: str) -> None:
    """Raise UnsafePath unless `name` is a dotted module name without path parts."""
    parts = name.split(".") if isinstance(name, str) else [""]
    if not all(part and part.isprintable() and not set(part) & set("/\\:\0 ") for part in parts):
        raise UnsafePath(f"{name!r} is not a module name; expected parts joined by dots, without path parts.")


def check_tensors(
    where: str,
    targets: Mapping[str, tuple[int, int]],
    shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, str],
    modules: set[str],
) -> None:
    """Check names, shapes and dtypes of an adapter's tensors, before any is read.

    where: the file's name in messages. targets: shapes by target name. shapes, dtypes: the file's, by tensor name. modules:
    the names of the tensors of `modules_to_save`. Raises MissingTensor, UnknownTensor, BadDtype, BadShape.
    """
    for name, shape in targets.items():
        for suffix in (VALUES, INDICES):
            if PREFIX + name + suffix not in shapes:
                raise MissingTensor(f"{where}: the configuration names {name}, but {PREFIX}{name}{suffix} is missing.")
        _check_target(f"{where}: {name}", shape, PREFIX + name, shapes, dtypes)
    own = {PREFIX + name + suffix for name in targets for suffix in (VALUES, INDICES, PENDING, PROGRESS)}
    unknown = sorted(set(shapes) - own - modules)
    if unknown:
        raise UnknownTensor(f"{where}: {unknown[0]} belongs to no target in {CONFIG_FILE} ({len(unknown)} such).")


def check_state(where: str, targets: Mapping[str, tuple[int, int]], tensors: Mapping[str, Tensor]) -> None:
    """`check_tensors` for tensors in memory, such as PEFT passes, without those of `modules_to_save`."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: names.get(tensor.dtype, str(tensor.dtype)) for name, tensor in tensors.items()}
    check_tensors(where, targets, shapes, dtypes, set())


def unnamed_modules(path: Path, config: Mapping[str, Any]) -> set[str]:
    """Modules in a directory's weights file that its configuration does not name, such as embeddings that PEFT adds."""
    if not (path / WEIGHTS_FILE).is_file():
        return set()
    named = [*(config.get("modules_to_save") or []), *(config.get("targets") or [])]
    names = (name.removeprefix(PREFIX) for name in TensorFile(path / WEIGHTS_FILE).shapes)
    return {name.rpartition(".")[0] for name in names if not any(f".{module}." in f".{name}" for module in named)}


def _check_target(
    where: str,
    target: tuple[int, int],
    name: str,
    shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, str],
) -> None:
    rows, columns = target
    values, indices = name + VALUES, name + INDICES
    if dtypes[values] not in VALUE_DTYPES:
        raise BadDtype(f"{where}{VALUES} is {dtypes[values]}; expected one of {', '.join(VALUE_DTYPES)}.")
    shape, count = list(shapes[values]), list(shapes[indices])
    h, w = shape[1:] if len(shape) == 3 else (1, 1)
    rectangle = len(shape) == 3 and h * w > 1 and (h == w or (h, w) in ((1, columns), (rows, 1)))
    if len(count) != 1 or not (len(shape) == 1 or rectangle) or shape[0] != count[0]:
        raise BadShape(
            f"{where}: values {shape} and indices {count}; expected [n], [n, B, B], [n, 1, {columns}] or [n, {rows}, 1], and "
            "[n]."
        )
    if rows % h or columns % w:
        raise BadShape(f"{where}: tiles of {h}×{w} do not divide a target of {rows}×{columns}.")
    blocks = rows * columns // (h * w)
    if count[0] > blocks:
        raise BadShape(f"{where}: {count[0]} indices, but the target has only {blocks} blocks.")
    expected = "I32" if index_dtype(blocks) == torch.int32 else "I64"
    if dtypes[indices] != expected:
        raise BadDtype(f"{where}{INDICES} is {dtypes[indices]}; expected {expected} for {blocks} blocks.")
