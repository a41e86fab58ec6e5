"""`ExpertFile`: an expert in another format than ours, read target by target."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselet.delta import SparseDelta, index_dtype


class ExpertFile(Mapping[str, SparseDelta]):
    """What every kind of expert has in common with `AdapterFile`: its targets are known before any tensor is read.

    path: where it lies. shapes: (rows, columns) of each target, as the base model stores it. fingerprints: the base
    model's, by target; None where they are not known. metadata: base model, task type and task, as far as known.
    A kind adds reading one target (`expert[name]`), counting the selected entries (`nnz`), and `check_values`, which raises
    NonFiniteValue if any stored value is NaN or infinite.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, int]], metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.shapes = dict(sorted(shapes.items()))
        self.metadata = dict(metadata)

    @property
    def fingerprints(self) -> dict[str, dict[str, str] | None]:
        """The base model's, by target."""
        return dict.fromkeys(self.shapes)

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


def full_delta(dense: Tensor) -> SparseDelta:
    """The delta `dense` [rows, columns] with every entry selected, whatever its value."""
    size = dense.numel()
    return SparseDelta((dense.shape[0], dense.shape[1]), torch.arange(size, dtype=index_dtype(size)), dense.reshape(-1))
