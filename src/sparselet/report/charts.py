"""Charts of a study's tables: a dot with its standard error for each cell, or lines over a number.

All charts of a measure have one scale, and a series looks the same in every chart: by colour and by marker, which
colour-blind readers can distinguish on both backgrounds.
"""

import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.textpath import TextToPath
from matplotlib.ticker import MaxNLocator

from sparselet.report.figures import INK, MARKS, PAGE, chart_style

WIDE, NARROW = 720, 344  # pixels; the narrow one fits a screen of 375
# Measures that are drawn.
MEASURES = {
    "rougeL": "Rouge-L",
    "exact_match": "exact match",
    "active_layers": "active layers",
    "validation_loss": "validation loss",
}
_SPANS = {"validation_loss": 0.05}  # the least range of a scale, where it is not 1
_COUNTS = {"active_layers"}  # measures whose scale starts at 0
_SHAPES = "osD^vPX*"

Row = Mapping[str, Any]
Scales = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Style:
    """The look of a series."""

    colour: str
    shape: str
    dashed: bool = False


def scales(tables: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """For each measure the range, on round numbers, of all means, errors and paper's figures that charts draw."""
    values: dict[str, list[float]] = {}
    for table in tables:
        columns = {j for chart in table["charts"] for j in _columns(table, chart)}
        for cell in (row["cells"][j] for row in table["rows"] for j in columns if row["cells"][j]):
            values.setdefault(cell["measure"], []).extend(_values(cell))
    ranges = {}
    for measure, numbers in values.items():
        numbers += [0.0] if measure in _COUNTS else []
        if measure in MEASURES and len(numbers) > 1:
            ticks = _ticks().tick_values(min(numbers), max(*numbers, min(numbers) + _SPANS.get(measure, 1.0)))
            ranges[measure] = (float(ticks[0]), float(ticks[-1]))
    return ranges


def shared_styles(charts: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Style]:
    """A style for each series that is in several charts. charts: tables with their charts."""
    counts = Counter(name for table, chart in charts for name in _series_names(table, chart))
    return {name: series_style(k) for k, (name, n) in enumerate(counts.most_common(len(MARKS))) if n > 1}


def draw(
    table: Mapping[str, Any], chart: Mapping[str, Any], ranges: Scales, shared: Mapping[str, Style], width: int
) -> Figure | None:
    """A chart of a table of results.json; None if none of its cells has a number.

    ranges: of `scales`. shared: of `shared_styles`. width: in pixels; the height depends on the content.
    """
    panels: list[tuple[str, int]] = []  # measure and column
    for j in _columns(table, chart):
        cells = [row["cells"][j] for row in table["rows"] if row["cells"][j]]
        if any(_has_mean(cell) for cell in cells) and cells[0]["measure"] in ranges:
            panels.append((cells[0]["measure"], j))
    if not panels:
        return None
    styles = _complete_styles(shared, _series_names(table, chart))
    with chart_style():
        figure = (_draw_lines if chart["kind"] == "lines" else _draw_dots)(table, chart, panels, ranges, styles, width)
        ConstrainedLayoutEngine().execute(figure)
        figure.set_layout_engine("none")  # the files have one layout, which is computed once
        return figure


def has_paper(table: Mapping[str, Any], chart: Mapping[str, Any]) -> bool:
    """Whether a chart shows figures of the paper."""
    cells = (row["cells"][j] for row in table["rows"] for j in _columns(table, chart))
    return any(cell and cell.get("paper") is not None for cell in cells)


def _values(cell: Row) -> list[float]:
    """All numbers of a cell that are drawn."""
    mean, error, paper = cell.get("mean"), cell.get("error") or 0.0, cell.get("paper")
    return ([mean - error, mean + error] if mean is not None else []) + ([paper] if paper is not None else [])


def _has_mean(cell: Row | None) -> bool:
    return cell is not None and cell.get("mean") is not None


def _columns(table: Mapping[str, Any], chart: Mapping[str, Any]) -> list[int]:
    """Indices of the columns that a chart draws: those that it names, or all."""
    names = chart.get("columns") or table["columns"]
    return [j for j, column in enumerate(table["columns"]) if column in names]


def _series_names(table: Mapping[str, Any], chart: Mapping[str, Any]) -> list[str]:
    """Names of the lines, or of the columns of dots."""
    if chart["kind"] == "lines":
        return list(dict.fromkeys(chart.get("series") or [""]))
    return [table["columns"][j] for j in _columns(table, chart)]


def series_style(k: int) -> Style:
    return Style(MARKS[k % len(MARKS)], _SHAPES[k % len(_SHAPES)], k >= len(MARKS))


def _complete_styles(shared: Mapping[str, Style], names: Sequence[str]) -> dict[str, Style]:
    """Styles of all names: the shared ones, and unused ones for the other names."""
    styles = {name: shared[name] for name in names if name in shared}
    unused = (style for style in map(series_style, range(len(names) + len(shared))) if style not in styles.values())
    return {name: styles[name] if name in styles else next(unused) for name in names}


def _draw_dots(
    table: Mapping[str, Any],
    chart: Mapping[str, Any],
    panels: Sequence[tuple[str, int]],
    ranges: Scales,
    styles: Mapping[str, Style],
    width: int,
) -> Figure:
    """Rows from top to bottom, a dot for each column; a panel for each measure."""
    columns: dict[str, list[int]] = {}
    for measure, j in panels:
        columns.setdefault(measure, []).append(j)
    rows = {m: [row for row in table["rows"] if any(row["cells"][j] for j in own)] for m, own in columns.items()}
    labels = {m: [_wrap(row["label"], 0.42 * width) for row in rows[m]] for m in columns}
    heights = {m: [max(10 + 9 * len(columns[m]), 10 + 15 * label.count("\n") + 15) for label in labels[m]] for m in columns}
    legend = [table["columns"][j] for _, j in panels] if any(len(own) > 1 for own in columns.values()) else []
    figure = figure_with_legend(width, sum(map(sum, heights.values())) + 64 * len(columns), legend, styles, linestyle="none")
    ratios = [sum(heights[m]) for m in columns]
    all_axes = figure.subplots(len(columns), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, (measure, own) in zip(all_axes, columns.items(), strict=True):
        edges = [sum(heights[measure][:i]) for i in range(len(rows[measure]) + 1)]
        middles = [(top + bottom) / 2 for top, bottom in itertools.pairwise(edges)]
        axes.set(xlim=ranges[measure], ylim=(edges[-1], 0), xlabel=MEASURES[measure])
        axes.set_yticks(middles, labels[measure], size=12, color=INK)
        axes.tick_params("y", length=0)
        axes.xaxis.set_major_locator(_ticks())
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        if len(own) == 1:
            axes.set_title(table["columns"][own[0]])
        for place, j in enumerate(own):
            for y, row in zip(middles, rows[measure], strict=True):
                _plot_cell(axes, row["cells"][j], y + (place - (len(own) - 1) / 2) * 8, styles[table["columns"][j]])
    return figure


def _plot_cell(axes: Axes, cell: Row | None, y: float, style: Style) -> None:
    """A dot with its error at height y, and the paper's figure as a hollow dot."""
    if cell and cell.get("paper") is not None:
        axes.plot(cell["paper"], y, **marker_look(style, hollow=True))
    if cell and _has_mean(cell):
        axes.errorbar(cell["mean"], y, xerr=cell.get("error") or 0.0, elinewidth=1.5, **marker_look(style))


def _draw_lines(
    table: Mapping[str, Any],
    chart: Mapping[str, Any],
    panels: Sequence[tuple[str, int]],
    ranges: Scales,
    styles: Mapping[str, Style],
    width: int,
) -> Figure:
    """A panel for each column with the same axes, a line for each series."""
    across = 2 if width == WIDE and len(panels) > 1 else 1
    down = math.ceil(len(panels) / across)
    names = list(styles) if len(styles) > 1 else []
    figure = figure_with_legend(width, down * (300 if across == 1 and width == WIDE else 250), names, styles)
    xs = sorted({float(x) for x in chart["x"] if x is not None})
    log = bool(chart.get("log")) and min(xs, default=0) > 0
    for k, (measure, j) in enumerate(panels):
        axes = figure.add_subplot(down, across, k + 1)
        axes.set(ylim=ranges[measure], xlabel=chart.get("x_label", ""), title=table["columns"][j])
        axes.set_ylabel("" if k % across else MEASURES[measure])
        axes.grid(axis="y")
        axes.yaxis.set_major_locator(_ticks())
        axes.spines["left"].set_visible(False)
        axes.tick_params("y", length=0)
        if log:
            axes.set_xscale("log")
        axes.margins(x=0.06)
        axes.set_xticks(xs, [format_tick(x) if keep else "" for x, keep in zip(xs, _spaced(xs, log, 6 * across), strict=True)])
        axes.minorticks_off()
        _plot_series(axes, table, chart, j, styles)
    return figure


def _plot_series(
    axes: Axes, table: Mapping[str, Any], chart: Mapping[str, Any], column: int, styles: Mapping[str, Style]
) -> None:
    """The lines of one panel. A row without a number x is a horizontal line."""
    names = chart.get("series") or [""] * len(table["rows"])
    for name, style in styles.items():
        points = [(x, row["cells"][column]) for x, s, row in zip(chart["x"], names, table["rows"], strict=True) if s == name]
        points.sort(key=lambda point: -math.inf if point[0] is None else point[0])
        for x, cell in points:
            if x is None and _has_mean(cell):
                axes.axhline(cell["mean"], color=style.colour, linewidth=1.25, linestyle=(0, (4, 3)))
            elif x is not None and cell and cell.get("paper") is not None:
                axes.plot(x, cell["paper"], **marker_look(style, hollow=True))
        drawn = [(x, cell["mean"], cell.get("error") or 0.0) for x, cell in points if x is not None and _has_mean(cell)]
        if drawn:
            x, means, errors = zip(*drawn, strict=True)
            line = {"linestyle": (0, (4, 3)) if style.dashed else "-", "linewidth": 1.75, "elinewidth": 1.25}
            axes.errorbar(x, means, yerr=errors, **{**marker_look(style), **line})


def figure_with_legend(
    width: int, height: float, names: Sequence[str], styles: Mapping[str, Style], linestyle: Any = "-"
) -> Figure:
    """An empty figure with a legend of these names above, in as many columns as fit."""
    texts = [_wrap(name, width - 60) for name in names]
    columns = max(1, int((width - 16) // (max(map(_text_width, texts), default=1) + 48)))
    lines = max((text.count("\n") + 1 for text in texts), default=0)
    height += math.ceil(len(texts) / columns) * (15 * lines + 6) + 12 if texts else 6
    figure = Figure(figsize=(width / 72, height / 72))
    if texts:
        handles = [
            Line2D(
                [],
                [],
                **{**marker_look(styles[n]), "linestyle": (0, (4, 3)) if styles[n].dashed and linestyle == "-" else linestyle},
            )
            for n in names
        ]
        figure.legend(
            handles, texts, loc="outside upper left", ncols=columns, borderaxespad=0, columnspacing=1.2, handlelength=1.8
        )
    return figure


def marker_look(style: Style, hollow: bool = False) -> dict[str, Any]:
    """Arguments of a filled dot with a rim in the page's colour, or of a hollow dot."""
    face, edge = (PAGE, style.colour) if hollow else (style.colour, PAGE)
    size = 9.5 if style.shape == "*" else 6.5 if style.shape in "sD" else 7.5
    look = {"color": style.colour, "marker": style.shape, "linestyle": "none", "clip_on": False}
    return {**look, "ms": size, "mfc": face, "mec": edge, "mew": 1.25 if hollow else 0.75}


def _spaced(ticks: Sequence[float], log: bool, count: int) -> list[bool]:
    """Which of the ticks get a number: the ends, and those at least 1/count of the axis from the last one and from the end."""
    values = [math.log(tick) if log else tick for tick in ticks]
    least = (values[-1] - values[0]) / count if values else 0.0
    keep, last = [], -math.inf
    for value in values:
        keep.append(value == values[-1] or (value - last >= least and values[-1] - value >= least))
        last = value if keep[-1] else last
    return keep


def _ticks() -> MaxNLocator:
    """About five round numbers."""
    return MaxNLocator(5, steps=[1, 2, 5, 10])


def format_tick(number: float) -> str:
    """A number on an axis: 1e-5, 0.05, 12."""
    return f"{number:g}".replace("e-0", "e-")


def _wrap(text: str, width: float) -> str:
    """The text in lines of at most `width` pixels, if its words allow."""
    return "\n".join(textwrap.wrap(text, max(8, int(width / 7)), break_long_words=False)) or text


def _text_width(text: str) -> float:
    """Pixels of the longest line in matplotlib's own font, which is wider than most."""
    return max(
        TextToPath().get_text_width_height_descent(line, FontProperties(size=12), ismath=False)[0] for line in text.split("\n")
    )
