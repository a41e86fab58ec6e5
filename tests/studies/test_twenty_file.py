"""studies/twenty.toml can be planned, each of its claims names cells of its table, and its numbers are as the table says."""

from dataclasses import replace
from pathlib import Path

import pytest

from sparselet.errors import SparseletError
from sparselet.studies.many_experts import MANY_CLAIMS
from sparselet.studies.numbers import cell_number
from sparselet.studies.settings import read_study
from sparselet.studies.study import Study
from sparselet.studies.tables import make_tables
from sparselet.studies.verdicts import judge

FILE = Path(__file__).parents[2] / "studies" / "twenty.toml"


def table_of(preset, **changes):
    settings = replace(read_study(FILE, preset), **changes)
    data = {task: {split: f"{split} {task}" for split in ("train", "test", "all")} for task in settings.held_in}
    data |= {task: {"test": f"test {task}"} for task in settings.held_out}
    (table,) = make_tables(Study(settings, data, "base")).values()
    return settings, table


@pytest.mark.parametrize("preset", ["", "ten"])
def test_every_arm_number_and_merge_has_its_row(preset):
    settings, table = table_of(preset)
    largest = max(settings.n_experts)
    for arm in settings.finalists:
        for count in settings.n_experts:
            own, seen = table.rows[f"{arm}, {count}: own expert"], table.rows[f"{arm}, {count}: regmean"]
            assert len(seen[0].draws[0]) == len(own[0].draws[0]) == count
            assert (seen[3] is None) == (count < largest or not settings.held_out)
    assert (f"LoRA, QKV, {largest}: overlap" in table.rows, "default, 20: dare" in table.rows) == (False, False)
    routed = table.rows[f"default, {largest}: routed, 4 merges"]
    outside = routed[3].draws[0] if settings.held_out else ()
    assert {unit.subject for unit in outside} == set(settings.held_out)
    assert all(unit.splits == ("test",) and len(unit.experts) == largest for unit in routed[0].draws[0])
    by_change = table.rows[f"default, {largest}: routed, 4 merges by change"][0].draws[0]
    assert [unit.settings["by"] for unit in by_change] == ["change"] * largest
    assert all("by" not in unit.settings for unit in routed[0].draws[0])


def test_fewer_experts_have_the_merges_of_their_number_no_held_out_tasks_and_no_more_groups_than_experts():
    settings, table = table_of("", n_experts=(2, 20))
    assert ("LoRA, QKV, 20: overlap" in table.rows, "default, 2: dare" in table.rows) == (False, False)
    assert "default, 2: routed, 4 merges" not in table.rows
    assert all(table.rows[f"{arm}, 2: regmean"][3] is None for arm in settings.finalists)
    assert all(
        len(table.rows[f"{arm}, 2: {row}"][0].draws[0]) == 2 for arm in settings.finalists for row in ("own expert", "regmean")
    )


def test_kept_is_the_share_of_the_own_experts_gain_and_the_worst_task_the_lowest():
    _, table = table_of("")
    scores = {"base": 10.0, "default, 20: own expert": 60.0, "default, 20: regmean": 45.0}
    measures = {}
    for row, score in scores.items():
        units = table.rows[row][0].draws[0]
        measures |= {unit.key: {"rougeL": score + number} for number, unit in enumerate(units)}
    held_in, worst, kept, *_ = table.rows["default, 20: regmean"]
    assert cell_number(held_in, measures).mean == pytest.approx(45.0 + 9.5)
    assert cell_number(worst, measures).mean == 45.0
    assert cell_number(kept, measures).mean == pytest.approx(70.0)


def test_every_claim_names_its_cells():
    _, table = table_of("")
    measures = {
        unit.key: {"rougeL": 50.0 * (unit.label[:5] != "base,"), "right": 100.0, "unsure": 0.0} for unit in table.units()
    }
    numbers = {row: tuple(cell and cell_number(cell, measures) for cell in cells) for row, cells in table.rows.items()}
    for claim in MANY_CLAIMS:
        verdict = judge(claim, {"many_experts": table}, {"many_experts": numbers})
        assert verdict.verdict in ("holds", "undecided"), claim.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("[study.merges.a]\nmask = 'full'", "merges.a: method is missing"),
        ("[study.merges.a]\nmethod = 'regmeen'", "merges.a: no merge method is called 'regmeen'"),
        ("[study.merges.a]\nmethod = 'overlap'\narms = ['b']", "merges.a: arms names 'b'"),
        ("[study.merges.a]\nmethod = 'regmean'\nsize = 3", "merges.a: .*size"),
        ("[preset.wide]\ngroups = [20]", "groups must be above 1 and below the 20 experts"),
    ],
)
def test_wrong_merges_and_groups_are_refused_by_name(changes, message, tmp_path):
    (tmp_path / "study.toml").write_text(f"{FILE.read_text()}\n{changes}\n")
    with pytest.raises(SparseletError, match=message):
        read_study(tmp_path / "study.toml", "wide" if "wide" in changes else "")
