"""`SparseAdapter`: named deltas with metadata, as one directory. The bytes are specified in docs/format.md."""

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from sparselet import kernels
from sparselet.adapter_format import (
    CONFIG_FILE,
    FORMAT_VERSION,
    INDICES,
    METHOD,
    PENDING,
    PREFIX,
    PROGRESS,
    VALUE_DTYPES,
    VALUES,
    WEIGHTS_FILE,
    check_config,
    check_target_name,
    check_tensors,
)
from sparselet.adapter_metadata import AdapterMetadata
from sparselet.delta import SparseDelta, common_block_size
from sparselet.errors import BadDtype, MissingFile, MissingProfile, NonFiniteValue, prefix_errors
from sparselet.expert import Expert, ExpertOrDeltas
from sparselet.io.atomic import atomic_directory, atomic_write, replaced_directory
from sparselet.io.json_files import json_bytes, read_object
from sparselet.io.paths import check_inside
from sparselet.io.temporaries import remove_left
from sparselet.io.tensor_files import SAFETENSORS_DTYPES, TensorFile, TensorStream
from sparselet.profiles.file import PROFILE_FILE, check_profile, read_profile, write_profile
from sparselet.profiles.profile import Profile


class UnfinishedAdapterWarning(UserWarning):
    """The adapter was saved while its mask was still being selected."""


class SparseAdapter(Mapping[str, SparseDelta]):
    """A sparse expert: `{target name: SparseDelta}` with metadata.

    A target's name is that of its module in the base model, such as `model.layers.0.self_attn.q_proj`.

    metadata: what adapter_config.json says beside the deltas; a mapping of its fields is accepted too.
    fingerprints: the base model's, by target (`sparselet.fingerprint`); absent ones are not checked.
    modules: tensors of `modules_to_save`, trained in full, by their name in the base model.
    profile: of the expert's own rows, where it has one.

    An `Expert` in memory.

        adapter = SparseAdapter({"model.layers.0.self_attn.q_proj": SparseDelta.from_dense(change)})
        adapter.save("my-adapter")
        SparseAdapter.load("my-adapter")
    """

    path = None
    left_out: Sequence[str] = ()

    def __init__(
        self,
        deltas: Mapping[str, SparseDelta],
        metadata: AdapterMetadata | Mapping[str, Any] | None = None,
        fingerprints: Mapping[str, Mapping[str, str] | None] | None = None,
        modules: Mapping[str, Tensor] | None = None,
        profile: Profile | None = None,
    ) -> None:
        for name in deltas:
            check_target_name(name)
        self._deltas = {name: deltas[name] for name in sorted(deltas)}
        self.metadata = metadata if isinstance(metadata, AdapterMetadata) else AdapterMetadata.from_json(metadata or {})
        self.fingerprints = {name: (fingerprints or {}).get(name) for name in self._deltas}
        self.modules = dict(modules or {})
        self.profile = profile

    @classmethod
    def load(cls, path: str | Path) -> "SparseAdapter":
        """Read and check an adapter directory.

        Raises a FormatError that names the file, the field or tensor, what was expected and what came.
        """
        file = AdapterFile(path)
        deltas = {name: file[name] for name in file}
        profile = expert_profile(file)
        if profile is not None:
            profile = replace(profile, moments=dict(profile.moments))
        return cls(deltas, file.metadata, file.fingerprints, file.read_modules(), profile)

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the adapter as a directory, whole or not at all, and return its path.

        An adapter at `path` is replaced in one step by a directory with the new adapter and all other files of the previous
        one, so that a kill at any moment leaves either of the two; a mount point and the working directory are refused. In a
        directory without an adapter the configuration is written last.

        dtype: store the values as this dtype (float32, bfloat16, float16); by default as they are.
        Raises BadDtype, NonFiniteValue, WriteFailed.
        """
        path = Path(path)
        with contextlib.suppress(OSError, ValueError):  # names that no output can have are refused below
            remove_left(Path(os.path.realpath(path)))
        with contextlib.ExitStack() as stack:
            directory = path
            if os.path.lexists(path / CONFIG_FILE):
                directory = stack.enter_context(replaced_directory(path))
            elif not os.path.lexists(path):
                directory = stack.enter_context(atomic_directory(path))
            # Both are complete before either gets its name.
            with atomic_write(directory / CONFIG_FILE) as config, atomic_write(directory / WEIGHTS_FILE) as weights:
                config.write(json_bytes(adapter_json(self)))
                self._write_weights(weights, dtype)
                if self.profile is not None:
                    write_profile(self.profile, directory / PROFILE_FILE)
                else:  # of the previous adapter
                    (directory / PROFILE_FILE).unlink(missing_ok=True)
        return path

    def _write_weights(self, file: IO[bytes], dtype: torch.dtype | None) -> None:
        deltas = {name: delta.to(dtype) if dtype else delta for name, delta in self.items()}
        stored = [SAFETENSORS_DTYPES[name] for name in VALUE_DTYPES]
        for name, delta in deltas.items():
            if delta.values.dtype not in stored:
                raise BadDtype(f"{name}: values are {delta.values.dtype}; a file holds {', '.join(map(str, stored))}.")
            require_finite(delta.values, name)
        plain = all(d.values.dtype == torch.float32 and d.indices.dtype == torch.int32 for d in deltas.values())
        if plain and not self.modules:
            with TensorStream(file, tensor_names(deltas)) as stream:
                for name, delta in deltas.items():
                    add_delta(stream, name, delta)
            return
        tensors = {PREFIX + name: tensor for name, tensor in self.modules.items()}
        for name, delta in deltas.items():
            tensors[PREFIX + name + VALUES] = delta.values
            tensors[PREFIX + name + INDICES] = delta.indices
        # The library refuses tensors that share memory, such as those of tied modules or of one mask for two targets.
        tensors = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        file.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))

    def __getitem__(self, name: str) -> SparseDelta:
        return self._deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of each target."""
        return {name: delta.shape for name, delta in self.items()}

    @property
    def trained_modules(self) -> Sequence[str]:
        """The modules that were trained in full."""
        return self.metadata.modules_to_save or sorted(self.modules)

    def check_values(self) -> None:
        """Raise NonFiniteValue, naming the target, if a value is NaN or infinite."""
        for name, delta in self.items():
            require_finite(delta.values, name)

    @property
    def nnz(self) -> int:
        """Selected entries of all targets."""
        return sum(delta.nnz for delta in self.values())

    @property
    def density(self) -> float:
        """Selected fraction of all targets' entries."""
        return self.nnz / max(1, sum(delta.size for delta in self.values()))

    def __repr__(self) -> str:
        task = self.metadata.task
        return f"SparseAdapter({f'{task}, ' if task else ''}{len(self)} targets, nnz {self.nnz}, density {self.density:.4g})"


