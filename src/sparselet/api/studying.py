"""`study`: everything that the tables of a study need, planned and run."""

import contextlib
import datetime
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sparselet.errors import ConfigError, WriteFailed
from sparselet.io.json_files import write_json
from sparselet.models import local_path, model_fingerprint
from sparselet.report.study_page import write_report
from sparselet.result_table import ResultTable, ShownAsTable
from sparselet.studies.engine.cost import summarize_costs
from sparselet.studies.engine.job_runner import StudySources
from sparselet.studies.engine.local import LocalExecutor
from sparselet.studies.engine.on_ray import RayExecutor
from sparselet.studies.engine.plan import Progress, describe_plan, describe_state, learn_costs, plan
from sparselet.studies.engine.run import OnProgress, lock_study, read_measures, run_study
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.unit import Unit
from sparselet.studies.results import make_results
from sparselet.studies.settings import fingerprint_tasks, read_study, task_sources
from sparselet.studies.study import Study
from sparselet.studies.table import Table
from sparselet.studies.tables import make_tables
from sparselet.tuner.model import versions

RESULTS_FILE, COST_FILE, STUDY_FILE = "results.json", "cost.json", "study.json"
REPORT_FILE, FIGURES_DIRECTORY = "report.html", "figures"


@dataclass(frozen=True)
class ExecutorSettings:
    """Where the units of a study are computed. Raises ConfigError."""

    executor: Literal["local", "ray"] = "local"
    """local: processes on this machine. ray: a Ray cluster, or Ray on this machine."""
    address: str | None = None
    """Of a Ray cluster; by default $RAY_ADDRESS, or else Ray is started here."""
    workers: int | None = None
    """Units computed at a time; by default the cores divided by the threads, or with Ray as many as fit into the cluster."""
    threads: int | None = None
    """Cores of one unit; by default the study's. The last digits of results depend on it."""
    gpus: float = 0.0
    """GPUs, or the share of one, that a unit takes; with Ray."""

    def __post_init__(self) -> None:
        if self.executor == "local" and (self.address is not None or self.gpus):
            raise ConfigError("`address` and `gpus` need `executor=ray`.")
        for name, value in (("workers", self.workers), ("threads", self.threads)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")


@dataclass(frozen=True)
class StudyResult(ShownAsTable):
    """What a run left. state: units done, missing, failed and blocked. results, cost: as in the files of these names."""

    out: str
    state: Mapping[str, Any]
    results: Mapping[str, Any]
    cost: Mapping[str, Any]

    def table(self) -> ResultTable:
        """The best row of each measured column of each table."""
        rows: list[tuple[object, ...]] = []
        for name, table in self.results["tables"].items():
            cells = [row["cells"] for row in table["rows"]]
            missing, title = sum(cell["missing"] for row in cells for cell in row if cell), name
            for i, column in enumerate(table["columns"]):
                means = [(row[i]["mean"], -j) for j, row in enumerate(cells) if row[i] and row[i]["mean"] is not None]
                if means and cells[-means[0][1]][i]["measure"] in ("rougeL", "exact_match"):
                    mean, j = max(means)
                    rows.append((title, column, table["rows"][-j]["label"], mean, missing or ""))
                    title, missing = "", 0
        return ResultTable("Best of each column", ("table", "column", "row", "mean", "missing units"), tuple(rows))


@dataclass(frozen=True)
class StudyRun:
    """A study with its tables and units, and the directory or URL that keeps their results."""

    definition: Study
    sources: StudySources
    tables: Mapping[str, Table]
    store: Store
    file: Path

    @property
    def units(self) -> list[Unit]:
        """The units that the tables show."""
        return [unit for table in self.tables.values() for unit in table.units()]

    def status(self) -> dict[str, Any]:
        """Which units are done, failed, blocked and missing, as JSON values."""
        return describe_state(plan(self.units, self.store))

    def plan(self, executor: ExecutorSettings | None = None) -> dict[str, Any]:
        """The units by table, with their estimated time and disk, as JSON values."""
        progress = plan(self.units, self.store)
        estimates = learn_costs(progress, self.store, _weights_bytes(self.sources.model))
        described = describe_plan(self.tables, progress, estimates, self._workers(executor or ExecutorSettings()))
        return {**described, "budget_hours": self.definition.settings.budget_hours}

    def run(self, executor: ExecutorSettings | None = None, watch: OnProgress = lambda progress: None) -> StudyResult:
        """Compute all units that are missing, and write results, cost and report.

        watch: called with the progress whenever it changes, and twice a second. Failed units are reported in the result; those
        that need them are blocked, and all others are computed. The same call again computes what is missing.
        Raises StudyRunning, WriteFailed, WorkerFailed, BadConfig.
        """
        executor, store, definition = executor or ExecutorSettings(), self.store, self.definition
        before = plan(self.units, store)
        with lock_study(store) as lock:
            record = {"settings": asdict(definition.settings), "places": asdict(self.sources), "base": definition.base}
            record |= {"versions": versions(), "file": str(self.file.resolve()), "data": definition.data}
            write_json(store.path / STUDY_FILE, record)
            started = time.time()
            try:
                progress = run_study(self.units, store, self._executor(executor, lock), watch)
            except BaseException:
                with contextlib.suppress(WriteFailed):
                    _write_cost(store, before, started)
                raise
            content = make_results(definition, self.tables, read_measures(self.units, store))
            cost = _write_cost(store, progress, started)
            write_json(store.path / RESULTS_FILE, content)
            write_report(store.path, content, cost)
            store.upload(STUDY_FILE, RESULTS_FILE, COST_FILE, REPORT_FILE, FIGURES_DIRECTORY)
        return StudyResult(store.out, describe_state(progress), content, cost)

    def _workers(self, settings: ExecutorSettings) -> int:
        return settings.workers or max(1, _cores() // self.definition.settings.threads)

    def _executor(self, settings: ExecutorSettings, lock: int) -> LocalExecutor | RayExecutor:
        threads = self.definition.settings.threads
        if settings.executor == "ray":
            return RayExecutor(self.store, self.sources, settings.workers, threads, settings.address, settings.gpus)
        return LocalExecutor(self.store, self.sources, self._workers(settings), threads, lock)


def study(
    file: str | Path,
    preset: str = "",
    *,
    tasks: str | Path | None = None,
    out: str | None = None,
    threads: int | None = None,
) -> StudyRun:
    """Read a study, its tasks and its base model.

        study = sl.study("studies/recipes.toml", preset="small")
        study.run()

    file: the study as TOML. preset: one of the file's presets, which override its settings.
    tasks: the directory that holds each task as a directory of its name.
    out: the directory, or a URL of fsspec, that keeps the results; by default a directory named after file and preset.
    threads: cores of one unit, instead of the file's.
    Raises ConfigError, TaskError, ModelError.
    """
    file = Path(file)
    settings = read_study(file, preset)
    if threads is not None:
        settings = replace(settings, threads=threads)
    model = settings.model
    if Path(model).is_dir():  # recorded by its name alone, wherever the directory lies
        model = str(Path(model).resolve())
        settings = replace(settings, model=Path(model).name)
    sources = StudySources(task_sources(settings, tasks), model)
    definition = Study(settings, fingerprint_tasks(settings, sources.tasks), model_fingerprint(model))
    return StudyRun(
        definition, sources, make_tables(definition), Store(out or "-".join(filter(None, (file.stem, preset)))), file
    )


def _write_cost(store: Store, progress: Progress, started: float) -> dict[str, Any]:
    """Write the time and memory of all units until now; a run that computed units adds to what the file says."""
    before = store.read(COST_FILE) or {}
    now = plan(progress.units.values(), store)
    costs = [(now.units[key], cost) for key in sorted(now.done) if (cost := store.cost(key)) is not None]
    cost = {**before, **summarize_costs(costs), "versions": versions(), "machine": _machine()}
    if not before or before.get("done") != len(now.done):
        cost["wall_seconds"] = before.get("wall_seconds", 0.0) + time.time() - started
        cost["date"] = datetime.date.today().isoformat()
        cost["command"] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    cost["done"] = len(now.done)
    store.path.mkdir(parents=True, exist_ok=True)
    write_json(store.path / COST_FILE, cost)
    return cost


def _machine() -> dict[str, Any]:
    return {"system": platform.platform(), "processor": platform.machine(), "cores": _cores()}


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _weights_bytes(model: str) -> int:
    """The size of a base model's weights, 0 if they are not on this machine."""
    return sum(file.stat().st_size for file in Path(local_path(model)).glob("*.safetensors"))
