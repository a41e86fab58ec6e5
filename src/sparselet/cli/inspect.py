"""`sparselet inspect`."""

import re
from pathlib import Path
from typing import Any

from sparselet.adapter import CONFIG_FILE, WEIGHTS_FILE, SparseAdapter
from sparselet.adapter_metadata import AdapterMetadata
from sparselet.cli.terminal import SHADES, facts, heading, print_json, quiet_libraries, say, table, word
from sparselet.hub.sources import local_directory
from sparselet.masks import layer_of
from sparselet.report.summary import Cell, layer_table


def inspect_(adapter: str, /, *, json: bool = False) -> None:
    """Show what is in an adapter: task, base model, density, size, metrics, and where its entries lie.

    The heat map has a row for each projection and a column for each layer; darker means a larger change (root mean
    square of ΔW over the target).

        sparselet inspect my-expert

    Parameters
    ----------
    adapter
        Adapter: a directory, or a hub name.
    json
        Print the facts as JSON.
    """
    quiet_libraries()
    directory = local_directory(adapter) or Path(adapter)
    loaded = SparseAdapter.load(directory)
    cells = layer_table(loaded)
    sizes = {name: (directory / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE)}
    if json:
        targets = {name: {"shape": list(d.shape), "entries": d.nnz, "block_size": d.block_size} for name, d in loaded.items()}
        print_json(
            {
                "metadata": loaded.metadata.to_json(),
                "entries": loaded.nnz,
                "density": loaded.density,
                "bytes": sizes,
                "targets": targets,
            }
        )
        return
    metadata = loaded.metadata
    blocks = {d.block_size for d in loaded.values() if d.nnz}
    known: list[tuple[str, Any]] = [
        ("task", metadata.task or _merged(metadata)),
        ("base model", metadata.base_model_name_or_path),
        ("score", metadata.score),
        ("mask", ", ".join("single entries" if b == 1 else f"tiles of {b}×{b}" for b in sorted(blocks)) or "empty"),
        ("entries", f"{loaded.nnz:,} in {len(loaded)} targets"),
        ("density", f"{loaded.density:.4g}"),
        ("layers with a change", len({layer_of(name) for name, d in loaded.items() if d.nnz})),
        ("size on disk", f"{sum(sizes.values()) / 2**20:.1f} MiB"),
        *((key.replace("_", " "), value) for key, value in (metadata.metrics or {}).items()),
    ]
    facts(adapter, [(name, value) for name, value in known if value is not None])
    _show_entries(cells)
    _show_heat(cells)
    say(f"Next: sparselet eval --task TASK --adapter {word(adapter)}")


def _merged(metadata: AdapterMetadata) -> str | None:
    merge = metadata.merge
    if not merge:
        return None
    return f"{merge.get('method')} of {', '.join(str(e.get('task') or 'unnamed') for e in merge.get('experts', []))}"


def _show_entries(cells: dict[str, dict[str, Cell]]) -> None:
    layers = list(dict.fromkeys(layer for row in cells.values() for layer in row))
    rows = [
        [
            _short(layer),
            *(f"{row[layer].entries:,} ({row[layer].density:.3f})" if layer in row else "–" for row in cells.values()),
        ]
        for layer in layers
    ]
    table("Entries (density)", ["layer", *cells], rows)


def _show_heat(cells: dict[str, dict[str, Cell]]) -> None:
    largest = max((cell.rms for row in cells.values() for cell in row.values()), default=0.0)
    layers = list(dict.fromkeys(layer for row in cells.values() for layer in row))
    width = max((len(name) for name in cells), default=0)
    heading("Change by layer, first to last")
    for name, row in cells.items():
        shades = (row[layer].rms / largest if layer in row and largest else 0.0 for layer in layers)
        say(f"  {name:>{width}} " + "".join(SHADES[min(len(SHADES) - 1, round(s * (len(SHADES) - 1)))] * 2 for s in shades))
    say(f"  darkest: {largest:.2e} root mean square")


def _short(layer: str) -> str:
    match = re.search(r"\d+$", layer)
    return match.group(0) if match else layer
