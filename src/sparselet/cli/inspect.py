"""`sparselet inspect`."""

import re

from sparselet.api.inspection import inspect
from sparselet.cli.terminal import SHADES, facts, heading, print_json, quiet_libraries, say, table, word
from sparselet.report.summary import TargetSummary, layer_table


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
    inspection = inspect(adapter)
    if json:
        print_json(inspection.as_json())
        return
    described = inspection.table()
    facts(described.title, [(str(name), value) for name, value in described.rows])
    cells = layer_table(inspection.adapter)
    _show_entries(cells)
    _show_heat(cells)
    say(f"Next: sparselet eval --task TASK --adapter {word(adapter)}")


def _show_entries(cells: dict[str, dict[str, TargetSummary]]) -> None:
    layers = list(dict.fromkeys(layer for row in cells.values() for layer in row))
    rows = [
        [
            _short(layer),
            *(f"{row[layer].entries:,} ({row[layer].density:.3f})" if layer in row else "–" for row in cells.values()),
        ]
        for layer in layers
    ]
    table("Entries (density)", ["layer", *cells], rows)


def _show_heat(cells: dict[str, dict[str, TargetSummary]]) -> None:
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
