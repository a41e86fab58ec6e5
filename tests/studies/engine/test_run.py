"""A whole study: order, failures, what waits for them, and ends that are the same whatever went wrong."""

import contextlib
import fcntl
import os
import resource
import shutil
from dataclasses import replace

import pytest
from helpers.units import TASKS, InThisProcess, copy_without, make_merge, make_score, make_train, make_units, results_of

from sparselet.errors import StudyRunning
from sparselet.models import load_model
from sparselet.studies.engine import run
from sparselet.studies.engine.jobs import Event
from sparselet.studies.engine.plan import describe_plan, describe_state, learn_costs, plan
from sparselet.studies.engine.run import lock_study, read_measures, run_study
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.unit import closure
from sparselet.studies.table import Cell, Table


def test_every_unit_is_done_once_and_the_longest_chain_is_begun_first(undisturbed_run, units):
    store, jobs = undisturbed_run
    assert sorted(unit.key for job in jobs for unit in job.units) == sorted(plan(units, store).units)
    experts = {unit.key for unit in closure(units).values() if unit.kind == "merge" for unit in unit.inputs}
    kinds = [job.units[0].kind for job in jobs]
    assert experts <= {job.key for job in jobs[: kinds.index("evaluate") + 1]} | {job.key for job in jobs[:6]}


def test_what_is_done_is_not_done_again(undisturbed, sources, units):
    executor = InThisProcess(undisturbed, sources)
    before = results_of(undisturbed.path)
    assert run_study(units, undisturbed, executor).done == set(plan(units, undisturbed).units)
    assert not executor.jobs
    assert results_of(undisturbed.path) == before


def test_a_stopped_study_goes_on(undisturbed, sources, units, tmp_path):
    """Stopped before each of its jobs, it begins one more each time."""
    count = 0

    def stop(job):
        nonlocal count
        count += 1
        if count % 2 == 0:
            raise KeyboardInterrupt

    store, stops = copy_without(undisturbed, tmp_path, lambda unit: unit.kind == "merge", units), 0
    while plan(units, store).missing:
        with contextlib.suppress(KeyboardInterrupt):
            run_study(units, store, InThisProcess(store, sources, stop))
        stops += 1
    assert stops > 4
    assert results_of(store.path) == results_of(undisturbed.path)


def test_a_unit_that_fails_stops_only_what_needs_it(sources, tmp_path):
    bad = make_train(sources, ("backwards",), target_modules=("nothing",))
    good = make_train(sources, ("second",), epochs=1.0)
    start = make_merge([bad, good])
    later = make_train(sources, TASKS[:2], initial=start)
    needs = [make_score(sources, one, task) for one in (make_merge([bad, good], "ties"), later) for task in TASKS[:2]]
    free = [make_score(sources, good, "second"), make_score(sources, None, "third")]
    store = Store(tmp_path)
    progress = run_study([*needs, *free], store, InThisProcess(store, sources))
    assert progress.failed.keys() == {bad.key}
    error = progress.failed[bad.key]
    assert error.startswith("Target modules ['nothing'] not found in the base model.")
    assert progress.blocked == dict.fromkeys([start.key, later.key, *(unit.key for unit in needs)], bad.key)
    assert progress.done == {good.key, *(unit.key for unit in free)}
    assert not progress.running
    assert store.failures() == progress.failed
    state = describe_state(progress)
    assert state["failed"] == [{"key": bad.key, "kind": "train", "label": bad.label, "error": error}]
    assert {one["waits_for"] for one in state["blocked"]} == {bad.label}
    assert state["missing"] == {"train": 2, "merge": 1, "evaluate": 4}
    assert state["done"] == {"train": 1, "evaluate": 2}
    assert plan(needs, store).failed == progress.failed  # told by --status later


def test_a_failure_is_forgotten_when_the_unit_is_done(sources, tmp_path, monkeypatch):
    unit, store = make_score(sources, None, "third"), Store(tmp_path)

    def no_memory(*arguments):
        raise RuntimeError("no\nmemory")

    with monkeypatch.context() as patch:
        patch.setattr("sparselet.studies.engine.job_runner.load_model", no_memory)
        progress = run_study([unit], store, InThisProcess(store, sources))
    assert progress.failed == store.failures() == {unit.key: "RuntimeError: no memory"}
    assert not run_study([unit], store, InThisProcess(store, sources)).failed
    assert not store.failures()


