"""A second task, and the settings of a short run of any method."""

import pytest
from helpers.paper import PAPER
from helpers.tiny import save_task

from sparselet.training import TrainSettings


@pytest.fixture(scope="session")
def other_task(tmp_path_factory):
    """A second task, with fewer rows."""
    return save_task(tmp_path_factory.mktemp("tasks") / "shorter", train=5, validation=2)


@pytest.fixture(scope="session")
def settings_of(base_dir, task_dir, other_task):
    """Settings of a method: two epochs of six steps, or of nine on two tasks."""

    def of(method, **changes):
        selected = PAPER if "init_from" not in changes else {}
        own = {"sparse": selected, "lora": {"lora_rank": 2}, "multitask": {"task": (task_dir, other_task)}}.get(method, {})
        common = {"model": base_dir, "task": task_dir, "epochs": 2, "batch_size": 2, "learning_rate": 5e-3}
        return TrainSettings(method=method, **{**common, **own, **changes})

    return of
