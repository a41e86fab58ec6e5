"""A study's results as one HTML page that needs no other file, and its charts as files. Nothing is computed here."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sparselet.io.atomic import atomic_write, write_text
from sparselet.io.paths import check_inside
from sparselet.report import charts, figures
from sparselet.report.quantities import format_bytes, format_duration, format_number

VERDICTS = {"holds": "✓", "undecided": "?", "reversed": "✗", "not tested": "–"}  # with their symbols
_DIRECTORY = Path(__file__).parent
_STRIP = (6.0, 154.0)  # pixels between which a claim's interval is drawn


def write_report(out: Path, results: Mapping[str, Any], cost: Mapping[str, Any]) -> Path:
    """Write `out/report.html`, and each chart as `out/figures/NAME.svg` and `.png`. The page's path.

    results: a study's results.json. cost: its cost.json; fields that it lacks are left out. The same input gives the same
    bytes with the same version of matplotlib. Raises UnsafePath (a table's name is no file name), WriteFailed.
    """
    directory = out / "figures"
    tables = results["tables"]
    ranges = charts.scales(tables.values())
    shared = charts.shared_styles([(table, chart) for table in tables.values() for chart in table["charts"]])
    drawn: dict[str, list[dict[str, Any]]] = {name: [] for name in tables}
    for name, table in tables.items():
        for k, chart in enumerate(table["charts"], 1):
            file = name if len(table["charts"]) == 1 else f"{name}-{k}"
            wide, narrow = (charts.draw(table, chart, ranges, shared, width) for width in (charts.WIDE, charts.NARROW))
            if wide is None or narrow is None:
                continue
            picture = figures.to_svg(wide)
            write_text(check_inside(directory, f"{file}.svg"), picture)
            with atomic_write(check_inside(directory, f"{file}.png")) as png:
                png.write(figures.to_png(wide))
            both = figures.inline_both(file, {"wide": picture, "narrow": figures.to_svg(narrow)}, _chart_label(table, chart))
            drawn[name].append({"svg": both, "has_paper": charts.has_paper(table, chart)})
    page = out / "report.html"
    write_text(page, _page(results, cost, drawn))
    return page


def _page(results: Mapping[str, Any], cost: Mapping[str, Any], drawn: Mapping[str, list[dict[str, Any]]]) -> str:
    """The page. drawn: the charts of each table as `svg`, and whether they show figures of the paper."""
    settings = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    settings.filters |= {"number": format_number, "bytes": format_bytes, "duration": format_duration}
    template = settings.from_string((_DIRECTORY / "study_page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        css=Markup((_DIRECTORY / "study_page.css").read_text(encoding="utf-8")),
        colours=figures.PALETTE,
        results=results,
        cost=cost,
        claims=_claims(results.get("claims", [])),
        counts={verdict: sum(c["verdict"] == verdict for c in results.get("claims", [])) for verdict in VERDICTS},
        held={kind: sum(t["held"] == kind for t in results.get("tasks", {}).values()) for kind in ("in", "out")},
        tables={name: {**_table(table), "charts": drawn[name]} for name, table in results["tables"].items()},
        settings=json.dumps(results.get("settings", {}), indent=2, ensure_ascii=False),
    )


# Charts


def _chart_label(table: Mapping[str, Any], chart: Mapping[str, Any]) -> str:
    """A description of a chart for screen readers."""
    columns = ", ".join(chart.get("columns") or table["columns"])
    form = f"lines over {chart.get('x_label') or 'a number'}" if chart["kind"] == "lines" else "a dot for each row"
    return f"Chart of {table['title']}: {columns}; {form}. The numbers are in the table below."


# Tables


def _table(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table with its numbers as text; a column for which the paper has figures gets a second column with them."""
    cells = [row["cells"] for row in table["rows"]]
    has_paper = [any(row[j] and row[j].get("paper") is not None for row in cells) for j in range(len(table["columns"]))]
    rows = [{"label": row["label"], "cells": [_cell(cell) for cell in row["cells"]]} for row in table["rows"]]
    return {
        "title": table["title"],
        "source": table.get("source", ""),
        "note": table.get("note", ""),
        "columns": list(zip(table["columns"], has_paper, strict=True)),
        "rows": rows,
        "by_task": [part for j in range(len(table["columns"])) if (part := _by_task(table, j))],
        "has_paper": any(has_paper),
        "has_error": any(cell and cell["error"] for row in rows for cell in row["cells"]),
    }


def _cell(cell: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A cell's numbers as text: mean, error, paper, and how many units are missing."""
    if cell is None:
        return None
    measure, mean = cell["measure"], cell.get("mean")
    error = format_number(cell["error"], measure, like=mean) if cell.get("error") else ""
    texts = {"mean": format_number(mean, measure), "error": error, "paper": format_number(cell.get("paper"), measure)}
    return {**texts, "missing": cell.get("missing") or 0}


def _by_task(table: Mapping[str, Any], column: int) -> dict[str, Any] | None:
    """One column's means by task, a row for each row of the table; None where there are none."""
    cells = [(row["label"], row["cells"][column]) for row in table["rows"] if row["cells"][column]]
    tasks = list(dict.fromkeys(task for _, cell in cells for task in cell.get("tasks") or {}))
    if not tasks:
        return None
    rows = {
        label: [format_number(cell["tasks"].get(task), cell["measure"]) for task in tasks]
        for label, cell in cells
        if cell.get("tasks")
    }
    return {"column": table["columns"][column], "tasks": tasks, "rows": rows}


# Claims


def _claims(claims: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Claims with their verdict's symbol and with their interval in pixels, all on one scale with 0 in it."""
    ends = [0.0] + [c[key] for c in claims for key in ("low", "high", "difference") if c.get(key) is not None]
    scale = (_STRIP[1] - _STRIP[0]) / ((max(ends) - min(ends)) or 1.0)
    rows = []
    for claim in claims:
        values = {key: claim[key] for key in ("difference", "low", "high") if claim.get(key) is not None} | {"zero": 0.0}
        strip = {key: round(_STRIP[0] + scale * (value - min(ends)), 1) for key, value in values.items()}
        rows.append({**claim, "symbol": VERDICTS.get(claim["verdict"], "–"), "strip": strip if len(strip) == 4 else None})
    return rows
