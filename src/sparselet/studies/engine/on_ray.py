"""Jobs as Ray tasks, on a cluster or on this machine."""

import functools
import importlib
import json
import os
from collections import deque
from dataclasses import asdict
from typing import Any

from sparselet.errors import MissingExtra, WorkerFailed
from sparselet.studies.engine.job_runner import JobRunner, StudySources
from sparselet.studies.engine.jobs import Event, Job
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.worker import silence_libraries

RETRIES = 2  # of a job whose worker or machine is lost


class RayExecutor:
    """Ray tasks, each with `threads` CPUs and `gpus` GPUs. Ray runs a task again whose worker or machine is lost.

    store: a URL or a shared directory that all machines can reach. workers: tasks at a time; by default the cluster's CPUs
    divided by `threads`. address: of a cluster; by default $RAY_ADDRESS; without either, Ray is started on this machine and
    stopped by `close`. Raises MissingExtra, WorkerFailed (no cluster at the address).
    """

    def __init__(
        self,
        store: Store,
        sources: StudySources,
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
        self._task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)(run_job)
        self._context = json.dumps({"out": store.out if store.is_remote else str(store.path), **asdict(sources)})
        self._running: dict[Any, Job] = {}
        self._waiting: deque[Event] = deque()

    def submit(self, job: Job) -> None:
        """Start a job."""
        self._running[self._task.remote(self._context, json.dumps(job.to_json()))] = job

    def event(self, seconds: float) -> Event | None:
        """The next event; None if there is none within this time."""
        if not self._waiting and self._running:
            ended, _ = self._ray.wait(list(self._running), timeout=seconds)
            for task in ended:
                self._waiting.extend(self._outcome(task, self._running.pop(task)))
        return self._waiting.popleft() if self._waiting else None

    def close(self) -> None:
        """Stop all tasks; and Ray, if this process started it."""
        for task in self._running:
            self._ray.cancel(task, force=True)
        self._running.clear()
        self._ray.shutdown()

    def _outcome(self, task: Any, job: Job) -> list[Event]:
        """The last event of each of a job's units, and of the job."""
        try:
            errors: dict[str, str] = json.loads(self._ray.get(task))
        except self._ray.exceptions.RayError as error:
            text = f"worker was lost, {RETRIES + 1} times: {' '.join(str(error).split())}"
            errors = {unit.key: text for unit in job.units}
        events = [Event("failed" if u.key in errors else "done", u.key, error=errors.get(u.key, "")) for u in job.units]
        return [*events, Event("end", job.key)]


def run_job(context: str, job: str) -> str:
    """The Ray task: runs a job. Arguments and result, the errors of failed units by key, are JSON."""
    errors: dict[str, str] = {}

    def note_error(event: Event) -> None:
        if event.state == "failed":
            errors[event.key] = event.error

    _job_runner(context).run(Job.from_json(json.loads(job)), note_error)
    return json.dumps(errors)


@functools.lru_cache(maxsize=1)
def _job_runner(context: str) -> JobRunner:
    """The job runner of this worker process, which keeps the base model between jobs."""
    silence_libraries()
    start = json.loads(context)
    return JobRunner(Store(start["out"]), StudySources(start["tasks"], start["model"]))


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise MissingExtra("the executor ray needs Ray: pip install 'sparselet[ray]'.") from error
