"""The same study by Ray."""

import os
import signal
import sys
from pathlib import Path

import pytest
from units import results_of

from sparselet.errors import MissingExtra
from sparselet.study.on_ray import RayExecutor
from sparselet.study.perform import Places
from sparselet.study.run import run_study
from sparselet.study.store import Store


def ray_workers(parent):
    """Processes of Ray workers below this one that do a task now."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            continue
        if command.startswith("ray::perform"):
            found.append(int(directory.name))
    return found


def test_a_lost_worker_changes_nothing(undisturbed, places, units, tmp_path):
    """A Ray worker is killed in the middle, its task done again by another; results go to a URL."""
    pytest.importorskip("ray", reason="Ray has no package for this platform")
    wanted = [unit for unit in units if "third" in unit.label][:2]
    store, killed = Store(f"file://{tmp_path}/out"), []

    def watch(progress):
        if not killed and len(progress.done) >= 1:
            for process in ray_workers(os.getpid())[:1]:
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    executor = RayExecutor(store, places, workers=1)
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
        RayExecutor(Store(tmp_path), Places({}, ""))
