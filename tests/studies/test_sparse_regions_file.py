"""studies/sparse_regions.toml can be planned, and each of its claims names cells of its tables."""

from pathlib import Path

import pytest

from sparselet.studies.numbers import Number
from sparselet.studies.settings import read_study
from sparselet.studies.sparse_regions.claims import REGION_CLAIMS
from sparselet.studies.study import Study
from sparselet.studies.tables import OF_ATTENTION, OF_REGIONS, make_tables
from sparselet.studies.verdicts import judge

FILE = Path(__file__).parents[2] / "studies" / "sparse_regions.toml"


def tables_of(preset):
    settings = read_study(FILE, preset)
    data = {task: {split: f"{split} {task}" for split in ("train", "test", "all")} for task in settings.held_in}
    return make_tables(Study(settings, data, "base"))


@pytest.mark.parametrize("preset", ["", "quick"])
def test_every_table_is_planned_and_every_claim_names_its_cells(preset):
    tables = tables_of(preset)
    assert tuple(tables) == tuple(name for name in OF_REGIONS if preset != "quick" or name not in OF_ATTENTION)
    numbers = {
        name: {
            row: tuple(cell and Number(1.0, 0.0, 3, {unit.subject: 1.0 for unit in cell.draws[0]}, 0) for cell in cells)
            for row, cells in table.rows.items()
        }
        for name, table in tables.items()
    }
    for claim in REGION_CLAIMS:
        verdict = judge(claim, tables, numbers)
        if not {pair[0].table for pair in claim.pairs} <= tables.keys():
            assert verdict.verdict == "not tested"
            continue
        assert (verdict.verdict, verdict.difference) == ("holds" if claim.margin else "undecided", 0), claim.text


def test_two_runs_of_a_task_are_compared_and_each_task_with_the_next():
    table = tables_of("")["overlaps"]
    seeds, tasks = (table.rows[f"all weights, {pair}"][0] for pair in ("two seeds", "two tasks"))
    assert [[unit.subject for unit in draw] for draw in seeds.draws] == [list(read_study(FILE).held_in)]
    for unit in seeds.draws[0]:
        first, second = unit.experts
        assert first.settings.tasks == second.settings.tasks == (unit.subject,)
        assert (first.settings.seed, second.settings.seed) == (0, 1)
    assert len(tasks.draws) == 2
    assert all(len({expert.settings.tasks for expert in unit.experts}) == 2 for draw in tasks.draws for unit in draw)
