"""The report of a study says what its results say, and is the same for the same results."""

import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from helpers.made_results import cost, results

from sparselet.errors import UnsafePath
from sparselet.report import charts
from sparselet.report.study_page import write_report


class Tables(HTMLParser):
    """Every table of a page as rows of texts, by the label of the box that it is in; and the page's text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.text, self._label, self._cell = "", "", None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "div":
            self._label = dict(attrs).get("aria-label") or ""
        elif tag == "tr":
            self.tables.setdefault(self._label, []).append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[self._label][-1].append(" ".join((self._cell or "").split()))
            self._cell = None

    def handle_data(self, data):
        self.text += data
        if self._cell is not None:
            self._cell += data


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    directory = tmp_path_factory.mktemp("study")
    write_report(directory, results(), cost())
    return directory


@pytest.fixture(scope="module")
def page(out):
    return Tables((out / "report.html").read_text())


def small(**changes) -> dict:
    """Results with one table."""
    given = results()
    return {**given, "tables": {"selection": given["tables"]["selection"]}, **changes}


def test_every_number_of_every_table_is_told(page):
    for table in results()["tables"].values():
        shown = {row[0]: row[1:] for row in page.tables[f"Table: {table['title']}"]}
        beside = [
            any(r["cells"][j] and r["cells"][j]["paper"] is not None for r in table["rows"])
            for j in range(len(table["columns"]))
        ]
        for row in table["rows"]:
            wanted = []
            for cell, paper in zip(row["cells"], beside, strict=True):
                wanted += [told(cell)] + ([paper_of(cell)] if paper else [])
            assert shown[row["label"]] == wanted


def told(cell) -> str:
    if cell is None:
        return ""
    mean = "–" if cell["mean"] is None else shown_as(cell["mean"], cell["measure"])
    error = f" ± {cell['error']:.1f}" if cell["error"] else ""  # none of a percentage in these results
    return mean + error + (f" ({cell['missing']} missing)" if cell["missing"] else "")


def paper_of(cell) -> str:
    return "" if cell is None or cell["paper"] is None else shown_as(cell["paper"], cell["measure"])


def shown_as(number: float, measure: str) -> str:
    return f"{number:.2f}" if measure == "percent" and number < 10 else f"{number:.1f}"


def test_errors_have_as_many_decimals_as_their_means(tmp_path):
    given = small()
    cells = [row["cells"][0] for row in given["tables"]["selection"]["rows"]]
    cells[0] |= {"measure": "percent", "mean": 10.5, "error": 5.25}
    cells[1] |= {"measure": "percent", "mean": -2.375, "error": 0.125, "paper": 20.61}
    found = Tables(write_report(tmp_path, given, {}).read_text()).tables["Table: Selecting once or again and again"]
    assert [row[1:] for row in found[2:]] == [["10.5 ± 5.2", ""], ["−2.38 ± 0.12", "20.6"]]


def test_parameters_are_whole_and_nothing_is_minus_zero(tmp_path):
    given = small()
    cells = [row["cells"][0] for row in given["tables"]["selection"]["rows"]]
    cells[0] |= {"measure": "parameters", "mean": 2654321.4, "error": 0.0, "tasks": {}}
    given["claims"][0] |= {"difference": -0.04, "low": -1.0, "high": 0.01}
    page = Tables(write_report(tmp_path, given, {}).read_text())
    assert page.tables["Table: Selecting once or again and again"][1][1] == "2,654,321"
    assert "0.0 (−1.0 to 0.0)" in " ".join(page.text.split())


def test_every_task_of_every_cell_is_told(page):
    for table in results()["tables"].values():
        for j, column in enumerate(table["columns"]):
            cells = {
                row["label"]: row["cells"][j]["tasks"] for row in table["rows"] if row["cells"][j] and row["cells"][j]["tasks"]
            }
            if cells:
                head, *rows = page.tables[f"{table['title']} by task: {column}"]
                for label, *shown in rows:
                    assert shown == [f"{cells[label][task]:.1f}" for task in head[1:]]
                assert len(rows) == len(cells)


def test_claims_are_told_with_a_word_and_an_interval(page):
    text = " ".join(page.text.split())
    assert "1 holds, 1 undecided, 1 not tested." in text
    for claim in results()["claims"]:
        assert claim["text"] in text
        assert f"{claim['source']} · {claim['where']} · {claim['why']}" in text
    assert "✓ holds +6.1 (+1.9 to +10.4)" in text
    assert "? undecided −2.8 (−9.0 to +3.1)" in text
    assert "– not tested Sparse experts" in text


def test_what_was_run_is_told(page):
    text = " ".join(page.text.split())
    wanted = ["preset small on packaged:smollm2-135m", "6 held-in tasks", "3 held-out tasks", "5 of them have no result"]
    wanted += ["Run on 2026-11-22 in 87 min.", "core-hours2.74", "2.3 GB", "torch2.13.0+cpu", cost()["command"], "5c" * 32]
    assert [part for part in wanted if part.replace(" ", "") not in text.replace(" ", "")] == []
    assert json.dumps(results()["settings"], indent=2) in page.text
    assert page.tables["Cost"][1:] == [
        ["train", "84", "1 h 57 min", "2 h 02 min"],
        ["merge", "61", "0 s", "0 s"],
        ["evaluate", "697", "40 min", "42 min"],
    ]
    assert ["sentiment", "in", "00" * 16] in page.tables["Tasks"]


def test_the_same_results_give_the_same_bytes(out, tmp_path):
    write_report(tmp_path, json.loads(json.dumps(results())), cost())
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((out / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)
    assert str(out) not in (out / "report.html").read_text()


def test_each_chart_is_a_file(out):
    names = {path.name for path in (out / "figures").iterdir()}
    assert names == {f"{table}.{kind}" for table in results()["tables"] for kind in ("png", "svg")}
    for path in (out / "figures").glob("*.svg"):
        assert ElementTree.fromstring(path.read_text()).tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(--" not in path.read_text()
    for path in (out / "figures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_all_charts_of_a_measure_have_one_scale():
    tables = results()["tables"]
    ranges = charts.scales(tables.values())
    cells = [cell for table in tables.values() for row in table["rows"] for cell in row["cells"] if cell]
    for measure, (low, high) in ranges.items():
        means = [cell["mean"] for cell in cells if cell["measure"] == measure and cell["mean"] is not None]
        assert low <= min(means) < max(means) <= high
    assert set(ranges) == {"rougeL", "active_layers"}
    assert ranges["active_layers"][0] == 0


def test_a_name_looks_alike_in_all_charts():
    tables = results()["tables"]
    shared = charts.shared_styles([(table, chart) for table in tables.values() for chart in table["charts"]])
    assert {"individual", "held-in", "held-out"} <= set(shared)
    assert len({style.colour for style in shared.values()}) == len(shared)


@pytest.mark.parametrize("missing", ["all", *cost()])
def test_what_the_cost_does_not_say_is_left_out(tmp_path, missing):
    given = {} if missing == "all" else {key: value for key, value in cost().items() if key != missing}
    text = write_report(tmp_path, small(), given).read_text()
    assert "None" not in text
    assert ("core-hours" in text) == ("core_hours" in given)
    assert ("wall time" in text) == ("wall_seconds" in given)


def test_a_wall_time_that_is_not_known_is_left_out(tmp_path):
    text = write_report(tmp_path, small(), {**cost(), "wall_seconds": None}).read_text()
    assert "wall time" not in text
    assert "Run on 2026-11-22." in text


def test_a_study_without_any_result_yet_has_a_page(tmp_path):
    given = results()
    for table in given["tables"].values():
        for cell in (cell for row in table["rows"] for cell in row["cells"] if cell):
            cell |= {"mean": None, "error": None, "tasks": {}, "missing": 6}
    text = write_report(tmp_path, given, {}).read_text()
    assert text.count("(6 missing)") > 50
    assert "<figure" not in text
    assert not list(tmp_path.glob("figures/*"))


def test_a_study_without_claims_has_a_page(tmp_path):
    assert "Claims" not in write_report(tmp_path, small(claims=[]), {}).read_text()


def test_a_table_that_is_no_file_name_is_refused(tmp_path):
    given = results()["tables"]["selection"]
    with pytest.raises(UnsafePath, match="path parts are not allowed"):
        write_report(tmp_path, small(tables={"../selection": given}), {})


def test_several_charts_of_a_table_have_a_number_each(tmp_path):
    given = results()["tables"]["selection"]
    write_report(tmp_path, small(tables={"selection": {**given, "charts": given["charts"] * 2}}), {})
    assert {path.name for path in (tmp_path / "figures").glob("*.svg")} == {"selection-1.svg", "selection-2.svg"}
