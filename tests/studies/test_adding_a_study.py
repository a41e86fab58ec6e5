"""docs/adding-a-study.md: its study, table and claim are taken from the page and used as they stand."""

import re
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.plans import by_hash, measured

from sparselet.io.json_files import json_bytes
from sparselet.models import model_fingerprint
from sparselet.studies.engine.job_runner import JobRunner, StudySources
from sparselet.studies.engine.jobs import Event
from sparselet.studies.engine.run import read_measures, run_study
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.unit import closure
from sparselet.studies.results import make_results
from sparselet.studies.settings import fingerprint_tasks, read_study, task_sources
from sparselet.studies.study import Study
from sparselet.studies.tables import TABLES, make_tables

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/adding-a-study.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def named(monkeypatch):
    """What the page's Python defines; its table is in TABLES meanwhile."""
    monkeypatch.setitem(TABLES, "sparse_merges", None)  # remembered as absent, and removed again
    names = {"TABLES": TABLES}
    for code in blocks("python"):
        exec(compile(code, "adding-a-study.md", "exec"), names)
    return names


@pytest.mark.parametrize(("preset", "rows"), [("", 200), ("quick", 16)])
def test_the_new_table_is_one_function_and_one_line(named, tmp_path, preset, rows):
    (toml,) = blocks("toml")
    (tmp_path / "my_study.toml").write_text(toml)
    settings = read_study(tmp_path / "my_study.toml", preset)
    study = Study(settings, fingerprint_tasks(settings, task_sources(settings)), "base")
    tables = make_tables(study)
    assert list(tables) == ["sparse_merges"]
    plan = closure(tables["sparse_merges"].units())
    kinds = Counter(unit.kind for unit in plan.values())
    needs = re.search(r"needs (\d+) trainings, (\d+) merges\s+and (\d+) evaluations", PAGE)
    assert needs is not None
    assert [kinds[kind] for kind in ("train", "merge", "evaluate")] == [int(number) for number in needs.groups()]
    assert {unit.settings.train_rows for unit in plan.values() if unit.kind == "train"} == {rows}
    told = make_results(study, tables, measured(tables, by_hash), [named["claim"]])
    assert [row["label"] for row in told["tables"]["sparse_merges"]["rows"]] == ["overlap", "uniform", "ties"]
    assert all(cell["mean"] > 0 for row in told["tables"]["sparse_merges"]["rows"] for cell in row["cells"])
    assert told["claims"][0]["verdict"] == "not tested"  # two tasks
    assert told["claims"][0]["why"].startswith("fewer than 3 tasks")
    json_bytes(told)


class Here:
    """Does each job at once, in this process."""

    slots = 1

    def __init__(self, store, sources):
        self.runner, self.events = JobRunner(store, sources), deque()

    def submit(self, job):
        self.runner.run(job, self.events.append)
        self.events.append(Event("end", job.key))

    def event(self, seconds):
        return self.events.popleft() if self.events else None

    def close(self):
        self.runner = None


def test_the_study_is_run_to_its_end(named, base_dir, tmp_path):
    (toml,) = blocks("toml")
    (tmp_path / "my_study.toml").write_text(toml)
    settings = replace(
        read_study(tmp_path / "my_study.toml", "quick"), model="tiny", train_rows=8, test_rows=2, max_new_tokens=4
    )
    sources, store = StudySources(task_sources(settings), base_dir), Store(str(tmp_path / "out"))
    study = Study(settings, fingerprint_tasks(settings, sources.tasks), model_fingerprint(base_dir))
    tables = make_tables(study)
    units = tables["sparse_merges"].units()
    progress = run_study(units, store, Here(store, sources))
    assert not progress.failed, progress.failed
    told = make_results(study, tables, read_measures(units, store), [named["claim"]])
    assert told["units"] == {"train": 2, "merge": 3, "evaluate": 9, "missing": 0}
    cells = [cell for row in told["tables"]["sparse_merges"]["rows"] for cell in row["cells"]]
    assert [cell["missing"] for cell in cells] == [0] * 6
    assert all(0 <= cell["mean"] <= 100 for cell in cells)


def test_the_page_names_what_there_is():
    study = set(dir(Study))
    table = PAGE[PAGE.index("| | |") : PAGE.index("`Cell(")]
    asked = set(re.findall(r"`(\w+)\(", table))
    assert asked >= {"experts", "merge", "individual", "held_in", "held_out", "own_masks", "parameters", "draws"}
    assert asked <= study
    public = {name for name in study if not name.startswith("_")} - {"score"}
    assert public <= asked
    for path in re.findall(r"\]\((\.\./[^)]+)\)", PAGE):
        assert (ROOT / "docs" / path).is_file(), path


def test_the_page_leaves_no_trace(named):
    assert TABLES["sparse_merges"] is named["sparse_merges"]


def test_the_tables_are_as_before():
    assert "sparse_merges" not in TABLES
