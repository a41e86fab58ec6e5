"""A study of a few seconds: a tiny model, three tasks, every kind of unit."""

import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path

from helpers.tiny import save_base, save_task

from sparselet.evaluation import EvalSettings
from sparselet.models import model_fingerprint
from sparselet.studies.engine.job_runner import JobRunner, StudySources
from sparselet.studies.engine.jobs import Event, Job
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.unit import EvalUnit, MergeUnit, ModelSettings, TrainUnit, Unit, closure
from sparselet.tasks.task import load_task
from sparselet.training.settings import TrainSettings

TASKS = ("backwards", "second", "third")


def make_sources(directory: Path) -> StudySources:
    """A model and three tasks of a few rows each."""
    tasks = {name: save_task(directory / "tasks" / name, 6 + i, 2, 3) for i, name in enumerate(TASKS)}
    return StudySources(tasks, save_base(directory / "base"))


def model_of(sources: StudySources) -> ModelSettings:
    return ModelSettings("tiny", model_fingerprint(sources.model))


def make_train(sources: StudySources, tasks: tuple[str, ...], initial: MergeUnit | None = None, **changes) -> TrainUnit:
    """A training of two epochs."""
    data = {task: load_task(sources.tasks[task], ("train", "validation")).fingerprint() for task in tasks}
    values = {"epochs": 2.0, "learning_rate": 1e-2, "batch_size": 2, **changes}
    settings = TrainSettings(task=tasks, init_from=initial and initial.key, **values)
    return TrainUnit(model_of(sources), data, settings, initial, f"{'+'.join(tasks)}: {changes}")


def make_score(sources: StudySources, subject: Unit | None, task: str, mask: TrainUnit | None = None, **changes) -> EvalUnit:
    """An evaluation of a few tokens."""
    settings, data = EvalSettings(max_new_tokens=6, **changes), load_task(sources.tasks[task], ("test",)).fingerprint()
    return EvalUnit(model_of(sources), task, data, settings, subject, mask, f"{task} of {subject and subject.label}")


def make_merge(experts: list[TrainUnit], method: str = "overlap", **parameters) -> MergeUnit:
    return MergeUnit(method, parameters, tuple(experts), method)


def make_units(sources: StudySources) -> list[Unit]:
    """Two experts, a LoRA, a checkpoint, merges of them, a second stage and what each of them scores."""
    first, second = (
        make_train(sources, (task,), density=0.25, block_size=size) for task, size in zip(TASKS, (1, 4), strict=False)
    )
    lora = make_train(sources, ("backwards",), method="lora", lora_rank=2)
    full = [make_train(sources, (task,), method="full") for task in TASKS[:2]]
    merged = make_merge([first, second])
    later = make_train(sources, TASKS[:2], initial=merged, epochs=1.0)
    merged_full = make_merge(full, "uniform")
    scores = [make_score(sources, subject, task) for subject in (None, merged, merged_full, later) for task in TASKS]
    scores += [make_score(sources, one, "backwards") for one in (first, lora, full[0])]
    return [*scores, make_score(sources, merged, "second", mask=second)]


def results_of(out: Path) -> dict[str, bytes]:
    """The bytes of every result and every answer."""
    files = [file for name in ("result.json", "answers.jsonl") for file in Path(out).glob(f"units/*/{name}")]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def copy_without(store: Store, out: Path, removed: Callable[[Unit], bool], units: list[Unit]) -> Store:
    """A copy of a store in which these units, and all that read them, are not done."""
    shutil.copytree(store.path / "units", out / "units")
    gone: set[str] = set()
    for key, unit in closure(units).items():
        if removed(unit) or any(source.key in gone for source in unit.inputs):
            gone.add(key)
            shutil.rmtree(out / "units" / key, ignore_errors=True)
    return Store(out)


class InThisProcess:
    """An executor that does each job at once, in this process. before: called with each job."""

    def __init__(
        self, store: Store, sources: StudySources, before: Callable[[Job], None] = lambda job: None, slots: int = 1
    ) -> None:
        self.slots, self.before, self.jobs = slots, before, []
        self._runner = JobRunner(store, sources)
        self._events = deque()

    def submit(self, job: Job) -> None:
        self.before(job)
        self.jobs.append(job)
        self._runner.run(job, self._events.append)
        self._events.append(Event("end", job.key))

    def event(self, seconds: float) -> Event | None:
        return self._events.popleft() if self._events else None

    def close(self) -> None:
        pass


def small_letters(answers, targets):
    """A metric: the share of small letters, per hundred."""
    return 100 * sum(letter.islower() for letter in answers[0]) / max(1, len(answers[0]))
