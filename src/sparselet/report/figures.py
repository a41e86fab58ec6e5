"""matplotlib figures as PNG and SVG files, and as SVG elements that use the fonts and the light or dark colours of a page."""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

# Name of a CSS variable: its colour on white and on near-black. The first six distinguish series: hues of Okabe and Ito's
# palette, with lightness chosen so that any two differ by ΔE > 20 in normal and in protan, deutan and tritan vision, and each
# has a contrast of 3 or more with its background.
PALETTE = {
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
INK, MUTED, LINE, PAGE = (PALETTE[name][0] for name in ("ink", "muted", "line", "page"))
MARKS = tuple(light for name, (light, _) in PALETTE.items() if name.startswith("mark-"))

_RC: dict[Any, Any] = {
    "figure.dpi": 72,  # one point is one pixel
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "sparselet",
    "text.parse_math": False,
    "font.size": 12,
    "text.color": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.frameon": False,
}


@contextmanager
def chart_style() -> Iterator[None]:
    """matplotlib's defaults with the style of the report, whatever the user's settings: equal figures give equal bytes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def to_svg(figure: Figure) -> str:
    """The figure as an SVG file with the light colours."""
    file = io.StringIO()
    with chart_style():
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, facecolor=PAGE)
    return re.sub(r"[ \t]+$", "", file.getvalue(), flags=re.MULTILINE)


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file with the light colours and two pixels for each point."""
    file = io.BytesIO()
    with chart_style():
        figure.savefig(file, format="png", dpi=144, metadata={"Software": None}, facecolor=PAGE)
    return file.getvalue()


def to_inline_svg(file: str, name: str) -> str:
    """An SVG file as an element of a page, with the page's font and CSS variables as colours. name: prefix of all ids."""
    element = file[file.index("<svg") :]
    element = re.sub(r"\s*<metadata>.*?</metadata>|\s*<defs>\s*<style.*?</style>\s*</defs>", "", element, flags=re.DOTALL)
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"<[^>]*>", lambda tag: _adapt_tag(tag.group(), name), element)).strip()


def inline_both(name: str, files: Mapping[str, str], label: str) -> Markup:
    """A figure at both widths, `{"wide": SVG, "narrow": SVG}`, as elements; the page's CSS shows one of them."""
    elements = []
    for kind, file in files.items():
        element = to_inline_svg(file, f"{name}-{kind}")
        opening = Markup('<svg class="{}" role="img" aria-label="{}"').format(kind, label)
        elements.append(opening + Markup(element.removeprefix("<svg")))
    return Markup("\n").join(elements)


def _adapt_tag(tag: str, name: str) -> str:
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', ""))
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag).replace("xlink:href", "href")
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    tag = re.sub(r'^(<svg .*?)width="([\d.]+)pt" height="([\d.]+)pt"', r'\1width="\2" height="\3"', tag)
    for variable, (light, _) in PALETTE.items():
        tag = tag.replace(light, f"var(--{variable})")
    return tag
