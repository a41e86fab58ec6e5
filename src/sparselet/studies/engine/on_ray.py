"""Jobs done as tasks of Ray, on a cluster or on this machine."""

import functools
import importlib
import json
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sparselet.errors import MissingExtra, WorkerFailed
from sparselet.studies.engine.jobs import Job
from sparselet.studies.engine.local import Event
from sparselet.studies.engine.perform import Performer, Places, Report
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.worker import quiet

RETRIES = 2  # of a job whose worker is lost


class RayExecutor:
    """Ray tasks, each with `threads` CPUs and `gpus` GPUs; a task whose worker or machine is lost is done again by Ray.

    store: what all machines see: a URL, or a directory that they share. workers: tasks at a time; by default as many as the
    cluster has CPUs for. address: of a cluster; by default $RAY_ADDRESS, or else Ray is started on this machine and stopped
    at the end. Raises MissingExtra, WorkerFailed (no cluster at the address).
    """

    def __init__(
        self,
        store: Store,
        places: Places,
        workers: int | None = None,
        threads: int = 1,
        address: str | None = None,
        gpus: float = 0.0,
    ) -> None:
        self._ray = ray = _ray()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = address or os.environ.get("RAY_ADDRESS")
        cores = None if address or workers is None else workers * threads
        try:
            ray.init(
                address=address or "local", num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
            )
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise WorkerFailed(f"Ray cannot be started at {address or 'this machine'}: {error}") from error
        self.slots = workers or max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        self._task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)(perform)
        self._where = json.dumps({"out": store.out if store.is_remote else str(store.path), **asdict(places)})
        self._running: dict[Any, Job] = {}
        self._waiting: deque[Event] = deque()

    def submit(self, job: Job) -> None:
        """Begin a job."""
        self._running[self._task.remote(self._where, json.dumps(job.to_json()))] = job

    def event(self, seconds: float) -> Event | None:
        """The next event; None if there is none within this time."""
        if not self._waiting and self._running:
            ended, _ = self._ray.wait(list(self._running), timeout=seconds)
            for task in ended:
                self._waiting.extend(self._outcome(task, self._running.pop(task)))
        return self._waiting.popleft() if self._waiting else None

    def close(self) -> None:
        """Stop all tasks; and Ray, if it was started here."""
        for task in self._running:
            self._ray.cancel(task, force=True)
        self._running.clear()
        self._ray.shutdown()

    def _outcome(self, task: Any, job: Job) -> list[Event]:
        """What became of a job's units."""
        try:
            errors: Mapping[str, str] = json.loads(self._ray.get(task))
        except self._ray.exceptions.RayError as error:
            text = f"its worker was lost, {RETRIES + 1} times: {' '.join(str(error).split())}"
            errors = {unit.key: text for unit in job.units}
        ends = [Event("failed" if u.key in errors else "done", u.key, text=errors.get(u.key, "")) for u in job.units]
        return [*ends, Event("end", job.key)]


def perform(where: str, job: str) -> str:
    """What a Ray worker does: a job, as JSON. Returns the errors of the units that failed, by key, as JSON."""
    errors: dict[str, str] = {}

    def tell(report: Report) -> None:
        if report.what == "failed":
            errors[report.key] = report.error

    _performer(where).perform(Job.from_json(json.loads(job)), tell)
    return json.dumps(errors)


@functools.lru_cache(maxsize=1)
def _performer(where: str) -> Performer:
    """Kept between the jobs that a worker process is given, with the base model."""
    quiet()
    told = json.loads(where)
    return Performer(Store(told["out"]), Places(told["tasks"], told["model"]))


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise MissingExtra("the executor ray needs Ray: pip install 'sparselet[ray]'.") from error