def trains_all_weights(unit):
    return unit.kind == "train" and unit.settings.method == "full"


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a disk with no more room, of which no file can have more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_the_rest_is_done_and_the_next_run_completes(undisturbed, sources, units, tmp_path):
    store = copy_without(undisturbed, tmp_path, trains_all_weights, units)
    with files_of_at_most(30_000):  # a checkpoint of all weights is larger
        progress = run_study(units, store, InThisProcess(store, sources))
    full = {unit.key for unit in closure(units).values() if trains_all_weights(unit)}
    assert progress.failed.keys() == full
    assert progress.done | full | progress.blocked.keys() == progress.units.keys()
    assert not run_study(units, store, InThisProcess(store, sources)).failed
    assert results_of(store.path) == results_of(undisturbed.path)


def test_on_a_disk_without_any_room_everything_fails_and_is_told(sources, tmp_path, monkeypatch):
    units, store = [make_score(sources, None, task) for task in TASKS], Store(tmp_path)
    model = load_model(sources.model)  # whose progress bar would be written to a file by pytest
    monkeypatch.setattr("sparselet.studies.engine.job_runner.load_model", lambda *a: model)
    with files_of_at_most(0):
        progress = run_study(units, store, InThisProcess(store, sources))
    assert progress.failed.keys() == progress.units.keys()
    assert all("cannot" in error for error in progress.failed.values()), progress.failed  # write, or load what writes first
    assert not run_study(units, store, InThisProcess(store, sources)).failed


def test_only_one_process_runs_a_study(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PATIENCE", 0.2)
    with lock_study(Store(tmp_path)), pytest.raises(StudyRunning, match="another process runs the study in"):  # noqa: SIM117
        with lock_study(Store(tmp_path)):
            pass
    with lock_study(Store(tmp_path)) as descriptor:
        copy = os.dup(descriptor)
    with pytest.raises(StudyRunning), lock_study(Store(tmp_path)):  # a worker holds it still
        pass
    os.close(copy)
    with lock_study(Store(tmp_path)) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def test_a_moved_data_directory_keeps_its_results(undisturbed, sources, units, tmp_path):

    tasks = {name: str(shutil.copytree(place, tmp_path / name)) for name, place in sources.tasks.items()}
    moved = make_units(replace(sources, tasks=tasks, model=str(shutil.copytree(sources.model, tmp_path / "model"))))
    assert not plan(moved, undisturbed).missing
    assert read_measures(moved, undisturbed) == read_measures(units, undisturbed)


def test_the_plan_counts_each_unit_once(undisturbed, sources, units, tmp_path):
    scores = tuple(units)
    tables = {
        "one": Table("One", "", ("score",), {"row": (Cell((scores[:6],)),)}),
        "two": Table("Two", "", ("score",), {"row": (Cell((scores,)), None)}),
    }
    empty = Store(tmp_path)
    progress = plan(units, empty)
    found = describe_plan(tables, progress, learn_costs(progress, empty), 2)
    every = closure(units).values()
    for kind in ("train", "merge", "evaluate"):
        count = sum(unit.kind == kind for unit in every)
        assert found[kind] == count == sum(table[kind] for table in found["tables"].values())
    assert found["left"] == len(progress.units) == sum(table["left"] for table in found["tables"].values())
    assert found["rough"]
    assert found["seconds"] > 0
    progress = plan(units, undisturbed)
    found = describe_plan(tables, progress, learn_costs(progress, undisturbed), 2)
    assert (found["left"], found["seconds"], found["bytes"], found["rough"]) == (0, 0, 0, False)
    assert found["done"] == len(progress.units)


def test_the_view_is_told_of_everything(sources, tmp_path):
    units = [make_score(sources, None, task) for task in TASKS]
    store, seen = Store(tmp_path), []
    run_study(units, store, InThisProcess(store, sources), lambda p: seen.append((len(p.done), len(p.running), p.seconds_left)))
    assert seen[0][2] > 0
    assert seen[-1] == (3, 0, 0)
    assert any(running for _, running, _ in seen)


def test_a_unit_of_which_nothing_is_told_fails(sources, tmp_path):
    class Silent(InThisProcess):
        def submit(self, job):
            self._events.append(Event("end", job.key))

    unit, store = make_score(sources, None, "third"), Store(tmp_path)
    progress = run_study([unit], store, Silent(store, sources))
    assert progress.failed == {unit.key: "worker exited without reporting a result."}
