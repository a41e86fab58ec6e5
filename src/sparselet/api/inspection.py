"""`inspect`: what is in an adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparselet.adapter import CONFIG_FILE, WEIGHTS_FILE, SparseAdapter
from sparselet.adapter_metadata import AdapterMetadata
from sparselet.delta import block_name
from sparselet.hub.sources import local_directory
from sparselet.masks import layer_of
from sparselet.result_table import ResultTable, ShownAsTable


@dataclass(frozen=True)
class Inspection(ShownAsTable):
    """An adapter and the bytes of its files, empty for one in memory."""

    name: str
    adapter: SparseAdapter
    bytes: Mapping[str, int]

    def table(self) -> ResultTable:
        """What the adapter records and where its entries lie."""
        adapter, metadata = self.adapter, self.adapter.metadata
        blocks = sorted({block_name(delta.block, delta.shape) for delta in adapter.values() if delta.nnz})
        facts: list[tuple[str, Any]] = [
            ("task", metadata.task or _merged(metadata)),
            ("base model", metadata.base_model_name_or_path),
            ("prompt", metadata.prompt),
            ("score", metadata.score),
            ("mask", ", ".join(blocks) or "empty"),
            ("entries", f"{adapter.nnz:,} in {len(adapter)} targets"),
            ("density", f"{adapter.density:.4g}"),
            ("layers with a change", len({layer_of(name) for name, delta in adapter.items() if delta.nnz})),
            ("size on disk", f"{sum(self.bytes.values()) / 2**20:.1f} MiB" if self.bytes else None),
            *((key.replace("_", " "), value) for key, value in (metadata.metrics or {}).items()),
        ]
        return ResultTable(self.name, (), tuple((name, value) for name, value in facts if value is not None))

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "metadata": self.adapter.metadata.to_json(),
            "entries": self.adapter.nnz,
            "density": self.adapter.density,
            "bytes": dict(self.bytes),
            "targets": {
                name: {"shape": list(delta.shape), "entries": delta.nnz, "block": list(delta.block)}
                for name, delta in self.adapter.items()
            },
        }


def inspect(adapter: str | Path | SparseAdapter) -> Inspection:
    """Describe a sparse adapter: task, base model, density, size, metrics.

    adapter: a directory, a hub name, or an adapter in memory. Raises FormatError, ModelError.
    """
    if isinstance(adapter, SparseAdapter):
        return Inspection(repr(adapter), adapter, {})
    directory = local_directory(adapter) or Path(adapter)
    loaded = SparseAdapter.load(directory)
    sizes = {name: (directory / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE)}
    return Inspection(str(adapter), loaded, sizes)


def _merged(metadata: AdapterMetadata) -> str | None:
    """What the adapter was merged from."""
    merge = metadata.merge
    if not merge:
        return None
    tasks = ", ".join(str(record.get("task") or "unnamed") for record in merge.get("experts", []))
    return f"{merge.get('method')} of {tasks}"
