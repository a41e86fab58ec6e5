"""Colours that colour-blind readers can distinguish, numbers on axes, and figures as files."""

import itertools
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from sparselet.report import charts, figures

# Machado, Oliveira, Fernandes 2009, severity 1, for linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
SCHEMES = {"light": 0, "dark": 1}


def linear(colour: str) -> np.ndarray:
    """Linear RGB of #rrggbb (IEC 61966-2-1)."""
    part = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB, D65."""
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.95047, 1, 1.08883])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    """Of WCAG 2."""
    low, high = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("vision", VISIONS)
def test_marks_can_be_told_apart(vision, scheme):
    marks = [pair[SCHEMES[scheme]] for name, pair in figures.PALETTE.items() if name.startswith("mark")]
    assert len(marks) == 6
    for one, other in itertools.combinations(marks, 2):
        difference = np.linalg.norm(lab(VISIONS[vision] @ linear(one)) - lab(VISIONS[vision] @ linear(other)))
        assert difference > 20, (one, other)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_contrast_with_the_page(scheme):
    colours = {name: pair[SCHEMES[scheme]] for name, pair in figures.PALETTE.items()}
    for name, colour in colours.items():
        least = 4.5 if name in ("ink", "muted") else 3 if name.startswith("mark") else 0
        assert contrast(colour, colours["page"]) >= least, name


def test_a_light_colour_stands_for_one_variable():
    light = [pair[0] for pair in figures.PALETTE.values()]
    assert len(set(light)) == len(light)


@pytest.mark.parametrize(
    ("number", "text"), [(1e-5, "1e-5"), (2.5e-5, "2.5e-5"), (0.001, "0.001"), (0.05, "0.05"), (0, "0"), (12, "12"), (-5, "-5")]
)
def test_numbers_on_axes(number, text):
    assert charts.format_tick(number) == text


def test_ticks_without_room_lose_their_number_but_not_the_ends():
    ticks = [0.01, 0.2, 0.5, 0.8, 1.0]
    assert charts._spaced(ticks, log=True, count=6) == [True, True, False, False, True]
    assert charts._spaced(ticks, log=False, count=6) == [True, True, True, True, True]
    assert charts._spaced([], log=False, count=6) == []


def draw_something() -> Figure:
    with figures.chart_style():
        figure = Figure(figsize=(200 / 72, 100 / 72))
        axes = figure.add_subplot()
        axes.plot([1, 2], [3, 4], color=figures.MARKS[0], linestyle="--")
        axes.plot([1], [3], "D", mfc=figures.PAGE, mec=figures.MARKS[1])
        axes.set_yticks([3.5], ["$a_1$ id=\"b\" #ffffff <c> & 'd'\nsecond"], color=figures.INK)
        return figure


def test_equal_figures_give_equal_bytes_whatever_the_users_settings(monkeypatch):
    import matplotlib

    before = draw_something()
    svg, png = figures.to_svg(before), figures.to_png(before)
    with matplotlib.rc_context(
        {"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9, "savefig.dpi": 11, "svg.hashsalt": "x"}
    ):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
        after = draw_something()
        assert figures.to_svg(after) == svg
        assert figures.to_png(after) == png
    assert "<dc:date>" not in svg


def test_an_svg_in_the_page_follows_it():
    element = figures.to_inline_svg(figures.to_svg(draw_something()), "one")
    assert element.startswith("<svg ")
    assert 'width="200" height="100" viewBox="0 0 200 100"' in element
    tags = "".join(part.split(">")[0] for part in element.split("<"))
    assert not [colour for pair in figures.PALETTE.values() for colour in pair if colour in tags]
    assert {"var(--mark-1)", "var(--mark-2)", "var(--page)", "var(--ink)"} <= set(re.findall(r"var\(--[\w-]+\)", tags))
    assert "font-family" not in tags
    assert "DejaVu" not in tags
    assert "<style" not in element
    assert 'id="figure' not in element
    assert "$a_1$ id=\"b\" #ffffff &lt;c&gt; &amp; 'd'" in element