class AdapterFile(Mapping[str, SparseDelta]):
    """An `Expert` in an adapter directory, read target by target: the configuration and all shapes are checked when it is
    opened, a delta's entries when it is read."""

    left_out: Sequence[str] = ()
    profile: Profile | None = None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: AdapterMetadata
        self.metadata, self.shapes, self.fingerprints = _read_config(self.path)
        weights = check_inside(self.path, WEIGHTS_FILE)
        if not weights.is_file():
            raise MissingFile(f"{weights} is missing; an adapter is {CONFIG_FILE} and {WEIGHTS_FILE}.")
        self._weights = weights
        self._file = TensorFile(weights)
        self._names = set(self._file.shapes)
        self.unfinished = any(name.endswith((PENDING, PROGRESS)) for name in self._names)
        check_tensors(str(weights), self.shapes, self._file.shapes, self._file.dtypes, self._module_names())
        if self.unfinished:
            warnings.warn(
                f"{self.path} was saved while its mask was still being selected; train on, or take a later checkpoint.",
                UnfinishedAdapterWarning,
                stacklevel=2,
            )

    def __getitem__(self, name: str) -> SparseDelta:
        shape = self.shapes[name]
        with prefix_errors(f"{self._weights}: {name}"):
            indices, values = (self._file.read(PREFIX + name + suffix) for suffix in (INDICES, VALUES))
            delta = SparseDelta(shape, indices, values)
        require_finite(delta.values, f"{self._weights}: {name}")
        return delta

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's version would read the delta

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def trained_modules(self) -> Sequence[str]:
        """The modules that were trained in full."""
        return self.metadata.modules_to_save or ()

    @property
    def nnz(self) -> int:
        """Selected entries of all targets, by the file's header."""
        return sum(math.prod(self._file.shapes[PREFIX + name + VALUES]) for name in self.shapes)

    def check_values(self) -> None:
        """Read every value once. Raises NonFiniteValue, naming file and target, if one is NaN or infinite."""
        for name in self.shapes:
            require_finite(self._file.read(PREFIX + name + VALUES), f"{self._weights}: {name}")

    def read_modules(self) -> dict[str, Tensor]:
        """The tensors of `modules_to_save`, by their name in the base model."""
        return {name.removeprefix(PREFIX): self._file.read(name) for name in sorted(self._module_names())}

    def _module_names(self) -> set[str]:
        return {
            name
            for name in self._names
            if not name.endswith((VALUES, INDICES, PENDING, PROGRESS))
            and name.startswith(PREFIX)
            and any(f".{module}." in f".{name.removeprefix(PREFIX)}" for module in self.trained_modules)
        }


