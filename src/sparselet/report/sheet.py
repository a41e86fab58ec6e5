"""A sheet measured in pixels from its upper left corner: lines, dots and text on it, and the sheet as PNG and SVG.

An SVG stands in a page as well, where it follows the page's colours and fonts.
"""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath
from matplotlib.ticker import MaxNLocator

# Name of a CSS variable: its colour on white and on near-black. The first six tell rows and series apart: hues of Okabe and
# Ito's palette, with lightness chosen so that any two differ by ΔE > 20 in normal and in protan, deutan and tritan vision,
# and each has a contrast of 3 or more with its background.
COLOURS = {
    "mark-1": ("#0a7bd0", "#2e93ec"),
    "mark-2": ("#db5a00", "#d07a4a"),
    "mark-3": ("#064b3a", "#38eba8"),
    "mark-4": ("#9a1f7d", "#ec5598"),
    "mark-5": ("#5e470c", "#c2af1c"),
    "mark-6": ("#8a9299", "#dae6f2"),
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#57606a", "#a3acb5"),
    "line": ("#dde1e6", "#30363d"),
    "page": ("#ffffff", "#14171a"),
}
INK, MUTED, LINE, PAGE = (COLOURS[name][0] for name in ("ink", "muted", "line", "page"))
MARKS = tuple(light for name, (light, _) in COLOURS.items() if name.startswith("mark-"))
TEXT, SMALL, LEADING = 12.0, 11.0, 15.0  # sizes of text, and from line to line

Point = tuple[float, float]


@dataclass(frozen=True)
class Style:
    """How a dot or line looks."""

    colour: str
    shape: str
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """Numbers low … high on pixels start … end, which may run downwards."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, number: float) -> float:
        """The pixel of a number."""
        low, high, number = (math.log(n) if self.log else n for n in (self.low, self.high, number))
        part = (number - low) / (high - low) if high > low else 0.5
        return self.start + part * (self.end - self.start)


@contextmanager
def plain() -> Iterator[None]:
    """matplotlib as it is by default, whatever the user's settings are: text stays text, and equal sheets give equal bytes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        ours: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "sparselet", "text.parse_math": False}
        matplotlib.rcParams.update(ours)
        yield


def svg(figure: Figure) -> str:
    """The sheet as an SVG file with the light colours."""
    found = io.StringIO()
    with plain():
        figure.savefig(found, format="svg", metadata={"Date": None, "Creator": None}, facecolor=PAGE)
    return re.sub(r"[ \t]+$", "", found.getvalue(), flags=re.MULTILINE)


def png(figure: Figure) -> bytes:
    """The sheet as a PNG file with the light colours, two pixels for one."""
    found = io.BytesIO()
    with plain():
        figure.savefig(found, format="png", dpi=144, metadata={"Software": None}, facecolor=PAGE)
    return found.getvalue()


def inline(file: str, name: str) -> str:
    """An SVG file as an element of a page, with the page's fonts and its variables as colours; ids begin with `name`."""
    element = file[file.index("<svg") :]
    element = re.sub(r"\s*<metadata>.*?</metadata>|\s*<defs>\s*<style.*?</style>\s*</defs>", "", element, flags=re.DOTALL)
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"<[^>]*>", lambda tag: _of_the_page(tag.group(), name), element)).strip()


def _of_the_page(tag: str, name: str) -> str:
    """A tag of an SVG file as it stands in the page."""
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', ""))
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag).replace("xlink:href", "href")
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    tag = re.sub(r'^(<svg .*?)width="([\d.]+)pt" height="([\d.]+)pt"', r'\1width="\2" height="\3"', tag)
    for variable, (light, _) in COLOURS.items():
        tag = tag.replace(light, f"var(--{variable})")
    return tag


# On the sheet


