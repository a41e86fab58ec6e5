"""The report in a real browser: whole, silent, without the network, legible at two widths and in both schemes."""

from itertools import pairwise

import pytest
from helpers.browser import Browser, find
from helpers.made_results import cost, results

from sparselet.report.study_page import write_report

WIDTHS, SCHEMES = (1280, 400), (False, True)

# Everything that the tests ask of a page, in one go.
LOOK = """
(() => {
  const shown = element => element.checkVisibility() && element.getClientRects().length > 0;
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = colour => {
    const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = rgb(colour).slice(0, 3).map(c => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if ((rgb(colour)[3] ?? 1) > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const charts = [...document.querySelectorAll("figure svg")].filter(shown);
  const overlaps = [], outside = [], small = [];
  for (const chart of charts) {
    const box = chart.getBoundingClientRect(), scale = box.width / chart.viewBox.baseVal.width;
    const texts = [...chart.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect(), t]);
    texts.forEach(([text, a, node], i) => {
      const inside = a.left > box.left - 1 && a.right < box.right + 1 && a.top > box.top - 1 && a.bottom < box.bottom + 1;
      if (!inside) outside.push(text);
      if (parseFloat(getComputedStyle(node).fontSize) * scale < 10) small.push(text);
      for (const [other, b] of texts.slice(i + 1)) {
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 0.5 && high > 3) overlaps.push([text, other]);  // line boxes are higher than letters
      }
    });
  }
  let worst = [99, ""];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !shown(element)) continue;
    const style = getComputedStyle(element), inChart = element.ownerSVGElement;
    const found = contrast(inChart ? style.fill : style.color, behind(inChart ?? element));
    if (found < worst[0]) worst = [found, element.textContent.trim().slice(0, 60)];
  }
  const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
  const uses = [...document.querySelectorAll("use")];
  const boxes = [...document.querySelectorAll(".scroll")].filter(shown);
  return {
    window: innerWidth, scroll: document.documentElement.scrollWidth,
    charts: charts.map(c => [c.getBoundingClientRect().width, c.getBoundingClientRect().height, c.getAttribute("aria-label")]),
    allCharts: document.querySelectorAll("figure svg").length,
    drawn: charts.every(c => c.querySelectorAll("path, use").length > 3 && c.querySelectorAll("text").length > 3),
    dangling: uses.filter(use => !document.getElementById(use.getAttribute("href").slice(1))).length,
    images: [...document.images].filter(i => !i.naturalWidth).length,
    overlaps, outside, small, worst,
    page: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    twice: ids.filter((id, i) => ids.indexOf(id) !== i),
    deadLinks: [...document.querySelectorAll("a")].filter(a => !document.getElementById(a.hash.slice(1))).length,
    headings: [...document.querySelectorAll("h1, h2, h3, h4")].map(h => Number(h.tagName[1])),
    unreachable: boxes.filter(b => b.tabIndex !== 0 || !b.getAttribute("aria-label")).length,
    scrolled: boxes.filter(b => b.scrollWidth > b.clientWidth).length,
    nav: shown(document.querySelector("nav")),
    wide: shown(document.querySelector("figure svg.wide")),
  };
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find()
    if program is None:
        pytest.skip("no Chromium is found; install one (Debian: chromium), or name it in $CHROMIUM")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("study"), results(), cost())


@pytest.fixture(scope="module")
def seen(browser, page):
    """What the page looks like at each width and in each scheme, with all its parts unfolded; and what it did."""
    found = {}
    for width in WIDTHS:
        for dark in SCHEMES:
            browser.open(page, width, dark=dark)
            browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
            found[width, dark] = {**browser.evaluate(LOOK), "events": list(browser.events)}
    return found


each = pytest.mark.parametrize(("width", "dark"), [(width, dark) for width in WIDTHS for dark in SCHEMES])


@each
def test_the_page_is_silent_and_asks_nothing_of_the_network(seen, width, dark):
    events = seen[width, dark]["events"]
    told = [e for e in events if e["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")]
    assert not told
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [url for url in asked if url.endswith("/report.html")]
    assert len([url for url in asked if url.endswith("/report.html")]) == 1


@each
def test_every_chart_is_there_and_has_a_name(seen, width, dark):
    found = seen[width, dark]
    assert len(found["charts"]) == len(results()["tables"]) == found["allCharts"] / 2
    for wide, high, label in found["charts"]:
        assert wide > 300
        assert high > 80
        assert label.startswith("Chart of ")
    assert found["drawn"]
    assert not found["dangling"]
    assert not found["images"]


@each
def test_the_page_never_scrolls_sideways_but_its_tables_do(seen, width, dark):
    found = seen[width, dark]
    assert found["window"] == width
    assert found["scroll"] <= width
    assert found["scrolled"] > 0 or width > 400
    assert not found["unreachable"]  # by the keyboard


@each
def test_text_is_legible(seen, width, dark):
    found = seen[width, dark]
    assert found["worst"][0] >= 4.5, found["worst"]
    assert not found["overlaps"]
    assert not found["outside"]
    assert not found["small"]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_follows_the_scheme(seen, width):
    light, dark = seen[width, False], seen[width, True]
    assert light["page"] == "rgb(255, 255, 255)"
    assert sum(map(int, dark["page"][4:-1].split(","))) < 100
    assert light["ink"] != dark["ink"]


def test_structure(seen):
    found = seen[1280, False]
    assert not found["twice"]
    assert not found["deadLinks"]
    levels = found["headings"]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))


def test_the_keyboard_reaches_the_results(browser, page):
    browser.open(page, 1280)
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.className") == "skip"
    assert browser.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    browser.press("Enter")
    assert browser.evaluate("location.hash") == "#claims"


def test_paper_is_white_and_has_everything(browser, page):
    browser.open(page, 760, dark=True, media="print")
    found = browser.evaluate(LOOK)
    assert found["page"] == "rgb(255, 255, 255)"
    assert found["worst"][0] >= 4.5
    assert found["wide"]
    assert not found["nav"]


def test_hostile_names_are_shown_as_they_are(browser, tmp_path):
    name = '<script>alert("x")</script> & $\\frac{1}{2}$ id="y" #ffffff'
    given = results()
    table = given["tables"]["merging"]
    given["tables"] = {"merging": table}
    table["title"] = table["note"] = given["claims"][0]["text"] = given["name"] = name
    table["columns"][0] = name
    table["charts"][0]["columns"] = []
    table["rows"][0]["label"] = name
    table["rows"][0]["cells"][0]["tasks"] = {name: 1.0}
    given["tasks"][name] = {"held": "in", "fingerprint": name}
    browser.open(write_report(tmp_path, given, {**cost(), "command": name}), 1280)
    assert not [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert browser.evaluate("document.scripts.length") == 0
    shown = browser.evaluate("document.body.textContent")
    assert shown.count(name) >= 10
    texts = browser.evaluate("[...document.querySelectorAll('figure svg.wide text')].map(t => t.textContent).join(' ')")
    assert name in texts


@pytest.mark.parametrize("width", WIDTHS)
def test_many_and_long_names_do_not_overlap(browser, tmp_path, width):
    given = results()
    given["tables"] = {name: given["tables"][name] for name in ("scores", "n_experts")}
    for k, row in enumerate(given["tables"]["scores"]["rows"]):
        row["label"] = f"{k} a score whose description is much longer than any that one would wish for"
    given["tables"]["scores"]["columns"] = ["held-in tasks of the study", "held-out tasks of the study", "individual tasks"]
    chart = given["tables"]["n_experts"]["charts"][0]
    chart["series"] = [f"{name} of experts trained apart" for name in chart["series"]]
    for row in given["tables"]["n_experts"]["rows"]:  # all lines end at one point
        row["cells"][0] |= {"mean": 50.0, "error": 1.0}
    browser.open(write_report(tmp_path, given, cost()), width)
    found = browser.evaluate(LOOK)
    assert not found["overlaps"]
    assert not found["outside"]
    assert found["scroll"] <= width
