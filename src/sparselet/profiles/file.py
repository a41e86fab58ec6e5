"""`profile.safetensors`, as docs/format.md specifies it: written whole or not at all, checked when opened and when read."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselet import kernels
from sparselet.errors import (
    BadDtype,
    BadProfile,
    BadShape,
    MissingTensor,
    NonFiniteValue,
    ShapeMismatch,
    UnknownTensor,
    UnsupportedVersion,
)
from sparselet.fingerprint import Fingerprint, require_same_base
from sparselet.io.atomic import atomic_write
from sparselet.io.tensor_files import TensorFile, TensorStream
from sparselet.profiles.profile import Profile, PromptStates, SecondMoment

PROFILE_FILE = "profile.safetensors"
VERSION = 1
_NOTE = "sparselet_profile"
_FACTOR, _DIAGONAL = ".factor", ".diagonal"
_INPUT = "input."  # before the name of the first target of an input
_PROMPTS, _MEAN = "prompts", "prompts.mean"


def write_profile(profile: Profile, path: str | Path) -> Path:
    """Write a profile as the file `path`, atomically. Equal profiles give equal bytes. Raises WriteFailed."""
    note = {
        "version": VERSION,
        "targets": {
            name: {
                "input": first,
                "transposed": name in profile.transposed,
                "fingerprint": profile.fingerprints.get(name),
            }
            for name, first in profile.inputs.items()
        },
        "tokens": profile.tokens,
        "rows": profile.rows,
        "prompts": profile.prompts.count,
        "task": profile.task,
    }
    moments = {_INPUT + name: profile.moments[name] for name in sorted(set(profile.inputs.values()))}
    moments[_PROMPTS] = profile.prompts.covariance
    names = [*(name + suffix for name in moments for suffix in (_FACTOR, _DIAGONAL)), _MEAN]
    with (
        atomic_write(path) as file,
        TensorStream(file, names, {_NOTE: json.dumps(note, sort_keys=True)}) as stream,
    ):
        for name, moment in moments.items():
            stream.add(name + _FACTOR, moment.factor)
            stream.add(name + _DIAGONAL, moment.diagonal)
        stream.add(_MEAN, profile.prompts.mean)
    return Path(path)


def read_profile(path: str | Path) -> Profile:
    """Open a profile: header and prompt states are checked at once, each moment when it is looked up.

    path: the file. Raises MissingFile, BadContainer (truncated), BadProfile, UnsupportedVersion, UnknownTensor, MissingTensor,
    BadDtype, BadShape, NonFiniteValue.
    """
    file = TensorFile(Path(path))
    note = _read_note(file)
    targets: dict[str, dict[str, Any]] = note["targets"]
    moments = MomentFile(file, {target["input"] for target in targets.values()})
    _check_tensors(file, [*(_INPUT + name for name in moments), _PROMPTS])
    mean = _read(file, _MEAN)
    covariance = _read_moment(file, _PROMPTS)
    if len(mean) != covariance.width:
        raise BadShape(f"{file.path}: {_MEAN} has {len(mean)} entries, {_PROMPTS}{_DIAGONAL} {covariance.width}.")
    return Profile(
        moments,
        {name: target["input"] for name, target in targets.items()},
        frozenset(name for name, target in targets.items() if target["transposed"]),
        PromptStates(mean, covariance, note["prompts"]),
        {name: target["fingerprint"] for name, target in targets.items()},
        note["tokens"],
        note["rows"],
        note["task"],
    )


def check_profile(
    profile: Profile, shapes: Mapping[str, tuple[int, int]], fingerprints: Mapping[str, Fingerprint | None], where: str
) -> None:
    """Raise ShapeMismatch or WrongBase unless the profile can be of an expert with these targets. where: names the two."""
    require_same_base(profile.fingerprints, fingerprints, where)
    for name, shape in shapes.items():
        moment = profile.moment(name)
        if moment is not None and moment.width != shape[0 if moment.transposed else 1]:
            raise ShapeMismatch(f"{where}: {name} has shape {list(shape)}, but inputs of width {moment.width} in the profile.")


class MomentFile(Mapping[str, SecondMoment]):
    """Second moments by input, read when they are looked up. Raises BadProfile, NonFiniteValue for a damaged one."""

    def __init__(self, file: TensorFile, inputs: Iterable[str]) -> None:
        self._file, self._inputs = file, dict.fromkeys(sorted(inputs))

    def __getitem__(self, name: str) -> SecondMoment:
        if name not in self._inputs:
            raise KeyError(name)
        moment = _read_moment(self._file, _INPUT + name)
        if not moment.trace > 0:
            raise BadProfile(f"{self._file.path}: the input of {name} is all 0, so it weighs nothing.")
        return moment

    def __contains__(self, name: object) -> bool:
        return name in self._inputs  # Mapping's version would read the moment

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)


def _read_note(file: TensorFile) -> dict[str, Any]:
    """The facts in the header. Raises BadProfile, UnsupportedVersion."""
    try:
        note = json.loads(file.notes[_NOTE])
    except (KeyError, ValueError, RecursionError) as error:
        raise BadProfile(f"{file.path} has no {_NOTE} in its header, as a profile has.") from error
    version = note.get("version") if isinstance(note, dict) else None
    if type(version) is not int or version < 1:
        raise BadProfile(f"{file.path}: version is {version!r:.60}; expected a positive integer.")
    if version > VERSION:
        raise UnsupportedVersion(f"{file.path}: version {version} is newer than {VERSION}; upgrade sparselet.")
    targets = note.get("targets")
    if not isinstance(targets, dict) or not targets:
        raise BadProfile(f"{file.path}: targets is {targets!r:.60}; expected an object of target names.")
    for name, target in targets.items():
        if not _is_target(target) or target["input"] not in targets:
            raise BadProfile(f"{file.path}: targets.{name} is {target!r:.80}; expected input, transposed and fingerprint.")
    for field in ("tokens", "rows", "prompts"):
        if type(note.get(field)) is not int or note[field] < 1:
            raise BadProfile(f"{file.path}: {field} is {note.get(field)!r:.60}; expected a positive integer.")
    if not isinstance(note.get("task"), str | None):
        raise BadProfile(f"{file.path}: task is {note['task']!r:.60}; expected text or null.")
    return note


def _is_target(target: Any) -> bool:
    if not isinstance(target, dict) or not isinstance(target.get("input"), str) or type(target.get("transposed")) is not bool:
        return False
    fingerprint = target.get("fingerprint")
    keys = ("dtype", "sample", "signs")
    return fingerprint is None or (isinstance(fingerprint, dict) and all(isinstance(fingerprint.get(k), str) for k in keys))


def _check_tensors(file: TensorFile, moments: list[str]) -> None:
    """Raise unless the file holds these moments and the mean, with dtypes and shapes that fit."""
    expected = {*(name + suffix for name in moments for suffix in (_FACTOR, _DIAGONAL)), _MEAN}
    for name in sorted(expected - file.shapes.keys()):
        raise MissingTensor(f"{file.path}: {name} is missing.")
    for name in sorted(file.shapes.keys() - expected):
        raise UnknownTensor(f"{file.path}: {name} belongs to no target of the profile.")
    for name, dtype in file.dtypes.items():
        if dtype != "F32":
            raise BadDtype(f"{file.path}: {name} is {dtype}; expected F32.")
    if len(file.shapes[_MEAN]) != 1:
        raise BadShape(f"{file.path}: {_MEAN} has shape {list(file.shapes[_MEAN])}; expected [width].")
    for name in moments:
        factor, diagonal = file.shapes[name + _FACTOR], file.shapes[name + _DIAGONAL]
        if len(diagonal) != 1 or len(factor) != 2 or factor[1] != diagonal[0] or not 1 <= factor[0] <= diagonal[0]:
            raise BadShape(
                f"{file.path}: {name} has a factor {list(factor)} and a diagonal {list(diagonal)}; expected [rank, width] and "
                "[width], the rank at most the width."
            )


def _read_moment(file: TensorFile, name: str) -> SecondMoment:
    moment = SecondMoment(_read(file, name + _FACTOR), _read(file, name + _DIAGONAL))
    if bool((moment.diagonal < 0).any()):
        raise BadProfile(f"{file.path}: {name}{_DIAGONAL} has entries below 0, which no second moment has.")
    return moment


def _read(file: TensorFile, name: str) -> Tensor:
    tensor = file.read(name)
    if not kernels.all_finite(tensor):
        count = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteValue(f"{file.path}: {name}: {count} of {tensor.numel()} values are NaN or infinite.")
    return tensor
