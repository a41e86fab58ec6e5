"""`sparselet study`."""

import contextlib
import datetime
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from sparselet.cli.study_view import live, tell_failures, tell_plan, tell_results, tell_state
from sparselet.cli.terminal import note, print_json, quiet_libraries, say, word
from sparselet.cli.terminal import status as showing
from sparselet.errors import ConfigError, StudyIncomplete, WriteFailed
from sparselet.io.json_files import write_json
from sparselet.models import local_path, model_fingerprint
from sparselet.report.study_page import write_report
from sparselet.studies.arms import Study
from sparselet.studies.engine.cost import total
from sparselet.studies.engine.local import LocalExecutor
from sparselet.studies.engine.on_ray import RayExecutor
from sparselet.studies.engine.perform import Places
from sparselet.studies.engine.plan import Progress, describe_plan, describe_state, learn, plan
from sparselet.studies.engine.run import claimed, gather, run_study
from sparselet.studies.engine.store import Store
from sparselet.studies.paper.tables import make_tables
from sparselet.studies.results import results
from sparselet.studies.settings import describe_tasks, read_study, task_places
from sparselet.tuner.model import versions

RESULTS, COST, ABOUT, REPORT, FIGURES = "results.json", "cost.json", "study.json", "report.html", "figures"


def study_(
    file: Path,
    *,
    out: str,
    preset: str = "",
    tasks: Path | None = None,
    executor: Literal["local", "ray"] = "local",
    address: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    gpus: float = 0.0,
    dry_run: bool = False,
    status: bool = False,
    json: bool = False,
) -> None:
    """Run a study: train, merge and evaluate all that its tables need, and write results.json and report.html.

    Everything is made of units that are kept in OUT. The same command again does only what is missing, after an
    interruption too, and ends with the same results. A unit that fails is told; the others go on.

        sparselet study studies/sparse_adapters.toml --preset small --tasks TASKS --out my-study --dry-run
        sparselet study studies/sparse_adapters.toml --preset small --tasks TASKS --out my-study
        sparselet study studies/sparse_adapters.toml --preset full --out s3://bucket/study --executor ray

    Parameters
    ----------
    file
        The study as TOML.
    out
        Directory to write to, or a URL that fsspec knows, such as s3://bucket/study.
    preset
        One of the file's presets, which override its settings.
    tasks
        Directory that holds each task as a directory of its name.
    executor
        local: processes on this machine. ray: a Ray cluster, or Ray on this machine.
    address
        Of a Ray cluster; by default $RAY_ADDRESS, or else Ray is started here.
    workers
        Units done at a time; by default the cores divided by the threads, or with Ray as many as the cluster has room for.
    threads
        Cores of one unit; by default the file's. The last digits of results depend on it.
    gpus
        GPUs, or the share of one, that a unit takes; with Ray.
    dry_run
        Only print the plan: units, their estimated time and disk, what is done already.
    status
        Only print what is done, what failed and why, and what is missing.
    json
        Print the result as JSON.
    """
    quiet_libraries()
    if dry_run and status:
        raise ConfigError("--dry-run and --status do not go together.")
    if executor == "local" and (address is not None or gpus):
        raise ConfigError("--address and --gpus go with --executor ray.")
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.")
    with showing("Reading the study, its tasks and its model"):
        study, places = _study(file, preset, tasks, threads)
        tables = make_tables(study)
        units = [unit for table in tables.values() for unit in table.units()]
        store = Store(out)
        before = plan(units, store)
    share = study.settings.threads
    slots = workers or max(1, _cores() // share)
    if status:
        _show(describe_state(before), json, tell_state)
        return
    if dry_run:
        estimates = learn(before, store, _weights_bytes(places.model))
        described = describe_plan(tables, before, estimates, slots)
        _show({**described, "budget_hours": study.settings.budget_hours}, json, tell_plan)
        return
    with claimed(store) as lock:
        about = {"settings": asdict(study.settings), "places": asdict(places), "base": study.base, "versions": versions()}
        write_json(store.path / ABOUT, {**about, "file": str(file.resolve()), "data": study.data})
        if executor == "ray":
            made = RayExecutor(store, places, workers, share, address, gpus)
        else:
            made = LocalExecutor(store, places, slots, share, lock)
        started = time.time()
        try:
            with live(json) as watch:
                progress = run_study(units, store, made, watch)
        except BaseException:
            with contextlib.suppress(WriteFailed):
                _write_cost(store, before, started)
            note(f"What is done is kept in {out}; the same command goes on.")
            raise
        with showing("Writing the report"):
            found, cost = results(study, tables, gather(units, store)), _write_cost(store, progress, started)
            write_json(store.path / RESULTS, found)
            write_report(store.path, found, cost)
            store.upload(ABOUT, RESULTS, COST, REPORT, FIGURES)
    state = {**describe_state(progress), "results": f"{out}/{RESULTS}", "report": f"{out}/{REPORT}"}
    if json:
        print_json(state)
    else:
        tell_results(found)
        tell_failures(state)
        say(
            f"Written to {out}: {RESULTS}, {COST}, {REPORT} with its {FIGURES}",
            f"Next: open {word(out)}/{REPORT} in a browser.",
        )
    if progress.failed:
        raise StudyIncomplete(
            f"{len(progress.failed)} units failed and {len(progress.blocked)} wait for them; the others are done. The same "
            "command tries them again."
        )


def _study(file: Path, preset: str, tasks: Path | None, threads: int | None) -> tuple[Study, Places]:
    """The study, and where its tasks and model are. A model's directory is known by its name alone, wherever it lies."""
    settings = read_study(file, preset)
    if threads is not None:
        settings = replace(settings, threads=threads)
    model = settings.model
    if Path(model).is_dir():
        model = str(Path(model).resolve())
        settings = replace(settings, model=Path(model).name)
    places = Places(task_places(settings, tasks), model)
    return Study(settings, describe_tasks(settings, asdict(places)), model_fingerprint(model)), places


def _write_cost(store: Store, progress: Progress, started: float) -> dict[str, Any]:
    """Write what all units took until now: added to what the file says where this run did any."""
    before = store.read(COST) or {}
    now = plan(progress.units.values(), store)
    taken = [(now.units[key], cost) for key in sorted(now.done) if (cost := store.cost(key)) is not None]
    cost = {**before, **total(taken), "versions": versions(), "machine": _machine()}
    if not before or before.get("done") != len(now.done):
        cost["wall_seconds"] = before.get("wall_seconds", 0.0) + time.time() - started
        cost["date"] = datetime.date.today().isoformat()
        cost["command"] = shlex.join(["sparselet", *sys.argv[1:]])
    cost["done"] = len(now.done)
    store.path.mkdir(parents=True, exist_ok=True)
    write_json(store.path / COST, cost)
    return cost


def _machine() -> dict[str, Any]:
    return {"system": platform.platform(), "processor": platform.machine(), "cores": _cores()}


def _show(content: Mapping[str, Any], json: bool, tell: Any) -> None:
    """For machines or for a person."""
    (print_json if json else tell)(content)


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _weights_bytes(model: str) -> int:
    """Size of a base model's weights, where they are here."""
    return sum(file.stat().st_size for file in Path(local_path(model)).glob("*.safetensors"))