def as_expert(expert: ExpertOrDeltas) -> Expert:
    """The expert, or a `SparseAdapter` of a plain mapping from target names to deltas."""
    return expert if isinstance(expert, Expert) else SparseAdapter(expert)


def expert_profile(expert: Expert) -> Profile | None:
    """An expert's profile: its own, or `profile.safetensors` in its directory; None if there is neither.

    Raises what `read_profile` raises, and ShapeMismatch or WrongBase for the profile of another expert.
    """
    if expert.profile is not None:
        profile, where = expert.profile, "the expert and its profile"
    elif expert.path is not None and os.path.lexists(expert.path / PROFILE_FILE):
        file = check_inside(expert.path, PROFILE_FILE)
        profile, where = read_profile(file), f"{expert.path} and its {PROFILE_FILE}"
    else:
        return None
    check_profile(profile, expert.shapes, expert.fingerprints, where)
    return profile


def require_profile(expert: Expert, label: str, need: str) -> Profile:
    """An expert's profile. need: who needs it, for the message. Raises MissingProfile, and what `expert_profile` raises."""
    profile = expert_profile(expert)
    if profile is None:
        raise missing_profile(label, need, label)
    return profile


def missing_profile(label: str, need: str, place: str) -> MissingProfile:
    """The error for an expert without a profile. need: who needs it. place: the expert as `sparselet profile` takes it."""
    return MissingProfile(
        f"{need}, and {label} has none. Make it from the rows that it was trained on: "
        f"sparselet profile {place} with their `task`."
    )


def adapter_json(adapter: SparseAdapter) -> dict[str, Any]:
    """The content of adapter_config.json: the adapter's metadata, and the fields that follow from its deltas.

    Of rows and columns the metadata says which they are: in a delta, an output row of a Conv1D is a column.
    """
    block_size = common_block_size(delta.block for delta in adapter.values() if delta.nnz)
    measured = {
        "density": adapter.density,
        "block_size": None,
        "inference_mode": True,
        "target_modules": list(adapter),
    }
    blocks = {} if block_size is None else {"block_size": block_size}
    return {**measured, **adapter.metadata.to_json(), **blocks, **config_of_targets(adapter.shapes, adapter.fingerprints)}


def config_of_targets(
    shapes: Mapping[str, tuple[int, int]], fingerprints: Mapping[str, Mapping[str, str] | None]
) -> dict[str, Any]:
    """The fields of adapter_config.json that every adapter has."""
    return {
        "peft_type": METHOD,
        "format_version": FORMAT_VERSION,
        "targets": {
            name: {"shape": list(shape), "fingerprint": dict(fingerprints.get(name) or {}) or None}
            for name, shape in shapes.items()
        },
    }


def tensor_names(targets: Mapping[str, Any]) -> list[str]:
    """All tensor names of an adapter with these targets, in the order of the file."""
    return [PREFIX + name + suffix for name in sorted(targets) for suffix in (INDICES, VALUES)]


def add_delta(stream: TensorStream, name: str, delta: SparseDelta) -> None:
    """Write one target's delta to an open weights file."""
    stream.add(PREFIX + name + INDICES, delta.indices)
    stream.add(PREFIX + name + VALUES, delta.values)


def require_finite(values: Tensor, name: str) -> None:
    """Raise NonFiniteValue if any value is NaN or infinite."""
    if not kernels.all_finite(values):
        raise NonFiniteValue(f"{name}: {int((~torch.isfinite(values)).sum())} of {values.numel()} values are NaN or infinite.")


def _read_config(path: Path) -> tuple[AdapterMetadata, dict[str, tuple[int, int]], dict[str, dict[str, str] | None]]:
    if not path.is_dir():
        raise MissingFile(f"{path} is not a directory; an adapter is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}.")
    file = check_inside(path, CONFIG_FILE)
    if not file.is_file():
        raise MissingFile(f"{file} is missing; an adapter is {CONFIG_FILE} and {WEIGHTS_FILE}.")
    config = read_object(file)
    shapes, fingerprints = check_config(config, str(file))
    return AdapterMetadata.from_json(config), shapes, fingerprints
