"""Running a study: what is left to do, in which order, and what came of it."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sparselet.errors import StudyRunning, WriteFailed
from sparselet.io.write_errors import convert_write_errors
from sparselet.studies.engine.cost import Estimates
from sparselet.studies.engine.jobs import Job, make_jobs, priorities, seconds_left, stored
from sparselet.studies.engine.local import Event, Executor
from sparselet.studies.engine.plan import Progress, learn, plan
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.unit import Unit, closure

TICK = 0.5  # seconds between two looks at what goes on
PATIENCE = 5.0  # seconds to wait for workers of a run that was killed


Watch = Callable[[Progress], None]


def run_study(units: Iterable[Unit], store: Store, executor: Executor, watch: Watch = lambda progress: None) -> Progress:
    """Do all units that are not done. A unit that fails is kept as such, and the rest go on.

    watch: called when something changed, and twice a second.
    Raises BadConfig (a result that cannot be read), WriteFailed (of the failures kept from before), WorkerFailed.
    """
    try:
        progress = plan(units, store)
        store.forgive(progress.failed)
        progress.failed.clear()
        _Run(progress, store, executor, learn(progress, store)).loop(watch)
    finally:
        executor.close()
    return progress


def gather(units: Iterable[Unit], store: Store) -> dict[str, dict[str, Any]]:
    """The results of all units that are done, by key. Raises BadConfig."""
    return store.results(stored(closure(units).values()))


@contextlib.contextmanager
def claimed(store: Store) -> Iterator[int]:
    """Within the block no other process runs this study. Yields the open lock, for workers to hold as well.

    Raises StudyRunning, WriteFailed.
    """
    with convert_write_errors(store.lock):
        store.lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(store.lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise StudyRunning(f"another process runs the study in {store.out}. Wait for it.") from None
                time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


class _Run:
    """The jobs of a run: those that wait, and those under way."""

    def __init__(self, progress: Progress, store: Store, executor: Executor, estimates: Estimates) -> None:
        self.progress, self.store, self.executor, self.estimates = progress, store, executor, estimates
        self.waiting = {job.key: job for job in make_jobs(progress.missing.values())}
        self.running: dict[str, Job] = {}
        self.priorities = self._priorities()
        self.estimated = 0.0

    def loop(self, watch: Watch) -> None:
        """Until nothing waits and nothing runs."""
        while self.waiting or self.running:
            self._submit()
            if time.monotonic() - self.estimated > TICK:
                self._estimate()
            watch(self.progress)
            if event := self.executor.event(TICK):
                self._note(event)
        self._estimate()
        watch(self.progress)

    def _submit(self) -> None:
        """Begin what can be begun, the longest chain first; give up what waits for something that failed."""
        while blocked := self._blocked():
            self.progress.blocked.update(blocked)
            self.waiting = {key: job for key, job in self.waiting.items() if key not in blocked}
        ready = [job for job in self.waiting.values() if job.needs <= self.progress.done]
        for job in sorted(ready, key=lambda job: -self.priorities[job.key])[: self.executor.slots - len(self.running)]:
            self.running[job.key] = self.waiting.pop(job.key)
            self.progress.running[job.key] = 0.0
            self.executor.submit(job)

    def _blocked(self) -> dict[str, str]:
        """Units that wait for something that failed, or that waits for such itself; and what that is."""
        lost = {key: key for key in self.progress.failed} | self.progress.blocked
        found: dict[str, str] = {}
        for job in self.waiting.values():
            if missing := sorted(job.needs & lost.keys()):
                found |= {unit.key: lost[missing[0]] for unit in job.units}
        return found

    def _note(self, event: Event) -> None:
        progress, key = self.progress, event.key
        if event.what == "end":
            for unit in self.running.pop(key).units:
                progress.running.pop(unit.key, None)
                if unit.key not in progress.done and unit.key not in progress.failed:
                    # What waits for it must not wait for ever.
                    progress.failed[unit.key] = "its worker ended the job without a word of it."
            self.priorities = self._priorities()
        elif event.what in ("started", "progress"):
            progress.running[key] = event.fraction
        elif event.what == "done":
            progress.running.pop(key, None)
            progress.done.add(key)
            if cost := self.store.cost(key):
                self.estimates.learn(progress.units[key], cost)
        else:
            progress.running.pop(key, None)
            progress.failed[key] = event.text
            with contextlib.suppress(WriteFailed):  # it is told all the same
                self.store.fail(progress.units[key], event.text)

    def _priorities(self) -> dict[str, float]:
        return priorities(self.waiting.values(), self.estimates.seconds)

    def _estimate(self) -> None:
        """How long it will take from here."""
        over = self.progress.done | self.progress.failed.keys()

        def left(unit: Unit) -> float:
            share = 0.0 if unit.key in over else 1 - self.progress.running.get(unit.key, 0.0)
            return share * self.estimates.seconds(unit)

        self.estimated = time.monotonic()
        self.progress.seconds_left = seconds_left([*self.running.values(), *self.waiting.values()], left, self.executor.slots)
