"""Jobs done by worker processes on this machine."""

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
from typing import Any, Literal, Protocol

from sparselet.errors import WorkerFailed
from sparselet.io.temporaries import remove_scratch
from sparselet.studies.engine.jobs import Job
from sparselet.studies.engine.perform import Places
from sparselet.studies.engine.store import SCRATCH, Store

ATTEMPTS = 3  # at a job whose worker dies
TAIL = 20  # lines of a worker's standard error that are kept


@dataclass(frozen=True)
class Event:
    """What an executor tells. key: of a unit, or, at the end, of the job as it was given.

    fraction: of the unit that is done. text: why it failed.
    """

    what: Literal["started", "progress", "done", "failed", "end"]
    key: str
    fraction: float = 0.0
    text: str = ""


class Executor(Protocol):
    """What does jobs. slots: how many at a time."""

    slots: int

    def submit(self, job: Job) -> None:
        """Begin a job; not more than `slots` are under way. Its units' ends are told, each once, and then its own."""

    def event(self, seconds: float) -> Event | None:
        """The next event; None if there is none within this time."""

    def close(self) -> None:
        """Stop all that is under way."""


@dataclass
class _Worker:
    process: "subprocess.Popen[str]"
    stderr: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))
    ready: bool = False
    job: Job | None = None
    told: set[str] = field(default_factory=set)  # units of the job that are done or failed
    attempts: int = 1


class LocalExecutor:
    """Worker processes, started when they are first needed, each with its share of the cores.

    threads: that a worker computes with. lock: an open file that workers hold too, until the last of them has ended.
    A worker that dies is replaced, and its job done again, three times in all. `event` raises WorkerFailed where a worker
    ends before it could be given a job.
    """

    def __init__(self, store: Store, places: Places, workers: int, threads: int, lock: int | None = None) -> None:
        self.slots = workers
        self._start = {"out": store.out, "tasks": dict(places.tasks), "model": places.model}
        self._threads, self._lock = threads, lock
        self._workers: list[_Worker] = []
        self._told: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self._waiting: deque[Event] = deque()

    def submit(self, job: Job) -> None:
        """Give a job to an idle worker, or a new one."""
        self._give(job, next((worker for worker in self._workers if worker.job is None), None) or self._new(), 1, set())

    def event(self, seconds: float) -> Event | None:
        """The next event; None if there is none within this time. Raises WorkerFailed."""
        if not self._waiting:
            with contextlib.suppress(queue.Empty):
                worker, message = self._told.get(timeout=seconds)
                self._hear(worker, message)
        return self._waiting.popleft() if self._waiting else None

    def close(self) -> None:
        """End all workers at once."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
        self._workers.clear()
        remove_scratch(SCRATCH)

    def _new(self) -> _Worker:
        share = str(self._threads)
        process = subprocess.Popen(
            [sys.executable, "-m", "sparselet.studies.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share, "TOKENIZERS_PARALLELISM": "false"},
            process_group=0,  # an interrupt from the terminal is its parent's to handle
            pass_fds=() if self._lock is None else (self._lock,),
        )
        worker = _Worker(process)
        self._workers.append(worker)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        self._send(worker, self._start)
        return worker

    def _give(self, job: Job, worker: _Worker, attempts: int, told: set[str]) -> None:
        worker.job, worker.attempts, worker.told = job, attempts, told
        self._send(worker, job.without(told).to_json())

    def _send(self, worker: _Worker, content: dict[str, Any]) -> None:
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # that it is dead is heard from its output
            worker.process.stdin.write(json.dumps(content) + "\n")
            worker.process.stdin.flush()

    def _listen(self, worker: _Worker) -> None:
        """Pass on what a worker says, and at last None."""
        process = worker.process
        assert process.stdout is not None
        errors = threading.Thread(target=lambda: worker.stderr.extend(process.stderr or ()), daemon=True)
        errors.start()
        for line in process.stdout:
            self._told.put((worker, json.loads(line)))
        errors.join()
        process.wait()
        self._told.put((worker, None))

    def _hear(self, worker: _Worker, message: dict[str, Any] | None) -> None:
        if message is None:
            self._replace(worker)
        elif message["what"] == "ready":
            worker.ready = True
        elif message["what"] == "end":
            assert worker.job is not None
            self._waiting.append(Event("end", worker.job.key))
            worker.job = None
        else:
            if message["what"] in ("done", "failed"):
                worker.told.add(message["key"])
            self._waiting.append(Event(message["what"], message["key"], message["fraction"], message["error"]))

    def _replace(self, worker: _Worker) -> None:
        """After a worker's death."""
        self._workers.remove(worker)
        how, tail = _how_it_ended(worker.process.returncode), " ".join("".join(worker.stderr).split())
        if not worker.ready:
            raise WorkerFailed(f"a worker process could not start: {how}. It said: {tail or 'nothing'}")
        if worker.job is None:
            return
        if worker.attempts < ATTEMPTS:
            self._give(worker.job, self._new(), worker.attempts + 1, worker.told)
            return
        text = f"its worker {how}, {ATTEMPTS} times." + (f" The last said: {tail}" if tail else "")
        left = worker.job.without(worker.told).units
        self._waiting.extend(Event("failed", unit.key, text=text) for unit in left)
        self._waiting.append(Event("end", worker.job.key))


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (", as happens where memory runs out" if name == "SIGKILL" else "")
