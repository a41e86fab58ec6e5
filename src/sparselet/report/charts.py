"""Charts of a study's tables: dots with standard errors by row, or lines over a number. They draw what a table holds.

Every chart is laid out in pixels on one sheet, at two widths. All Rouge-L on a page has one scale; labels stand at what they
name and are moved apart; colours are told apart by colour-blind readers on both backgrounds, and markers differ as well.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparselet.report.sheet import (
    LINE,
    MARKS,
    MUTED,
    SMALL,
    TEXT,
    Axis,
    Point,
    Style,
    apart,
    dot,
    height_of,
    line,
    plain,
    round_numbers,
    sheet,
    short,
    text,
    ticks_of,
    width_of,
    wrap,
    x_axis,
    x_ticks,
)

WIDE, NARROW = 720, 344  # pixels; the narrow one fits a screen of 375
MEASURES = {"rougeL": "Rouge-L", "exact_match": "exact match", "active_layers": "active layers"}  # those that are drawn
_COUNTS = {"active_layers"}  # whose range begins at 0
_SHAPES = "osD^vPX*"


def scales(tables: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """For each measure one range that holds all means, errors and paper's figures which charts draw, on round numbers."""
    found: dict[str, list[float]] = {}
    for table in tables:
        drawn = {j for chart in table["charts"] for j in _chosen(table, chart)}
        for cell in (row["cells"][j] for row in table["rows"] for j in drawn if row["cells"][j]):
            found.setdefault(cell["measure"], []).extend(_numbers(cell))
    ranges = {}
    for measure, numbers in found.items():
        numbers += [0.0] if measure in _COUNTS else []
        if measure in MEASURES and len(numbers) > 1:
            ticks = round_numbers(min(numbers), max(*numbers, min(numbers) + 1))
            ranges[measure] = (ticks[0], ticks[-1])
    return ranges


def styles(charts: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Style]:
    """A style for each of the names that stand in several charts, so that it looks alike in all; most frequent names first."""
    counts = Counter(name for table, chart in charts for name in _names(table, chart))
    return {name: _style(k) for k, (name, n) in enumerate(counts.most_common(len(MARKS))) if n > 1}


def draw(
    table: Mapping[str, Any],
    chart: Mapping[str, Any],
    ranges: Mapping[str, tuple[float, float]],
    shared: Mapping[str, Style],
    width: int,
) -> Figure | None:
    """A chart of a table as it stands in results.json; None if it has nothing to draw yet.

    ranges: as `scales` gives them. shared: as `styles` gives them. width: in pixels; the height follows.
    """
    columns: dict[str, list[int]] = {}
    for j in _chosen(table, chart):
        measure = next((row["cells"][j]["measure"] for row in table["rows"] if row["cells"][j]), "")
        if any(_drawn(row["cells"][j]) for row in table["rows"]) and measure in ranges:
            columns.setdefault(measure, []).append(j)
    if not columns:
        return None
    look = _complete(shared, _names(table, chart))
    with plain():
        return (_lines if chart["kind"] == "lines" else _dots)(table, chart, columns, ranges, look, width)


def has_paper(table: Mapping[str, Any], chart: Mapping[str, Any]) -> bool:
    """Does a chart show figures of the paper?"""
    cells = (row["cells"][j] for row in table["rows"] for j in _chosen(table, chart))
    return any(cell and cell.get("paper") is not None for cell in cells)


# What there is to draw


def _numbers(cell: Mapping[str, Any]) -> list[float]:
    """All numbers of a cell that are drawn."""
    mean, error, paper = cell.get("mean"), cell.get("error") or 0.0, cell.get("paper")
    return ([mean - error, mean + error] if mean is not None else []) + ([paper] if paper is not None else [])


def _drawn(cell: Mapping[str, Any] | None) -> bool:
    return bool(cell) and cell.get("mean") is not None


def _chosen(table: Mapping[str, Any], chart: Mapping[str, Any]) -> list[int]:
    """Places of the columns that a chart draws: those that it names, or all."""
    named = chart.get("columns") or table["columns"]
    return [j for j, column in enumerate(table["columns"]) if column in named]


def _names(table: Mapping[str, Any], chart: Mapping[str, Any]) -> list[str]:
    """What has a style of its own: series of lines, columns of dots."""
    return (
        list(dict.fromkeys(chart.get("series") or [""]))
        if chart["kind"] == "lines"
        else [table["columns"][j] for j in _chosen(table, chart)]
    )


