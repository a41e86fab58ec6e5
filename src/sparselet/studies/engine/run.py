"""Running a study: jobs in order of priority, until all units are done, failed or blocked."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator

from sparselet.errors import StudyRunning, WriteFailed
from sparselet.io.write_errors import convert_write_errors
from sparselet.studies.engine.cost import Estimates
from sparselet.studies.engine.jobs import Event, Job, make_jobs, priorities, seconds_left, stored
from sparselet.studies.engine.local import Executor
from sparselet.studies.engine.plan import Progress, learn_costs, plan
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.unit import Unit, closure

TICK = 0.5  # seconds between two updates
PATIENCE = 5.0  # seconds to wait for the lock, which workers of a killed run hold until they exit

OnProgress = Callable[[Progress], None]


def run_study(
    units: Iterable[Unit], store: Store, executor: Executor, on_progress: OnProgress = lambda progress: None
) -> Progress:
    """Do all units that are not done. A failed unit is recorded, and the units that do not depend on it are still done.

    on_progress: called after each event, and twice a second.
    Raises BadConfig (a damaged result), WriteFailed (when earlier failures are removed), WorkerFailed.
    """
    try:
        progress = plan(units, store)
        store.clear_failures(progress.failed)
        progress.failed.clear()
        _Run(progress, store, executor, learn_costs(progress, store)).loop(on_progress)
    finally:
        executor.close()
    return progress


def read_measures(units: Iterable[Unit], store: Store) -> dict[str, dict[str, float]]:
    """The measured numbers of all units that are done, by key. Raises BadConfig."""
    results = store.results(stored(closure(units).values()).values())
    return {key: result.measures() for key, result in results.items()}


@contextlib.contextmanager
def lock_study(store: Store) -> Iterator[int]:
    """Holds the study's lock within the block. Yields the descriptor of the lock file, which workers inherit.

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
                    raise StudyRunning(f"another process runs the study in {store.out}. Wait until it ends.") from None
                time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


class _Run:
    """The waiting and the running jobs of a run."""

    def __init__(self, progress: Progress, store: Store, executor: Executor, estimates: Estimates) -> None:
        self.progress, self.store, self.executor, self.estimates = progress, store, executor, estimates
        self.waiting = {job.key: job for job in make_jobs(progress.missing.values())}
        self.running: dict[str, Job] = {}
        self.priorities = self._priorities()
        self.estimated = 0.0

    def loop(self, on_progress: OnProgress) -> None:
        """Run until no job waits or runs."""
        while self.waiting or self.running:
            self._submit()
            if time.monotonic() - self.estimated > TICK:
                self._estimate()
            on_progress(self.progress)
            if event := self.executor.event(TICK):
                self._handle(event)
        self._estimate()
        on_progress(self.progress)

    def _submit(self) -> None:
        """Submit the jobs whose needs are done, longest chain first; drop jobs that depend on a failed unit."""
        while blocked := self._blocked():
            self.progress.blocked.update(blocked)
            self.waiting = {key: job for key, job in self.waiting.items() if key not in blocked}
        startable = [job for job in self.waiting.values() if job.needs <= self.progress.done]
        for job in sorted(startable, key=lambda job: -self.priorities[job.key])[: self.executor.slots - len(self.running)]:
            self.running[job.key] = self.waiting.pop(job.key)
            self.progress.running[job.key] = 0.0
            self.executor.submit(job)

    def _blocked(self) -> dict[str, str]:
        """Waiting units that depend on a failed unit, directly or not, with the key of the failed one."""
        causes = {key: key for key in self.progress.failed} | self.progress.blocked
        blocked: dict[str, str] = {}
        for job in self.waiting.values():
            if failed := sorted(job.needs & causes.keys()):
                blocked |= {unit.key: causes[failed[0]] for unit in job.units}
        return blocked

    def _handle(self, event: Event) -> None:
        progress, key = self.progress, event.key
        if event.state == "end":
            for unit in self.running.pop(key).units:
                progress.running.pop(unit.key, None)
                if unit.key not in progress.done and unit.key not in progress.failed:
                    # Without an entry, units that depend on it would wait for ever.
                    progress.failed[unit.key] = "worker exited without reporting a result."
            self.priorities = self._priorities()
        elif event.state in ("started", "progress"):
            progress.running[key] = event.fraction
        elif event.state == "done":
            progress.running.pop(key, None)
            progress.done.add(key)
            if cost := self.store.cost(key):
                self.estimates.learn(progress.units[key], cost)
        else:
            progress.running.pop(key, None)
            progress.failed[key] = event.error
            with contextlib.suppress(WriteFailed):  # the run's result has the error as well
                self.store.fail(progress.units[key], event.error)

    def _priorities(self) -> dict[str, float]:
        return priorities(self.waiting.values(), self.estimates.seconds)

    def _estimate(self) -> None:
        """Update the estimate of the seconds left."""
        ended = self.progress.done | self.progress.failed.keys()

        def left(unit: Unit) -> float:
            share = 0.0 if unit.key in ended else 1 - self.progress.running.get(unit.key, 0.0)
            return share * self.estimates.seconds(unit)

        self.estimated = time.monotonic()
        self.progress.seconds_left = seconds_left([*self.running.values(), *self.waiting.values()], left, self.executor.slots)
