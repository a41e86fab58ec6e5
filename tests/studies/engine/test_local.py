"""Worker processes: killed, unable to start, and what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.units import InThisProcess, make_score, results_of

from sparselet.errors import WorkerFailed
from sparselet.studies.engine.jobs import stored
from sparselet.studies.engine.local import ATTEMPTS, LocalExecutor
from sparselet.studies.engine.run import lock_study, run_study
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.unit import closure, units_to_json

TESTS = Path(__file__).parents[2]

PARENT = """
import json, sys
sys.path[:0] = sys.argv[2:]
from sparselet.studies.engine.jobs import stored
from sparselet.studies.engine.local import LocalExecutor
from sparselet.studies.engine.job_runner import StudySources
from sparselet.studies.engine.run import lock_study, run_study
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.unit import units_to_json
from sparselet.studies.engine.unit import units_from_json
told = json.loads(sys.stdin.readline())
store, sources = Store(sys.argv[1]), StudySources(told["tasks"], told["model"])
with lock_study(store) as lock:
    executor = LocalExecutor(store, sources, 1, 1, lock)
    def watch(progress):
        print(json.dumps([len(progress.done), [worker.process.pid for worker in executor._workers]]), flush=True)
    run_study(units_from_json(told["units"]).values(), store, executor, watch)
"""


def test_whatever_is_killed_the_results_are_the_same(undisturbed, sources, units, tmp_path):
    """A worker is killed in the middle of a unit, later their parent; then the study goes on elsewhere to its end."""

    out, units = tmp_path / "out", units[:6]  # two trainings, the base model and a merge on three tasks
    keys = stored(closure(units).values())
    expected = {name: result for name, result in results_of(undisturbed.path).items() if name.split("/")[1] in keys}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(out), str(TESTS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    told = {"tasks": dict(sources.tasks), "model": sources.model, "units": units_to_json(units)}
    parent.stdin.write(json.dumps(told) + "\n")
    parent.stdin.flush()
    killed = []
    for line in parent.stdout:
        done, workers = json.loads(line)
        if done == 2 and not killed:
            killed = workers
            os.kill(workers[0], signal.SIGKILL)
        elif killed and workers and workers != killed and done >= 4:
            parent.kill()
            break
    parent.wait()
    assert killed
    store = Store(out)
    with lock_study(store):  # which the worker held until it ended
        assert not Path(f"/proc/{workers[0]}/cmdline").exists() or not Path(f"/proc/{workers[0]}/cmdline").read_bytes()
        before = results_of(out)
        progress = run_study(units, store, InThisProcess(store, sources))
    assert 0 < len(before) < len(expected)
    assert not progress.failed
    assert results_of(out) == expected


def stand_in(tmp_path, monkeypatch, script):
    """A worker that is a shell script."""
    file = tmp_path / "worker"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


def test_a_unit_whose_worker_always_dies_fails(sources, tmp_path, monkeypatch):
    stand_in(
        tmp_path,
        monkeypatch,
        'read a; echo "{\\"state\\": \\"ready\\"}"; read b; echo x >> "$0.count"; echo no room >&2; kill -9 $$',
    )
    units, store = [make_score(sources, None, task) for task in ("second", "third")], Store(tmp_path / "out")
    progress = run_study(units, store, LocalExecutor(store, sources, 2, 1))
    said = "worker was killed by SIGKILL, possibly for lack of memory, 3 times. Its last standard error: no room"
    assert progress.failed == {unit.key: said for unit in units}
    assert (tmp_path / "worker.count").read_text().count("x") == ATTEMPTS


def test_a_worker_that_cannot_start_ends_the_study(sources, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "echo no such module >&2; exit 3")
    store = Store(tmp_path / "out")
    with pytest.raises(WorkerFailed, match=r"could not start: it exited with code 3\. Its standard error: no such module"):
        run_study([make_score(sources, None, "third")], store, LocalExecutor(store, sources, 1, 1))


def test_workers_end_with_the_executor(sources, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, 'read a; echo "{\\"state\\": \\"ready\\"}"; exec sleep 600')
    store = Store(tmp_path / "out")
    executor = LocalExecutor(store, sources, 1, 1)

    def interrupt(progress):
        if progress.running:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_study([make_score(sources, None, "third")], store, executor, interrupt)
    assert time.monotonic() - began < 60
    assert not executor._workers