def _style(k: int) -> Style:
    return Style(MARKS[k % len(MARKS)], _SHAPES[k % len(_SHAPES)], k >= len(MARKS))


def _complete(shared: Mapping[str, Style], names: Sequence[str]) -> dict[str, Style]:
    """Styles of all names: the shared ones, and for the others those that are left."""
    look = {name: shared[name] for name in names if name in shared}
    free = (style for style in map(_style, range(len(names) + len(shared))) if style not in look.values())
    return {name: look[name] if name in look else next(free) for name in names}


# Kinds of charts


def _dots(
    table: Mapping[str, Any],
    chart: Mapping[str, Any],
    columns: Mapping[str, list[int]],
    ranges: Mapping[str, tuple[float, float]],
    look: Mapping[str, Style],
    width: int,
) -> Figure:
    """Rows from top to bottom, a dot for each column at its mean with its standard error; below one another by measure."""
    blocks = []
    for measure, places in columns.items():
        rows = [row for row in table["rows"] if any(row["cells"][j] for j in places)]
        labels = [wrap(row["label"], 0.42 * width) for row in rows]
        blocks.append((measure, places, rows, labels))
    left = max(width_of(line) for *_, labels in blocks for label in labels for line in label.split("\n")) + 12
    heights = [[max(12.0 + 9 * len(places), 26.0, height_of(label) + 8) for label in labels] for _, places, _, labels in blocks]
    head, foot = 44, 44
    axes = sheet(width, sum(head + sum(each) + foot for each in heights))
    top = 0.0
    for (measure, places, rows, labels), each in zip(blocks, heights, strict=True):
        axis = Axis(*ranges[measure], left, width - 14)
        bottom = top + head + sum(each)
        x_axis(axes, axis, ticks_of(axis), (top + head, bottom), MEASURES[measure])
        anchors: dict[int, Point] = {}
        middle = top + head
        for row, label, height in zip(rows, labels, each, strict=True):
            middle += height
            y = middle - height / 2
            text(axes, left - 10, y, label, ha="right")
            for place, j in enumerate(places):
                point_y = y + (place - (len(places) - 1) / 2) * 8
                x = _dot_with_error(axes, axis, point_y, row["cells"][j], look[table["columns"][j]])
                if x is not None:
                    anchors.setdefault(j, (x, point_y))
        if len(places) > 1:
            _name_above(axes, {table["columns"][j]: point for j, point in anchors.items()}, look, top + 12, (2, width - 2))
        else:
            text(axes, left, top + 12, table["columns"][places[0]], bold=True)
        top = bottom + foot
    return axes.figure  # pyright: ignore[reportReturnType]


def _dot_with_error(axes: Axes, axis: Axis, y: float, cell: Mapping[str, Any] | None, style: Style) -> float | None:
    """Draw a cell, the paper's figure hollow. The pixel of its mean."""
    if not cell:
        return None
    if cell.get("paper") is not None:
        dot(axes, (axis.at(cell["paper"]), y), style, hollow=True)
    if cell.get("mean") is None:
        return None
    mean, error = cell["mean"], cell.get("error") or 0.0
    line(axes, [(axis.at(mean - error), y), (axis.at(mean + error), y)], style.colour, 1.5)
    dot(axes, (axis.at(mean), y), style)
    return axis.at(mean)


def _name_above(
    axes: Axes, points: Mapping[str, Point], look: Mapping[str, Style], y: float, between: tuple[float, float]
) -> None:
    """Names in a line over a chart, each with its marker and a thin line to its first dot; smaller where they do not fit."""
    names = sorted(points, key=lambda name: points[name][0])
    sizes = [width_of(name) + 30 for name in names]
    small = TEXT * min(1.0, (between[1] - between[0]) / sum(sizes))
    sizes = [size * small / TEXT for size in sizes]
    for name, middle, size in zip(names, apart([points[n][0] for n in names], sizes, *between), sizes, strict=True):
        line(axes, [(middle, y + 9), points[name]], look[name].colour, 0.75)
        dot(axes, (middle - size / 2 + 9, y), look[name])
        text(axes, middle - size / 2 + 18, y, name, size=small)


