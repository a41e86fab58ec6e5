"""A study of a few seconds: a tiny model, three tasks, every kind of unit."""

import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path

from helpers.tiny import save_base, save_task

from sparselet.models import model_fingerprint
from sparselet.studies.engine.jobs import Job
from sparselet.studies.engine.local import Event
from sparselet.studies.engine.perform import Performer, Places
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.unit import Unit, closure
from sparselet.tasks.task import load_task

TASKS = ("backwards", "second", "third")


def make_places(directory: Path) -> Places:
    """A model and three tasks of a few rows each."""
    tasks = {name: save_task(directory / "tasks" / name, 6 + i, 2, 3) for i, name in enumerate(TASKS)}
    return Places(tasks, save_base(directory / "base"))


def model_of(places: Places) -> dict:
    return {"model": "tiny", "base": model_fingerprint(places.model), "dtype": "float32", "threads": 1}


def make_train(places: Places, tasks: tuple[str, ...], start: Unit | None = None, **changes) -> Unit:
    """A training of two epochs."""
    data = {task: load_task(places.tasks[task], ("train", "validation")).fingerprint() for task in tasks}
    train = {"epochs": 2.0, "learning_rate": 1e-2, "batch_size": 2, **changes}
    settings = {**model_of(places), "task": list(tasks), "data": data, "train": train}
    return Unit("train", settings, () if start is None else (start,), f"{'+'.join(tasks)}: {changes}")


def make_score(places: Places, subject: Unit | None, task: str, masks: Unit | None = None, **asked) -> Unit:
    """An evaluation of a few tokens."""
    told = {
        **model_of(places),
        "task": task,
        "data": load_task(places.tasks[task], ("test",)).fingerprint(),
        "eval": {"max_new_tokens": 6, **asked},
        "mask": masks is not None,
    }
    return Unit("evaluate", told, tuple(u for u in (subject, masks) if u is not None), f"{task} of {subject and subject.label}")


def make_merge(experts: list[Unit], method: str = "overlap", **parameters) -> Unit:
    return Unit("merge", {"method": method, "parameters": parameters}, tuple(experts), method)


def make_units(places: Places) -> list[Unit]:
    """Two experts, a LoRA, a checkpoint, merges of them, a second stage and what each of them scores."""
    first, second = (
        make_train(places, (task,), density=0.25, block_size=size) for task, size in zip(TASKS, (1, 4), strict=False)
    )
    lora = make_train(places, ("backwards",), method="lora", lora_rank=2)
    full = [make_train(places, (task,), method="full") for task in TASKS[:2]]
    merged = make_merge([first, second])
    later = make_train(places, TASKS[:2], start=merged, epochs=1.0)
    merged_full = make_merge(full, "uniform")
    scores = [make_score(places, subject, task) for subject in (None, merged, merged_full, later) for task in TASKS]
    scores += [make_score(places, one, "backwards") for one in (first, lora, full[0])]
    return [*scores, make_score(places, merged, "second", masks=second)]


def results_of(out: Path) -> dict[str, bytes]:
    """The bytes of every result and every answer."""
    files = [file for name in ("result.json", "answers.jsonl") for file in Path(out).glob(f"units/*/{name}")]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def copy_without(store: Store, out: Path, removed: Callable[[Unit], bool], units: list[Unit]) -> Store:
    """A copy of a store in which these units, and all that read them, are not done."""
    shutil.copytree(store.path / "units", out / "units")
    gone: set[str] = set()
    for key, unit in closure(units).items():
        if removed(unit) or any(one.key in gone for one in unit.inputs):
            gone.add(key)
            shutil.rmtree(out / "units" / key, ignore_errors=True)
    return Store(out)


class InThisProcess:
    """An executor that does each job at once, in this process. before: called with each job."""

    def __init__(self, store: Store, places: Places, before: Callable[[Job], None] = lambda job: None, slots: int = 1) -> None:
        self.slots, self.before, self.jobs = slots, before, []
        self._performer = Performer(store, places)
        self._events = deque()

    def submit(self, job: Job) -> None:
        self.before(job)
        self.jobs.append(job)
        self._performer.perform(job, lambda r: self._events.append(Event(r.what, r.key, r.fraction, r.error)))
        self._events.append(Event("end", job.key))

    def event(self, seconds: float) -> Event | None:
        return self._events.popleft() if self._events else None

    def close(self) -> None:
        pass
