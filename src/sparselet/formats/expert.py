"""`ExpertFile`: an expert in another format than ours, read target by target."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from sparselet.adapter import AdapterFile, require_finite
from sparselet.adapter_metadata import AdapterMetadata
from sparselet.delta import SparseDelta, index_dtype
from sparselet.errors import ArgumentError
from sparselet.profiles.profile import Profile


class ExpertFile(Mapping[str, SparseDelta]):
    """What every kind of expert has in common with `AdapterFile`: its targets are known before any tensor is read.

    path: where it lies. shapes: (rows, columns) of each target, as the base model stores it. fingerprints: the base
    model's, by target; None where they are not known. metadata: base model, task type and task, as far as known. left_out:
    the targets in the file that are not read, as was asked for.
    A kind adds reading one target (`expert[name]`), counting the selected entries (`nnz`), and `check_values`, which raises
    NonFiniteValue if any stored value is NaN or infinite.
    """

    profile: Profile | None = None

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, int]],
        metadata: AdapterMetadata,
        left_out: tuple[str, ...] = (),
    ) -> None:
        self.path, self.left_out = path, left_out
        self.shapes = dict(sorted(shapes.items()))
        self.metadata = metadata

    @property
    def fingerprints(self) -> Mapping[str, Mapping[str, str] | None]:
        """The base model's, by target."""
        return dict.fromkeys(self.shapes)

    @property
    def trained_modules(self) -> Sequence[str]:
        """The modules that were trained in full."""
        return self.metadata.modules_to_save or ()

    @property
    @abstractmethod
    def nnz(self) -> int:
        """Selected entries of all targets."""

    @abstractmethod
    def check_values(self) -> None:
        """Read every value once. Raises NonFiniteValue, naming file and tensor, if one is NaN or infinite."""

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # the mapping's own would read the delta

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class SomeTargets(ExpertFile):
    """Targets of another expert, some or all, under names of their own.

    expert: in a file. names: of each target, what the expert calls it.
    """

    def __init__(self, expert: AdapterFile | ExpertFile, names: Mapping[str, str], left_out: tuple[str, ...] = ()) -> None:
        super().__init__(expert.path, {name: expert.shapes[own] for name, own in names.items()}, expert.metadata, left_out)
        self._expert, self._names = expert, dict(names)

    @property
    def fingerprints(self) -> Mapping[str, Mapping[str, str] | None]:
        """The base model's, by target."""
        fingerprints = self._expert.fingerprints
        return {name: fingerprints[self._names[name]] for name in self.shapes}

    def __getitem__(self, name: str) -> SparseDelta:
        return self._expert[self._names[name]]

    @property
    def nnz(self) -> int:
        """Selected entries of these targets. They are read for it where some were left out."""
        return self._expert.nnz if len(self) == len(self._expert) else sum(self[name].nnz for name in self)

    def check_values(self) -> None:
        """Read every value of these targets once. Raises NonFiniteValue."""
        for name in self:
            require_finite(self[name].values, f"{self.path}: {name}")


def leave_out(names: Iterable[str], patterns: Iterable[str]) -> tuple[str, ...]:
    """The names that a pattern (`*.v_proj`) matches. Raises ArgumentError for a pattern that matches none, or if all go."""
    names, left_out = list(names), set()
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            raise ArgumentError(f"no target matches {pattern!r}, to leave it out; one is called {next(iter(names), None)}.")
        left_out |= matching
    if left_out and len(left_out) == len(names):
        raise ArgumentError(f"all {len(names)} targets would be left out.")
    return tuple(sorted(left_out))


def full_delta(dense: Tensor) -> SparseDelta:
    """The delta `dense` [rows, columns] with every entry selected, whatever its value."""
    size = dense.numel()
    return SparseDelta((dense.shape[0], dense.shape[1]), torch.arange(size, dtype=index_dtype(size)), dense.reshape(-1))
