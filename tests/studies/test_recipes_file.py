"""studies/recipes.toml can be planned, and its arms are of one size."""

from pathlib import Path

import pytest

from sparselet.studies.settings import read_study
from sparselet.studies.study import Study
from sparselet.studies.tables import make_tables

FILE = Path(__file__).parents[2] / "studies" / "recipes.toml"


@pytest.mark.parametrize("preset", ["sweep", "finalists"])
def test_every_preset_can_be_planned(preset):
    settings = read_study(FILE, preset)
    data = {task: {"train": f"train {task}", "test": f"test {task}"} for task in (*settings.held_in, *settings.held_out)}
    tables = make_tables(Study(settings, data, "base"))
    assert list(tables) == list(settings.tables)
    rows = {name: arm.get("learning_rates", ()) for name, arm in settings.arms.items()}
    if preset == "sweep":
        assert len(tables["sweep"].rows) == sum(map(len, rows.values()))
    assert all(arm["learning_rate"] in rows[name] for name, arm in settings.arms.items())
