"""Writing an adapter directory target by target, so that no more than one target is in memory."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparselet.adapter import CONFIG_FILE, WEIGHTS_FILE, SparseAdapter, adapter_json, add_delta, require_finite, tensor_names
from sparselet.adapter_metadata import AdapterMetadata
from sparselet.delta import SparseDelta, common_block_size
from sparselet.io.atomic import atomic_write
from sparselet.io.json_files import write_json
from sparselet.io.tensor_files import TensorStream
from sparselet.kernels import Block


class AdapterStream:
    """An adapter that is written to `directory`; `adapter_stream` opens it."""

    def __init__(self, directory: Path, stream: TensorStream) -> None:
        self._directory, self._stream = directory, stream
        self._empty: dict[str, SparseDelta] = {}
        self._entries = 0
        self._blocks: set[Block] = set()

    def add(self, name: str, delta: SparseDelta) -> None:
        """Write one target; values must be float32. Raises NonFiniteValue, BadDtype."""
        require_finite(delta.values, name)
        add_delta(self._stream, name, delta)
        self._empty[name] = SparseDelta.empty(delta.shape)
        self._entries += delta.nnz
        self._blocks |= {delta.block} if delta.nnz else set()

    def describe(self, metadata: AdapterMetadata, fingerprints: Mapping[str, Mapping[str, str] | None]) -> None:
        """Write the configuration, after all targets: the metadata, with the density and block size that were written.

        Of rows and columns the metadata says which they are.
        """
        measured: dict[str, Any] = {"density": self._entries / max(1, sum(delta.size for delta in self._empty.values()))}
        block_size = common_block_size(self._blocks)
        if block_size is not None:
            measured["block_size"] = block_size
        described = SparseAdapter(self._empty, metadata.with_fields(measured), fingerprints)
        write_json(self._directory / CONFIG_FILE, adapter_json(described))


@contextlib.contextmanager
def adapter_stream(directory: Path, names: Iterable[str]) -> Iterator[AdapterStream]:
    """Open the weights file of a new adapter in `directory`. It is complete when the block ends; `describe` it then.

    names: the targets that may be added. Any of them may be left out, in any order; the file's bytes depend on the names.
    """
    with (
        atomic_write(directory / WEIGHTS_FILE) as file,
        TensorStream(file, tensor_names(dict.fromkeys(names))) as stream,
    ):
        yield AdapterStream(directory, stream)
