"""`Expert`: what every kind of expert offers, be it in memory or in a file of any format."""

from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from sparselet.adapter_metadata import AdapterMetadata
from sparselet.delta import SparseDelta
from sparselet.profiles.profile import Profile


@runtime_checkable
class Expert(Protocol):
    """A mapping from target names to deltas, which may be read from a file one at a time, and what is known without reading.

    path: the expert's directory, or None in memory. shapes: (rows, columns) of each target, as the base model stores it.
    fingerprints: the base model's, by target (`sparselet.fingerprint`); None where unknown. nnz: selected entries of all
    targets. left_out: targets in the file that are not read, at the caller's request. trained_modules: modules that were
    trained in full (`modules_to_save`) and are therefore not deltas. profile: of the expert's own rows, if it is in
    memory; `adapter.expert_profile` also looks in the directory.
    """

    metadata: AdapterMetadata
    profile: Profile | None

    @property
    def path(self) -> Path | None: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]: ...
    @property
    def fingerprints(self) -> Mapping[str, Mapping[str, str] | None]: ...
    @property
    def nnz(self) -> int: ...
    @property
    def left_out(self) -> Sequence[str]: ...
    @property
    def trained_modules(self) -> Sequence[str]: ...

    def check_values(self) -> None:
        """Read every value once. Raises NonFiniteValue, naming the target, if one is NaN or infinite."""
        ...

    def __getitem__(self, name: str, /) -> SparseDelta: ...
    def __contains__(self, name: object, /) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...
    def keys(self) -> KeysView[str]: ...
    def items(self) -> ItemsView[str, SparseDelta]: ...


ExpertOrDeltas = Expert | Mapping[str, SparseDelta]  # what `adapter.as_expert` takes
