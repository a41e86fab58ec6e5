"""The study's tables in docs/results.md, from its results."""

import json
import re
import sys
from pathlib import Path

import pytest
from helpers.made_results import cost, results

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def tables():
    """benchmarks/tables.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import tables

        yield tables
        for name in ("tables", "study_tables"):
            sys.modules.pop(name, None)


@pytest.fixture
def fill(tables, tmp_path, monkeypatch):
    """A page with the study's place, filled from these results."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)

    def filled(given, spent=None):
        directory = tmp_path / "benchmarks/results"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "study_small.json").write_text(json.dumps(given))
        if spent is not None:
            (directory / "study_small_cost.json").write_text(json.dumps(spent))
        return tables.fill("before\n<!-- study_small -->\nold\n<!-- /study_small -->\nafter\n")

    return filled


def rows(page: str, title: str) -> dict[str, list[str]]:
    """The rows of a table of the page, by label."""
    part = page.split(f"**{title}**")[1].split("\n**")[0]
    found = [
        [text.strip() for text in re.split(r"(?<!\\)\|", line)[1:-1]] for line in part.splitlines() if line.startswith("|")
    ]
    assert len({len(row) for row in found}) == 1
    return {row[0]: row[1:] for row in found[2:]}


def test_every_number_stands_in_its_table(fill):
    given = results()
    page = fill(given, cost())
    for table in given["tables"].values():
        shown = rows(page, table["title"])
        assert list(shown) == [row["label"] for row in table["rows"]]
        for row in table["rows"]:
            ours = [text for text in shown[row["label"]] if not text.startswith("*")]
            for cell in row["cells"]:
                if cell and cell["mean"] is not None and cell["measure"] != "percent":
                    assert any(text.startswith(f"{cell['mean']:.1f}") for text in ours)
                if cell and cell["paper"] is not None:
                    form = ".2f" if cell["measure"] == "percent" and cell["paper"] < 10 else ".1f"
                    assert f"*{cell['paper']:{form}}*" in shown[row["label"]]
        assert table["note"] in page
    assert rows(page, "Merged models")["full, breadcrumbs"] == [
        "30.8 ± 6.5",
        "*39.4*",
        "– (3 missing)",
        "*25.3*",
        "100.0",
        "*100.0*",
    ]
    assert rows(page, "Quality against density")["base model"][0] == ""


def test_claims_and_what_was_run(fill):
    page = fill(results(), cost())
    assert page.startswith(
        f"before\n<!-- study_small -->\n`{cost()['command']}`\n\n2026-11-22, AMD EPYC, 2 cores; python 3.11.2"
    )
    assert page.endswith("<!-- /study_small -->\nafter\n")
    assert "; 87 min, 2.7 core-hours, at most 2.3 GB in one process.\n" in page
    assert "6 held-in and 3 held-out tasks: 84 trainings, 61 merges, 702 evaluations; 5 of them have no result." in page
    assert "tasks than merged LoRA. | Section 4.2, Table 1 | holds | +6.1 (+1.9 to +10.4) |" in page
    assert f"| undecided | −2.8 (−9.0 to +3.1) | {results()['claims'][1]['where']} |" in page
    assert "| not tested |  |" in page


def test_a_part_of_a_study_has_its_own_claims_alone(fill):
    given = results()
    whole = fill(given, cost()).count("| not tested |")
    given["claims"] += [{**given["claims"][0], "verdict": "not tested", "why": "the study has no elsewhere: row / column."}] * 2
    page = fill(given, cost())
    assert page.count("| not tested |") == whole
    assert "\n\n2 more claims are about other parts of the study.\n" in page


def test_without_its_cost_the_tables_stand_alone(fill):
    page = fill(results())
    assert page.startswith("before\n<!-- study_small -->\npackaged:smollm2-135m, 6 held-in and 3 held-out tasks: 84")
    assert page.count("|") == fill(results(), cost()).count("|")


def test_a_bar_in_a_name_is_no_column(fill):
    given = results()
    given["tables"]["merging"]["rows"][0]["label"] = "a | b"
    assert r"a \| b" in rows(fill(given), "Merged models")


def test_a_study_that_was_not_run_says_so(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert "Not measured yet.\n<!-- /study_small -->" in tables.fill("<!-- study_small -->\n\n<!-- /study_small -->\n")
