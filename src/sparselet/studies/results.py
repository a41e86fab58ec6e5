"""The results of a study as JSON values: the content of results.json, which the report draws."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sparselet.studies.claim import Claim
from sparselet.studies.engine.unit import KINDS, closure
from sparselet.studies.numbers import Measures, Number, cell_number
from sparselet.studies.study import Study
from sparselet.studies.table import Cell, Chart, Table
from sparselet.studies.tables import CLAIMS
from sparselet.studies.verdicts import judge


def make_results(
    study: Study, tables: Mapping[str, Table], measures: Measures, claims: Sequence[Claim] | None = None
) -> dict[str, Any]:
    """Tables, claims, settings and fingerprints as JSON values. The same measures give the same bytes, in any order.

    measures: of the units that are done, by key. A cell counts its units without a result as `missing`. claims: by default
    those that the settings name.
    """
    settings = study.settings
    numbers = {
        name: {row: tuple(cell and cell_number(cell, measures) for cell in cells) for row, cells in table.rows.items()}
        for name, table in tables.items()
    }
    plan = closure(unit for table in tables.values() for unit in table.units())
    kinds = Counter(unit.kind for unit in plan.values())
    missing = sum(key not in measures for key, unit in plan.items() if unit.kind != "merge")  # a merge has no measures
    return {
        "name": settings.name,
        "preset": settings.preset,
        "tables": {name: _table(table, numbers[name]) for name, table in tables.items()},
        "claims": [asdict(judge(claim, tables, numbers)) for claim in (CLAIMS[settings.claims] if claims is None else claims)],
        "settings": {name: _plain(value) for name, value in asdict(settings).items()},
        "tasks": {
            task: {"held": "in" if task in settings.held_in else "out", "fingerprint": study.data[task]["test"]}
            | ({"train_fingerprint": study.data[task]["train"]} if task in settings.held_in else {})
            for task in (*settings.held_in, *settings.held_out)
        },
        "base": study.base,
        "units": {kind: kinds[kind] for kind in KINDS if kinds[kind] or kind != "analyse"} | {"missing": missing},
    }


def _table(table: Table, numbers: Mapping[str, Sequence[Number | None]]) -> dict[str, Any]:
    return {
        "title": table.title,
        "source": table.source,
        "note": table.note,
        "columns": list(table.columns),
        "charts": [_chart(chart) for chart in table.charts],
        "rows": [
            {"label": row, "cells": [_cell(cell, number) for cell, number in zip(cells, numbers[row], strict=True)]}
            for row, cells in table.rows.items()
        ],
    }


def _cell(cell: Cell | None, number: Number | None) -> dict[str, Any] | None:
    if cell is None or number is None:
        return None
    return {**asdict(number), "measure": "percent" if cell.percent_of else cell.measure, "paper": cell.paper}


def _chart(chart: Chart) -> dict[str, Any]:
    return {name: _plain(value) for name, value in asdict(chart).items()}


def _plain(value: Any) -> Any:
    """A value as JSON reads it back."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
