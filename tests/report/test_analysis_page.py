"""The page of an analysis: whole, escaped, the same twice; its figures at both widths in the page's colours."""

import re

import pytest
from helpers.browser import Browser, find

from sparselet.report.analysis_page import Picture, Section, write_page
from sparselet.report.charts import NARROW, WIDE
from sparselet.report.diagrams import cloud, curves, heat_map
from sparselet.report.figures import to_svg
from sparselet.result_table import ResultTable

NAMES = [f"projection-{i}" for i in range(4)]
LINES = {f"series {k}": [(0.1, 10.0 + k, 5.0 + k, 20.0 + k), (1, 20.0 + k, 15, 25), (50, 40 + k, 30, 50)] for k in range(6)}


def pictures():
    values = [[None if i == j else i + j / 2 for j in range(4)] for i in range(4)]
    texts = [[f"{i}.{j}\n(chance)" for j in range(4)] for i in range(4)]
    layers = [str(i) for i in range(40)]
    return [
        Picture(
            lambda width: curves(LINES, width, x_label="%", y_label="y", log=True, levels={"all": 50.0, "base": 4.0}), "Lines"
        ),
        Picture(lambda width: heat_map(NAMES, layers, [[0.0] * 40] * 4, width, x_label="layer"), "Map"),
        Picture(lambda width: heat_map(NAMES, NAMES, values, width, texts=texts), "Matrix"),
        Picture(lambda width: cloud({"a": [(0.1, 2.0), (0.2, 3.0)], "b": []}, width, x_label="x", y_label="y"), "Cloud"),
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    table = ResultTable("a <b> table", ("", "x"), (("name & co", 1.25), ("escape\x1b[2J", 2.0)))
    sections = [Section("First <i>", "What & why.", pictures(), table), Section("Second", "", [], None)]
    return write_page(tmp_path_factory.mktemp("pages") / "page.html", "Title <script>", "Lead", sections)


def test_the_page_needs_no_other_file_and_escapes_what_it_shows(page, tmp_path):
    html = page.read_text()
    assert "<script" not in html
    assert "\x1b" not in html
    assert not re.search(r'(src|href)="(?!#|data:)', html)
    for text in ("Title &lt;script&gt;", "a &lt;b&gt; table", "name &amp; co", "1.2"):
        assert text in html
    body = html[html.index("<body>") :]
    assert body.count('<svg class="wide"') == body.count('<svg class="narrow"') == 4
    assert not re.search(r"#[0-9a-f]{6}", body)  # colours are the page's, light or dark


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_figures_have_the_width_they_are_drawn_for_and_are_the_same_twice(width):
    for picture in pictures():
        first, second = (to_svg(picture.draw(width)) for _ in range(2))
        assert first == second
        assert f'width="{width}pt"' in first


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page_without_scrolling_sideways(page, tmp_path, width, dark):
    program = find()
    if program is None:
        pytest.skip("no Chromium is found; install one (Debian: chromium), or name it in $CHROMIUM")
    browser = Browser(program, tmp_path / "profile")
    try:
        browser.open(page, width, dark=dark)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        shown = (
            "[...document.querySelectorAll('figure svg')].filter(s => s.checkVisibility() && s.getClientRects().length).length"
        )
        assert browser.evaluate(shown) == 4
    finally:
        browser.close()
