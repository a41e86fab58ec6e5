"""Colours that colour-blind readers can tell apart, labels that do not overlap, numbers on axes."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from sparselet.report import sheet

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
    marks = [pair[SCHEMES[scheme]] for name, pair in sheet.COLOURS.items() if name.startswith("mark")]
    assert len(marks) == 6
    for one, other in itertools.combinations(marks, 2):
        apart = np.linalg.norm(lab(VISIONS[vision] @ linear(one)) - lab(VISIONS[vision] @ linear(other)))
        assert apart > 20, (one, other)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_contrast_with_the_page(scheme):
    colours = {name: pair[SCHEMES[scheme]] for name, pair in sheet.COLOURS.items()}
    for name, colour in colours.items():
        least = 4.5 if name in ("ink", "muted") else 3 if name.startswith("mark") else 0
        assert contrast(colour, colours["page"]) >= least, name


def test_a_light_colour_stands_for_one_variable():
    light = [pair[0] for pair in sheet.COLOURS.values()]
    assert len(set(light)) == len(light)


numbers = st.floats(-100, 300).map(lambda number: round(number, 2))
things = st.lists(st.tuples(numbers, st.floats(1, 40)), min_size=1, max_size=8).map(sorted)


@given(things)
def test_things_are_moved_apart_within_their_room(things):
    wanted, sizes = [w for w, _ in things], [s for _, s in things]
    middles = sheet.apart(wanted, sizes, 0.0, 400.0)
    ends = [(m - s / 2, m + s / 2) for m, s in zip(middles, sizes, strict=True)]
    assert all(before[1] <= after[0] + 1e-6 for before, after in itertools.pairwise(ends))
    assert ends[0][0] >= -1e-6
    assert ends[-1][1] <= 400 + 1e-6


@given(things)
def test_nothing_is_moved_further_than_need_be(things):
    """No small move of neighbours together that the rules allow makes the sum of squares smaller."""
    wanted, sizes = np.array([w for w, _ in things]), np.array([s for _, s in things])
    middles = np.array(sheet.apart(list(wanted), list(sizes), 0.0, 400.0))
    gaps = (sizes[1:] + sizes[:-1]) / 2
    found = ((middles - wanted) ** 2).sum()
    for first, last in itertools.combinations(range(len(things) + 1), 2):
        for step in (-0.5, 0.5):
            moved = middles.copy()
            moved[first:last] += step
            ends = moved[0] - sizes[0] / 2, moved[-1] + sizes[-1] / 2
            if (np.diff(moved) >= gaps).all() and ends[0] >= 0 and ends[1] <= 400:
                assert ((moved - wanted) ** 2).sum() >= found - 1e-6


def test_things_with_room_enough_stay():
    assert sheet.apart([10, 50, 90], [10, 10, 10], 0, 100) == [10, 50, 90]
    assert sheet.apart([], [], 0, 100) == []


def test_things_that_do_not_fit_run_over_the_end():
    assert sheet.apart([50, 50], [80, 80], 0, 100) == [40, 120]


@pytest.mark.parametrize(
    ("number", "told"),
    [(1e-5, "1e-5"), (2.5e-4, "2.5e-4"), (0.001, "0.001"), (0.05, "0.05"), (0, "0"), (12, "12"), (-5, "-5")],
)
def test_small_numbers_on_axes(number, told):
    assert sheet.short(number) == told


@pytest.mark.parametrize(("number", "told"), [(20_000, "20k"), (300_000, "300k"), (2_650_000, "2.65M"), (3.8e9, "3.8G")])
def test_large_numbers_on_axes(number, told):
    assert sheet.short(number) == told


@pytest.mark.parametrize("log", [False, True])
def test_an_axis_goes_from_end_to_end(log):
    axis = sheet.Axis(0.01, 1.0, 200.0, 50.0, log)
    assert axis.at(0.01) == pytest.approx(200)
    assert axis.at(1.0) == pytest.approx(50)
    assert axis.at(0.1 if log else 0.505) == pytest.approx(125)
    assert sheet.Axis(3, 3, 0, 10, log).at(3) == 5


def test_ticks_without_room_lose_their_number_but_not_the_ends():
    axes = sheet.sheet(100, 50)
    sheet.x_ticks(axes, sheet.Axis(0.01, 1.0, 10, 90, log=True), [0.01, 0.2, 0.5, 0.8, 1.0], 10, "density")
    assert {found.get_text() for found in axes.texts} == {"0.01", "0.2", "1", "density"}
    assert len(axes.lines) == 5


def drawn() -> Figure:
    axes = sheet.sheet(200, 100)
    with sheet.plain():
        sheet.line(axes, [(10, 10), (190, 90)], sheet.MARKS[0], dashed=True)
        sheet.dot(axes, (100, 50), sheet.Style(sheet.MARKS[1], "D"), hollow=True)
        sheet.text(axes, 20, 80, "$a_1$ id=\"b\" #ffffff <c> & 'd'\nsecond", bold=True)
    return axes.figure  # pyright: ignore[reportReturnType]


def test_equal_sheets_give_equal_bytes_whatever_the_users_settings(monkeypatch):
    import matplotlib

    before = drawn()
    svg, png = sheet.svg(before), sheet.png(before)
    with matplotlib.rc_context(
        {"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9, "savefig.dpi": 11, "svg.hashsalt": "x"}
    ):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
        after = drawn()
        assert sheet.svg(after) == svg
        assert sheet.png(after) == png
    assert "<dc:date>" not in svg


def test_an_svg_in_the_page_follows_it():
    element = sheet.inline(sheet.svg(drawn()), "one")
    assert element.startswith("<svg ")
    assert 'width="200" height="100" viewBox="0 0 200 100"' in element
    tags = "".join(part.split(">")[0] for part in element.split("<"))
    assert not [colour for pair in sheet.COLOURS.values() for colour in pair if colour in tags]
    assert {"var(--mark-1)", "var(--mark-2)", "var(--page)", "var(--ink)"} <= set(re.findall(r"var\(--[\w-]+\)", tags))
    assert "font-family" not in tags
    assert "DejaVu" not in tags
    assert "<style" not in element
    assert 'id="figure' not in element
    assert "$a_1$ id=\"b\" #ffffff &lt;c&gt; &amp; 'd'" in element
