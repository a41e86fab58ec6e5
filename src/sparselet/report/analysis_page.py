"""Results of an analysis as one HTML page that needs no other file: figures at two widths, and the tables they are of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from sparselet.io.atomic import write_text
from sparselet.io.printable import printable
from sparselet.report import figures
from sparselet.report.charts import NARROW, WIDE
from sparselet.result_table import ResultTable

_DIRECTORY = Path(__file__).parent


@dataclass(frozen=True)
class Picture:
    """A figure. draw: draws it at a width in pixels. label: says what it shows, for screen readers and below it."""

    draw: Callable[[int], Figure]
    label: str


@dataclass(frozen=True)
class Section:
    """A part of a page. text: what its numbers mean."""

    title: str
    text: str
    pictures: Sequence[Picture] = ()
    table: ResultTable | None = None


def write_page(file: str | Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write the page to `file` and return its path. The same input gives the same bytes. Raises WriteFailed."""
    settings = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    settings.filters["printable"] = printable
    template = settings.from_string((_DIRECTORY / "analysis_page.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        css=Markup((_DIRECTORY / "study_page.css").read_text(encoding="utf-8")),
        colours=figures.PALETTE,
        title=title,
        lead=lead,
        sections=[(section, _drawn(i, section.pictures)) for i, section in enumerate(sections)],
    )
    write_text(file, page)
    return Path(file)


def _drawn(section: int, pictures: Sequence[Picture]) -> list[tuple[Markup, str]]:
    drawn = []
    for i, picture in enumerate(pictures):
        files = {kind: figures.to_svg(picture.draw(width)) for kind, width in (("wide", WIDE), ("narrow", NARROW))}
        drawn.append((figures.inline_both(f"figure-{section}-{i}", files, picture.label), picture.label))
    return drawn
