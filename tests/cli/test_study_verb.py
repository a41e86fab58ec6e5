"""`sparselet study`: the plan, the run, what failed, in words and as JSON."""

import json
import os
import re

import pytest
from helpers.units import TASKS, InThisProcess
from rich.console import Console

from sparselet.cli import study_view
from sparselet.studies.engine.plan import plan
from sparselet.studies.engine.store import Store

STUDY = """
[study]
model = "{model}"
held_in = ["backwards", "second"]
held_out = ["third"]
sweep_tasks = ["backwards", "second"]
tables = ["interference"]
train_rows = 4
epochs = 1
batch_size = 2
max_input_length = 64
max_new_tokens = 4
density = 0.25
block_size = 4
learning_rate = {{ sparse = 1e-2, block = 1e-2, lora = 1e-2, full = 1e-3, multitask = 1e-3 }}
lora_ranks = [2]
lora_rank = 2
n_experts = [2]
targets = {{ "QKV + O" = ["q_proj", "k_proj", "v_proj", "o_proj"] }}
budget_hours = 1e-4

[preset.more]
epochs = 2
"""


@pytest.fixture
def study(tmp_path, sources):
    file = tmp_path / "study.toml"
    file.write_text(STUDY.format(model=sources.model))
    tasks = next(iter(sources.tasks.values())).rpartition("/")[0]
    return [file, "--tasks", tasks, "--out", tmp_path / "out"]


@pytest.fixture
def made(monkeypatch):
    """The verb's work is done in this process; what executors were made with is kept."""
    given = []

    def local(store, sources, workers, threads, lock):
        given.append(("local", workers, threads))
        return InThisProcess(store, sources)

    def by_ray(store, sources, workers, threads, address, gpus):
        given.append(("ray", workers, threads, address, gpus))
        return InThisProcess(store, sources)

    monkeypatch.setattr("sparselet.api.studying.LocalExecutor", local)
    monkeypatch.setattr("sparselet.api.studying.RayExecutor", by_ray)
    return given


def test_a_study_from_the_plan_to_the_report(cli, study, made, tmp_path):
    code, out, _ = cli("study", *study, "--dry-run")
    assert code == 0
    assert "interference" in out
    assert "0 units are done" in out
    assert "(rough: not all kinds of units have been measured here)" in out
    assert "That is more than the budget of 0.0001 hours." in out
    assert not (tmp_path / "out").exists()

    code, out, err = cli("study", *study, "--workers", 2)
    assert code == 0, err
    assert made == [("local", 2, 1)]
    assert f"Written to {tmp_path}/out" in out.replace("\n", "")
    assert "Best of each column" in out
    assert "Claims: " in out
    first = (tmp_path / "out" / "results.json").read_bytes()
    cost = json.loads((tmp_path / "out" / "cost.json").read_text())
    assert cost["units"]["train"]["count"] == 2
    assert cost["wall_seconds"] > 0
    assert cost["versions"]["torch"]
    assert (tmp_path / "out" / "report.html").is_file()
    assert json.loads((tmp_path / "out" / "study.json").read_text())["places"]["tasks"].keys() == set(TASKS)

    code, out, _ = cli("study", *study, "--json")  # nothing is left to do
    told = json.loads(out)
    assert (code, told["missing"], told["failed"], told["blocked"]) == (0, {}, [], [])
    assert told["done"]["train"] == 2
    assert (tmp_path / "out" / "results.json").read_bytes() == first
    assert json.loads((tmp_path / "out" / "cost.json").read_text()) == cost

    code, out, _ = cli("study", *study, "--dry-run", "--json")
    assert (json.loads(out)["left"], json.loads(out)["seconds"]) == (0, 0)
    code, out, _ = cli("study", *study, "--status")
    assert re.search(r"train\s+│\s+2 │\s+0 │\s+0 │", out)


def test_another_preset_or_number_of_threads_is_other_work(cli, study, made, tmp_path):
    keys = []
    for more in ([], ["--preset", "more"], ["--threads", 2]):
        _, out, _ = cli("study", *study, *more, "--status", "--json")
        keys.append(json.loads(out)["missing"])
    assert keys[0] == keys[1] == keys[2]
    cli("study", *study, "--executor", "ray", "--address", "there", "--gpus", 0.5, "--threads", 2, "--json")
    assert made == [("ray", None, 2, "there", 0.5)]
    assert json.loads(cli("study", *study, "--threads", 2, "--status", "--json")[1])["missing"] == {}
    assert json.loads(cli("study", *study, "--status", "--json")[1])["done"] == {}


def test_what_fails_is_told_and_tried_again(cli, study, made, monkeypatch, tmp_path):
    def no_room(*arguments, **more):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("sparselet.studies.engine.job_runner.train", no_room)
        code, out, err = cli("study", *study)
    assert code == 1
    assert "error: 2 units failed and " in err
    assert "RuntimeError: no memory" in out
    assert "blocked: " in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["units"]["missing"] > 2
    code, out, _ = cli("study", *study, "--status")
    assert code == 0
    assert "RuntimeError: no memory" in out
    assert json.loads(cli("study", *study, "--status", "--json")[1])["failed"][0]["error"] == "RuntimeError: no memory"
    assert cli("study", *study)[0] == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["units"]["missing"] == 0


def test_after_an_interruption_it_is_told_that_the_same_command_goes_on(cli, study, made, monkeypatch, tmp_path):
    def interrupt(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparselet.studies.engine.job_runner.train", interrupt)
    code, _, err = cli("study", *study)
    assert code == 130
    assert f"Finished units are kept in {tmp_path}/out; the same command continues." in err.replace("\n", "")
    assert json.loads((tmp_path / "out" / "cost.json").read_text())["wall_seconds"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dry-run", "--status"], "--dry-run and --status do not go together."),
        (["--gpus", 1], "--address and --gpus need --executor ray."),
        (["--address", "there"], "--address and --gpus need --executor ray."),
        (["--workers", 0], "workers must be at least 1, got 0."),
        (["--threads", 0], "threads must be at least 1, got 0."),
        (["--preset", "other"], "there is no preset 'other'; there are more."),
    ],
)
def test_what_it_refuses(refused, study, more, message):
    assert message in refused("study", *study, *more)


# The live view


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (6000, "1 h 40 min"), (7500, "2 h 05 min")],
)
def test_times_for_a_person(seconds, text):
    assert study_view.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.0 kB"), (1500, "1.5 kB"), (25_000_000, "25 MB"), (999_600_000, "1.0 GB"), (10**13, "10000 GB")]
)
def test_sizes_for_a_person(count, text):
    assert study_view.format_bytes(count) == text


def test_the_view_shows_what_runs_and_what_failed(units, tmp_path):
    progress = plan(units, Store(tmp_path))
    keys = list(progress.units)
    progress.running, progress.seconds_left = {keys[0]: 0.5, keys[1]: 0.0}, 4000
    progress.failed, progress.blocked, progress.done = {keys[2]: "no memory"}, {keys[3]: keys[2]}, {keys[4]}
    with open(os.devnull, "w") as nowhere:
        console = Console(width=150, record=True, file=nowhere)
        console.print(study_view.view_of(progress))
        shown = console.export_text()
    assert f"1 of {len(keys)} units done, 2 running, 1 failed, 1 blocked; about 67 min left" in shown
    assert f"failed: {progress.units[keys[2]].label}: no memory" in shown
    assert progress.units[keys[0]].label[:40] in shown
