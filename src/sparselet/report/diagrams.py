"""Diagrams of changes and hidden states: heat maps, curves with intervals, clouds of points. Nothing is computed here.

Each function draws one figure of a width in pixels, in the colours of `figures.PALETTE`, of which a page makes light or dark
ones. Series look as in a study's charts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from sparselet.report.charts import Style, figure_with_legend, format_tick, marker_look, series_style
from sparselet.report.figures import INK, MARKS, MUTED, chart_style

FAINTEST = 0.06  # opacity of a cell with the smallest value


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    width: int,
    *,
    texts: Sequence[Sequence[str]] | None = None,
    x_label: str = "",
) -> Figure:
    """A cell for each number ≥ 0, the stronger the larger it is; without a number none. texts: written into the cells."""
    largest = max((value for row in values for value in row if value is not None), default=0.0) or 1.0
    with chart_style():
        figure = Figure(figsize=(width / 72, (70 + (44 if texts else 22) * len(rows)) / 72))
        axes = figure.add_subplot()
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value is None:
                    continue
                opacity = FAINTEST + (1 - FAINTEST) * value / largest * (0.5 if texts else 1)
                axes.add_patch(Rectangle((j + 0.04, i + 0.06), 0.92, 0.88, facecolor=MARKS[0], alpha=opacity, linewidth=0))
                if texts:
                    axes.text(j + 0.5, i + 0.5, texts[i][j], ha="center", va="center", size=11, color=INK)
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), xlabel=x_label)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], rows, color=INK)
        step = max(1, -(-len(columns) * 22 * max(1, max(map(len, columns), default=1) // 2) // width))
        if texts and step > 1:
            axes.set_xticks([j + 0.5 for j in range(len(columns))], columns, rotation=90)
        else:
            axes.set_xticks([j + 0.5 for j in range(0, len(columns), step)], columns[::step])
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        return _laid_out(figure)


def curves(
    series: Mapping[str, Sequence[tuple[float, ...]]],
    width: int,
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    ticks: Sequence[float] = (),
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """Lines through points (x, y), or (x, y, low, high) with an interval. levels: named horizontal lines."""
    styles = {name: series_style(k) for k, name in enumerate(series)}
    with chart_style():
        figure = figure_with_legend(width, 0.62 * width if width < 500 else 330, list(series), styles)
        axes = _axes(figure, x_label, y_label)
        for name, points in series.items():
            _line(axes, points, styles[name], len(points) <= 12)
        for name, level in (levels or {}).items():
            axes.axhline(level, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            side = "bottom" if level == max((levels or {}).values()) else "top"
            axes.annotate(name, (0.01, level), xycoords=("axes fraction", "data"), va=side, size=11, color=MUTED)
        if log:
            axes.set_xscale("log")
        if ticks:
            axes.set_xticks(ticks, [format_tick(tick) for tick in ticks])
            axes.minorticks_off()
        return _laid_out(figure)


def cloud(series: Mapping[str, Sequence[tuple[float, float]]], width: int, *, x_label: str, y_label: str) -> Figure:
    """A small dot for each point."""
    styles = {name: series_style(k) for k, name in enumerate(series)}
    with chart_style():
        figure = figure_with_legend(width, 0.75 * width if width < 500 else 380, list(series), styles, linestyle="none")
        axes = _axes(figure, x_label, y_label)
        for name, points in series.items():
            look = {**marker_look(styles[name]), "ms": 4.5, "mew": 0.4, "alpha": 0.75}
            axes.plot([x for x, _ in points], [y for _, y in points], **look)
        return _laid_out(figure)


def _axes(figure: Figure, x_label: str, y_label: str) -> Axes:
    axes = figure.add_subplot()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params("y", length=0)
    return axes


def _line(axes: Axes, points: Sequence[tuple[float, ...]], style: Style, dots: bool) -> None:
    line: dict[str, Any] = {"linestyle": (0, (4, 3)) if style.dashed else "-", "linewidth": 1.75}
    look = {**marker_look(style), **line} if dots else {"color": style.colour, **line}
    x, y = [point[0] for point in points], [point[1] for point in points]
    if all(len(point) == 4 for point in points) and points:
        axes.fill_between(x, [p[2] for p in points], [p[3] for p in points], color=style.colour, alpha=0.14, linewidth=0)
    axes.plot(x, y, **look)


def _laid_out(figure: Figure) -> Figure:
    """The figure with its layout computed once, so that its files have the same."""
    ConstrainedLayoutEngine().execute(figure)
    figure.set_layout_engine("none")
    return figure