def _lines(
    table: Mapping[str, Any],
    chart: Mapping[str, Any],
    columns: Mapping[str, list[int]],
    ranges: Mapping[str, tuple[float, float]],
    look: Mapping[str, Style],
    width: int,
) -> Figure:
    """A panel for each column with the same axes: a line for each series, named at its end."""
    places = [(measure, j) for measure, found in columns.items() for j in found]
    across = 2 if width == WIDE and len(places) > 1 else 1
    gap, names = 32, [name for name in look if name]
    panel = (width - gap * (across - 1)) / across
    labels = {name: wrap(name, 0.36 * panel) for name in names} if len(names) > 1 else {}
    tall = max(250.0 if panel == WIDE else 190.0, sum(map(height_of, labels.values())))
    head, foot = 44, 44
    axes = sheet(width, math.ceil(len(places) / across) * (head + tall + foot))
    right = max((width_of(line) for label in labels.values() for line in label.split("\n")), default=0) + (28 if labels else 12)
    xs = [x for x in chart["x"] if x is not None]
    log = bool(chart.get("log")) and min(xs, default=0) > 0
    for k, (measure, j) in enumerate(places):
        left, top = (panel + gap) * (k % across), (head + tall + foot) * (k // across)
        y_axis = Axis(*ranges[measure], top + head + tall, top + head)
        ticks = ticks_of(y_axis)
        start = left + max(width_of(short(tick), SMALL) for tick in ticks) + 8
        x_axis = Axis(min(xs, default=0), max(xs, default=1), start + 10, left + panel - right, log)
        for tick in ticks:
            line(axes, [(start, y_axis.at(tick)), (x_axis.end, y_axis.at(tick))], LINE)
            text(axes, start - 6, y_axis.at(tick), short(tick), size=SMALL, colour=MUTED, ha="right")
        text(axes, left, top + 10, table["columns"][j], bold=True)
        text(axes, left, top + 28, MEASURES[measure], size=SMALL, colour=MUTED)
        x_ticks(axes, x_axis, sorted(set(xs)), y_axis.start, chart.get("x_label", ""))
        _series(axes, x_axis, y_axis, table, chart, j, look, labels)
    return axes.figure  # pyright: ignore[reportReturnType]


def _series(
    axes: Axes,
    x_axis: Axis,
    y_axis: Axis,
    table: Mapping[str, Any],
    chart: Mapping[str, Any],
    column: int,
    look: Mapping[str, Style],
    labels: Mapping[str, str],
) -> None:
    """The lines of one panel. A row without a number x is a level across the panel."""
    series = chart.get("series") or [""] * len(table["rows"])
    ends: dict[str, Point] = {}
    for place, (name, style) in enumerate(look.items()):
        rows = [(x, row["cells"][column]) for x, s, row in zip(chart["x"], series, table["rows"], strict=True) if s == name]
        shift = (place - (len(look) - 1) / 2) * min(3.0, 12.0 / len(look))
        drawn = sorted(((x, cell) for x, cell in rows if x is not None and cell), key=lambda pair: pair[0])
        for x, cell in drawn:
            if cell.get("paper") is not None:
                dot(axes, (x_axis.at(x) + shift, y_axis.at(cell["paper"])), style, hollow=True)
        drawn = [(x_axis.at(x) + shift, cell) for x, cell in drawn if _drawn(cell)]
        points = [(x, y_axis.at(cell["mean"])) for x, cell in drawn]
        for x, cell in drawn:
            low, high = (y_axis.at(cell["mean"] + sign * (cell.get("error") or 0.0)) for sign in (-1, 1))
            line(axes, [(x, low), (x, high)], style.colour, 1.25)
        line(axes, points, style.colour, 1.75, style.dashed)
        for point in points:
            dot(axes, point, style)
        for x, cell in rows:
            if x is None and _drawn(cell):
                points = [(x_axis.start - 10, y_axis.at(cell["mean"])), (x_axis.end, y_axis.at(cell["mean"]))]
                line(axes, points, style.colour, 1.25, dashed=True)
        if points:
            ends[name] = points[-1]
    _name_ends(axes, {name: end for name, end in ends.items() if name in labels}, look, labels, x_axis.end, y_axis)


def _name_ends(
    axes: Axes,
    ends: Mapping[str, Point],
    look: Mapping[str, Style],
    labels: Mapping[str, str],
    right: float,
    y_axis: Axis,
) -> None:
    """Names to the right of a panel, in the order of the lines' ends, each with a thin line to its end."""
    names = sorted(ends, key=lambda name: ends[name][1])
    sizes = [height_of(labels[name]) for name in names]
    middles = apart([ends[name][1] for name in names], sizes, y_axis.end - 30, y_axis.start + 14)
    for name, middle in zip(names, middles, strict=True):
        x, y = ends[name]
        line(axes, [(x, y), (max(x, right) + 8, y), (right + 20, middle)], look[name].colour, 0.75)
        text(axes, right + 24, middle, labels[name])
