"""Jobs in worker processes on this machine."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from sparselet.errors import WorkerFailed
from sparselet.io.temporaries import remove_scratch
from sparselet.studies.engine.job_runner import StudySources
from sparselet.studies.engine.jobs import Event, Job
from sparselet.studies.engine.store import SCRATCH, Store

ATTEMPTS = 3  # runs of a job whose worker dies
TAIL = 20  # lines of a worker's standard error that are kept


class Executor(Protocol):
    """Runs jobs. slots: the number of jobs at a time."""

    slots: int

    def submit(self, job: Job) -> None:
        """Start a job; at most `slots` run at a time. Emits one "done" or "failed" for each unit, then one "end"."""

    def event(self, seconds: float) -> Event | None:
        """The next event; None if there is none within this time."""

    def close(self) -> None:
        """Stop all running jobs."""


@dataclass
class _Worker:
    process: "subprocess.Popen[str]"
    stderr: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))
    is_started: bool = False
    job: Job | None = None
    ended: set[str] = field(default_factory=set)  # keys of the job's units that are done or failed
    attempts: int = 1


class LocalExecutor:
    """Worker processes, each started when it is first needed.

    threads: of each worker. lock: an open file that workers inherit, so that it stays locked until the last of them exits.
    A worker that dies is replaced and its job run again, three times in all. `event` raises WorkerFailed for a worker that
    exits before it can take a job.
    """

    def __init__(self, store: Store, sources: StudySources, workers: int, threads: int, lock: int | None = None) -> None:
        self.slots = workers
        self._start = {"out": store.out, "tasks": dict(sources.tasks), "model": sources.model}
        self._threads, self._lock = threads, lock
        self._workers: list[_Worker] = []
        self._messages: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self._waiting: deque[Event] = deque()

    def submit(self, job: Job) -> None:
        """Assign a job to an idle worker, or to a new one."""
        idle = next((worker for worker in self._workers if worker.job is None), None)
        self._assign(job, idle or self._start_worker(), 1, set())

    def event(self, seconds: float) -> Event | None:
        """The next event; None if there is none within this time. Raises WorkerFailed."""
        if not self._waiting:
            with contextlib.suppress(queue.Empty):
                worker, message = self._messages.get(timeout=seconds)
                self._handle(worker, message)
        return self._waiting.popleft() if self._waiting else None

    def close(self) -> None:
        """Kill all workers."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
        self._workers.clear()
        remove_scratch(SCRATCH)

    def _start_worker(self) -> _Worker:
        share = str(self._threads)
        process = subprocess.Popen(
            [sys.executable, "-m", "sparselet.studies.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share, "TOKENIZERS_PARALLELISM": "false"},
            process_group=0,  # an interrupt from the terminal goes to the parent only
            pass_fds=() if self._lock is None else (self._lock,),
        )
        worker = _Worker(process)
        self._workers.append(worker)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        self._send(worker, self._start)
        return worker

    def _assign(self, job: Job, worker: _Worker, attempts: int, ended: set[str]) -> None:
        worker.job, worker.attempts, worker.ended = job, attempts, ended
        self._send(worker, job.without(ended).to_json())

    def _send(self, worker: _Worker, content: dict[str, Any]) -> None:
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_listen` handles its exit
            worker.process.stdin.write(json.dumps(content) + "\n")
            worker.process.stdin.flush()

    def _listen(self, worker: _Worker) -> None:
        """Queue a worker's messages, and None when it exits."""
        process = worker.process
        assert process.stdout is not None
        errors = threading.Thread(target=lambda: worker.stderr.extend(process.stderr or ()), daemon=True)
        errors.start()
        for line in process.stdout:
            self._messages.put((worker, json.loads(line)))
        errors.join()
        process.wait()
        self._messages.put((worker, None))

    def _handle(self, worker: _Worker, message: dict[str, Any] | None) -> None:
        if message is None:
            self._replace(worker)
        elif message["state"] == "ready":
            worker.is_started = True
        elif message["state"] == "end":
            assert worker.job is not None
            self._waiting.append(Event("end", worker.job.key))
            worker.job = None
        else:
            if message["state"] in ("done", "failed"):
                worker.ended.add(message["key"])
            self._waiting.append(Event(**message))

    def _replace(self, worker: _Worker) -> None:
        """Replace a dead worker and run its job again; after the last attempt, fail the job's units."""
        self._workers.remove(worker)
        end, tail = _describe_exit(worker.process.returncode), " ".join("".join(worker.stderr).split())
        if not worker.is_started:
            raise WorkerFailed(f"a worker process could not start: it {end}. Its standard error: {tail or 'empty'}")
        if worker.job is None:
            return
        if worker.attempts < ATTEMPTS:
            self._assign(worker.job, self._start_worker(), worker.attempts + 1, worker.ended)
            return
        error = f"worker {end}, {ATTEMPTS} times." + (f" Its last standard error: {tail}" if tail else "")
        remaining = worker.job.without(worker.ended).units
        self._waiting.extend(Event("failed", unit.key, error=error) for unit in remaining)
        self._waiting.append(Event("end", worker.job.key))


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (", possibly for lack of memory" if name == "SIGKILL" else "")
