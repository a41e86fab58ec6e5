"""results.json: all numbers once, the same bytes for the same results."""

import json

import pytest
from helpers.plans import by_hash, made, measured

from sparselet.io.json_files import json_bytes
from sparselet.studies.results import make_results
from sparselet.studies.tables import make_tables

STUDY = made()
TABLES = make_tables(STUDY)
FOUND = measured(TABLES, by_hash)


def test_the_same_results_give_the_same_bytes_in_any_order():
    told = json_bytes(make_results(STUDY, TABLES, FOUND))
    again = make_tables(made())
    assert json_bytes(make_results(made(), again, dict(reversed(FOUND.items())))) == told
    assert json_bytes(json.loads(told)) == told
    other = FOUND | {next(iter(FOUND)): dict.fromkeys(("rougeL", "parameters", "active_layers"), 0.0)}
    assert json_bytes(make_results(STUDY, TABLES, other)) != told


def test_every_table_and_cell_is_there():
    told = make_results(STUDY, TABLES, FOUND)
    assert list(told["tables"]) == list(TABLES)
    for name, table in told["tables"].items():
        assert set(table) == {"title", "source", "note", "columns", "charts", "rows"}
        assert [row["label"] for row in table["rows"]] == list(TABLES[name].rows)
        for row in table["rows"]:
            assert len(row["cells"]) == len(table["columns"])
            for cell in row["cells"]:
                if cell is not None:
                    assert set(cell) == {"mean", "error", "count", "tasks", "missing", "measure", "paper"}
                    assert cell["mean"] is not None
    assert {c["kind"] for table in told["tables"].values() for c in table["charts"]} == {"lines", "dots"}


def test_numbers_are_those_of_the_units():
    told = make_results(STUDY, TABLES, FOUND)
    cells = dict(zip(told["tables"]["scores"]["columns"], told["tables"]["scores"]["rows"][0]["cells"], strict=True))
    merged = STUDY.merge(STUDY.experts(), "overlap")[0]
    expected = {task: FOUND[STUDY.score(merged, task).key]["rougeL"] for task in STUDY.settings.held_out}
    assert cells["held-out"]["tasks"] == expected
    assert cells["held-out"]["mean"] == pytest.approx(sum(expected.values()) / 3)
    assert (cells["individual"]["paper"], cells["held-in"]["paper"]) == (77.54, 51.44)


def test_sizes_are_percentages_of_full_fine_tuning():
    found = measured(TABLES, lambda unit: 200.0 if unit.kind == "train" and unit.settings.method == "full" else 5.0)
    rows = {row["label"]: row["cells"][0] for row in make_results(STUDY, TABLES, found)["tables"]["merging"]["rows"]}
    assert rows["full, ties"]["mean"] == 100.0
    assert rows["element-sparse, overlap"]["mean"] == 2.5
    assert {cell["measure"] for cell in rows.values()} == {"percent"}


def test_the_study_and_its_tasks_are_told():
    told = make_results(STUDY, TABLES, FOUND)
    assert told["tasks"]["one"] == {"held": "in", "fingerprint": "test one", "train_fingerprint": "train one"}
    assert told["tasks"]["five"] == {"held": "out", "fingerprint": "test five"}
    assert told["base"] == "base"
    assert told["settings"]["held_in"] == list(STUDY.settings.held_in)
    assert told["settings"]["full_merges"]["ties"]["scale"] == 0.5
    kinds = [unit.kind for unit in _plan().values()]
    assert told["units"] == {**{kind: kinds.count(kind) for kind in ("train", "merge", "evaluate")}, "missing": 0}


def test_what_is_missing_is_told():
    lost = STUDY.score(STUDY.experts()[0]["one"], "one").key
    told = make_results(STUDY, TABLES, {key: value for key, value in FOUND.items() if key != lost})
    assert told["units"]["missing"] == 1
    cells = [row["cells"][0] for row in told["tables"]["scores"]["rows"]]
    assert [cell["missing"] for cell in cells] == [1] + [0] * (len(cells) - 1)
    verdicts = {claim["text"]: claim for claim in told["claims"]}
    assert verdicts["MCS makes the best single experts of all scores."]["verdict"] == "not tested"
    assert verdicts["MCS makes the experts that merge best, on held-in tasks."]["verdict"] != "not tested"
    nothing = make_results(STUDY, TABLES, {})
    assert {claim["verdict"] for claim in nothing["claims"]} == {"not tested"}
    assert nothing["units"]["missing"] == len(FOUND)
    json_bytes(nothing)


def test_a_study_of_few_tables_tests_few_claims():
    tables = make_tables(made(tables=("scores",)))
    told = make_results(made(tables=("scores",)), tables, measured(tables, by_hash))
    tested = [claim["source"] for claim in told["claims"] if claim["verdict"] != "not tested"]
    assert tested
    assert all("Table 2" in source for source in tested)


def _plan():
    from sparselet.studies.engine.unit import closure

    return closure(unit for table in TABLES.values() for unit in table.units())
