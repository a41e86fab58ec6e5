"""An adapter's change by layer and projection, as numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

from sparselet.delta import SparseDelta
from sparselet.masks import layer_of, natural_order, projection_of


@dataclass(frozen=True)
class TargetSummary:
    """A target's selected entries, their fraction, and the root mean square of ΔW over all its entries."""

    entries: int
    density: float
    rms: float


def layer_table(adapter: Mapping[str, SparseDelta]) -> dict[str, dict[str, TargetSummary]]:
    """`{projection: {layer: TargetSummary}}`: query, key, value, then others by name; layers in numeric order."""
    table: dict[str, dict[str, TargetSummary]] = {}
    for name in sorted(adapter, key=natural_order):
        delta = adapter[name]
        rms = float((delta.values.double().square().sum() / delta.size).sqrt())
        table.setdefault(projection_of(name), {})[layer_of(name)] = TargetSummary(delta.nnz, delta.density, rms)
    return {name: table[name] for name in sorted(table, key=reading_order)}


def reading_order(projection: str) -> tuple[int, str]:
    """Query, key, value, then the rest by name."""
    place = "qkv".find(projection.rpartition(".")[2][:1])
    return (place if place >= 0 else len("qkv"), projection)
