"""The same study by Ray."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.units import TASKS, make_score, results_of

from sparselet.errors import MissingExtra, WorkerFailed
from sparselet.studies.engine.job_runner import StudySources
from sparselet.studies.engine.on_ray import RayExecutor
from sparselet.studies.engine.run import run_study
from sparselet.studies.engine.store import Store


def ray_workers(parent):
    """Processes of Ray workers below this one that do a task now."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            continue
        if command.startswith("ray::run_job"):
            found.append(int(directory.name))
    return found


def test_a_lost_worker_changes_nothing(undisturbed, sources, units, tmp_path):
    """A Ray worker is killed in the middle, its task done again by another; results go to a URL."""
    pytest.importorskip("ray", reason="Ray has no package for this platform")
    wanted = [unit for unit in units if "third" in unit.label][:2]
    store, killed = Store(f"file://{tmp_path}/out"), []

    def watch(progress):
        if not killed and len(progress.done) >= 1:
            for process in ray_workers(os.getpid())[:1]:
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    executor = RayExecutor(store, sources, workers=1)
    progress = run_study(wanted, store, executor, watch)
    assert killed
    assert not progress.failed
    assert progress.done == set(progress.units)
    expected = results_of(undisturbed.path)
    found = results_of(tmp_path / "out")
    assert found == {name: data for name, data in expected.items() if Path(name).parts[1] in progress.units}


def test_without_ray_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"the executor ray needs Ray: pip install 'sparselet\[ray\]'"):
        RayExecutor(Store(tmp_path), StudySources({}, ""))


def test_a_cluster_that_is_not_there(monkeypatch, tmp_path):
    def refused(**settings):
        raise ConnectionError(f"nobody at {settings['address']}")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=refused))
    with pytest.raises(WorkerFailed, match=r"Ray cannot be started at 10\.0\.0\.1:6379: nobody at 10\.0\.0\.1:6379"):
        RayExecutor(Store(tmp_path), StudySources({}, ""), address="10.0.0.1:6379")


def test_a_job_that_is_always_lost_fails(monkeypatch, tmp_path, sources):
    """With Ray's part played by a stand-in that loses every task."""

    class Lost(Exception):
        pass

    def lose(task):
        raise Lost("the worker\ndied")

    asked = {}
    stand_in = SimpleNamespace(
        init=lambda **settings: asked.update(settings),
        cluster_resources=lambda: {"CPU": 9.0},
        remote=lambda **settings: asked.update(settings) or (lambda function: SimpleNamespace(remote=lambda *told: "task")),
        wait=lambda tasks, timeout: (tasks, []),
        get=lose,
        exceptions=SimpleNamespace(RayError=Lost),
        shutdown=lambda: asked.update(down=True),
    )
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    units, store = [make_score(sources, None, task) for task in TASKS], Store(tmp_path)
    executor = RayExecutor(store, sources, threads=2, gpus=0.5)
    assert (executor.slots, asked["address"], asked["num_cpus"], asked["num_gpus"]) == (4, "auto", 2, 0.5)
    progress = run_study(units, store, executor)
    assert progress.failed == {unit.key: "worker was lost, 3 times: the worker died" for unit in units}
    assert asked["down"]
