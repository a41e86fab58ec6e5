"""The results of a study as plain data: what the report draws, and what is kept."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sparselet.studies.arms import Study
from sparselet.studies.engine.unit import closure
from sparselet.studies.numbers import Found, Number, number
from sparselet.studies.paper.claims import CLAIMS, Claim
from sparselet.studies.paper.verdicts import judge
from sparselet.studies.table import Cell, Chart, Table


def results(study: Study, tables: Mapping[str, Table], found: Found, claims: Sequence[Claim] = CLAIMS) -> dict[str, Any]:
    """Everything that was asked of a study, as JSON values. The same results give the same bytes, whatever their order.

    found: the results of the units that were done, by key. Of a unit that was not, every cell that needs it says so.
    """
    settings = study.settings
    numbers = {
        name: {row: tuple(cell and number(cell, found) for cell in cells) for row, cells in table.rows.items()}
        for name, table in tables.items()
    }
    plan = closure(unit for table in tables.values() for unit in table.units())
    kinds = Counter(unit.kind for unit in plan.values())
    missing = sum(key not in found for key, unit in plan.items() if unit.kind != "merge")  # a merge has no result of its own
    return {
        "name": settings.name,
        "preset": settings.preset,
        "tables": {name: _table(table, numbers[name]) for name, table in tables.items()},
        "claims": [asdict(judge(claim, tables, numbers)) for claim in claims],
        "settings": {name: _plain(value) for name, value in asdict(settings).items()},
        "tasks": {
            task: {"held": "in" if task in settings.held_in else "out", "fingerprint": study.data[task]["test"]}
            | ({"train_fingerprint": study.data[task]["train"]} if task in settings.held_in else {})
            for task in (*settings.held_in, *settings.held_out)
        },
        "base": study.base,
        "units": {kind: kinds[kind] for kind in ("train", "merge", "evaluate")} | {"missing": missing},
    }


def _table(table: Table, numbers: Mapping[str, Sequence[Number | None]]) -> dict[str, Any]:
    return {
        "title": table.title,
        "source": table.source,
        "note": table.note,
        "columns": list(table.columns),
        "charts": [_chart(chart) for chart in table.charts],
        "rows": [
            {"label": row, "cells": [_cell(cell, own) for cell, own in zip(cells, numbers[row], strict=True)]}
            for row, cells in table.rows.items()
        ],
    }


def _cell(cell: Cell | None, own: Number | None) -> dict[str, Any] | None:
    if cell is None or own is None:
        return None
    return {**asdict(own), "measure": "percent" if cell.percent_of else cell.measure, "paper": cell.paper}


def _chart(chart: Chart) -> dict[str, Any]:
    return {name: _plain(value) for name, value in asdict(chart).items()}


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (tuple, list)) else value
