"""studies/recipes.toml can be planned, and its arms are of one size."""

from pathlib import Path

import pytest

from sparselet.studies.settings import read_study
from sparselet.studies.study import Study
from sparselet.studies.tables import make_tables
from sparselet.training.learning_rate import RATE_AT_WIDTH
from sparselet.training.settings import TrainSettings

FILE = Path(__file__).parents[2] / "studies" / "recipes.toml"


@pytest.mark.parametrize("preset", ["sweep", "short", "finalists"])
def test_every_preset_can_be_planned(preset):
    settings = read_study(FILE, preset)
    data = {task: {"train": f"train {task}", "test": f"test {task}"} for task in (*settings.held_in, *settings.held_out)}
    tables = make_tables(Study(settings, data, "base"))
    assert list(tables) == list(settings.tables)
    rows = {name: arm.get("learning_rates", ()) for name, arm in settings.arms.items()}
    if preset == "sweep":
        assert len(tables["sweep"].rows) == sum(max(1, len(rates)) for rates in rows.values())
    assert all(arm["learning_rate"] in (rows[name] or [arm["learning_rate"]]) for name, arm in settings.arms.items())


def test_the_arm_called_default_is_a_training_without_flags():
    arm = read_study(FILE).arms["default"]
    plain = TrainSettings(task=("task",))
    for name in ("method", "when", "score", "balance", "block_size", "target_modules", "density", "merge_noise"):
        assert arm.get(name, getattr(plain, name)) == getattr(plain, name), name
    assert arm["learning_rate"] == RATE_AT_WIDTH[plain.method]