def sheet(width: float, height: float) -> Axes:
    """Axes that cover a figure, with pixels as coordinates."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return axes


def x_axis(axes: Axes, axis: Axis, ticks: Sequence[float], between: tuple[float, float], label: str) -> None:
    """A horizontal axis: its numbers, its label, and faint lines over the height between."""
    for tick in ticks:
        line(axes, [(axis.at(tick), between[0]), (axis.at(tick), between[1])], LINE)
    x_ticks(axes, axis, ticks, between[1], label)


def x_ticks(axes: Axes, axis: Axis, ticks: Sequence[float], y: float, label: str) -> None:
    """Numbers under an axis, the ends first, without those for which there is no room; and its label."""
    taken: list[tuple[float, float]] = []
    for tick in [*ticks[:1], *ticks[:0:-1]]:
        x, half = axis.at(tick), width_of(short(tick), SMALL) / 2 + 3
        line(axes, [(x, y), (x, y + 4)], MUTED)
        if all(x + half <= left or x - half >= right for left, right in taken):
            text(axes, x, y + 13, short(tick), size=SMALL, colour=MUTED, ha="center")
            taken.append((x - half, x + half))
    text(axes, (axis.start + axis.end) / 2, y + 31, label, size=SMALL, colour=MUTED, ha="center")


def ticks_of(axis: Axis) -> list[float]:
    """Round numbers on an axis."""
    return [tick for tick in round_numbers(axis.low, axis.high) if axis.low <= tick <= axis.high]


def round_numbers(low: float, high: float) -> list[float]:
    """About five round numbers, of which the first is at most low and the last at least high."""
    return [float(number) for number in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)]


def line(axes: Axes, points: Sequence[Point], colour: str, width: float = 1.0, dashed: bool = False) -> None:
    """A line through points."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes.plot(xs, ys, color=colour, linewidth=width, linestyle=(0, (4, 3)) if dashed else "-", clip_on=False)


def dot(axes: Axes, point: Point, style: Style, hollow: bool = False) -> None:
    """A dot with a rim in the page's colour; hollow, one of that colour with a rim of its own."""
    size = 9.5 if style.shape == "*" else 6.5 if style.shape in "sD" else 7.5
    face, edge = (PAGE, style.colour) if hollow else (style.colour, PAGE)
    axes.plot([point[0]], [point[1]], style.shape, ms=size, mfc=face, mec=edge, mew=1.25 if hollow else 0.75, clip_on=False)


def text(
    axes: Axes, x: float, y: float, told: str, *, size: float = TEXT, colour: str = INK, ha: str = "left", bold: bool = False
) -> None:
    """Lines of text beside x (`ha`: on which side), their middle at y."""
    lines, weight = told.split("\n"), "bold" if bold else "normal"
    for k, one in enumerate(lines):
        down = y + (k - (len(lines) - 1) / 2) * LEADING + size * 0.36  # the baseline: digits are 0.72 of the size high
        axes.text(x, down, one, size=size, color=colour, ha=ha, va="baseline", weight=weight, clip_on=False)


def wrap(told: str, width: float) -> str:
    """The text in lines no wider than `width` pixels, if its words allow."""
    return "\n".join(textwrap.wrap(told, max(8, int(width / (TEXT * 0.58))), break_long_words=False)) or told


def width_of(told: str, size: float = TEXT) -> float:
    """Pixels of a line of text in matplotlib's own font, which is wider than most."""
    return TextToPath().get_text_width_height_descent(told, FontProperties(size=size), ismath=False)[0]


def height_of(told: str) -> float:
    """Pixels of lines of text, with a little room."""
    return LEADING * (told.count("\n") + 1) + 1


def short(number: float) -> str:
    """A number on an axis: 1e-5, 0.05, 12, 300k, 2.7M."""
    if 0 < abs(number) < 1e-3:
        digits, power = f"{number:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= unit:
            return f"{number / min(unit, 1e3 if letter == 'k' else unit):.3g}{letter}"
    return f"{number:g}"


def apart(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Middles of things of these sizes between low and high that do not overlap, as near to the wanted (ascending) as can be.

    Least squares: isotonic regression of the wanted less the room before (pool adjacent violators; Barlow et al. 1972).
    Things that do not fit begin at low and run over high.
    """
    if not wanted:
        return []
    before = np.cumsum([0.0, *((a + b) / 2 for a, b in itertools.pairwise(sizes))])
    pools: list[list[float]] = []
    for number in np.asarray(wanted) - before:
        pools.append([float(number)])
        while len(pools) > 1 and np.mean(pools[-2]) >= np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    levels = np.concatenate([np.full(len(pool), np.mean(pool)) for pool in pools])
    first = low + sizes[0] / 2
    last = max(first, high - sizes[-1] / 2 - float(before[-1]))
    return [float(middle) for middle in np.clip(levels, first, last) + before]
