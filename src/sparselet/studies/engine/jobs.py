"""Jobs: units that a worker gets together: one training, one stored merge, or all evaluations of one subject."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sparselet.studies.engine.unit import EvalUnit, MergeUnit, TrainUnit, Unit, units_from_json, units_to_json


@dataclass(frozen=True)
class Job:
    """Units that are done together, in this order; evaluations share their inputs and their model.

    needs: keys of the units that must be done before.
    """

    units: tuple[Unit, ...]
    needs: frozenset[str]

    @property
    def key(self) -> str:
        """The key of its first unit."""
        return self.units[0].key

    def without(self, keys: Collection[str]) -> "Job":
        """The job without the units of these keys."""
        return Job(tuple(unit for unit in self.units if unit.key not in keys), self.needs)

    def to_json(self) -> dict[str, Any]:
        """JSON values for `from_json`."""
        return {"units": units_to_json(self.units), "keys": [unit.key for unit in self.units], "needs": sorted(self.needs)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Job":
        """The job of `to_json`."""
        units = units_from_json(content["units"])
        return cls(tuple(units[key] for key in content["keys"]), frozenset(content["needs"]))


@dataclass(frozen=True)
class Event:
    """A change of state of a unit, or the end of a job. key: of the unit, or of the job as it was submitted.

    fraction: the part of the unit that is done. error: why it failed.
    """

    state: Literal["started", "progress", "done", "failed", "end"]
    key: str
    fraction: float = 0.0
    error: str = ""


EmitEvent = Callable[[Event], None]


def stored(units: Iterable[Unit]) -> dict[str, Unit]:
    """The units of a plan that have a result of their own, by key: all but merges that no training starts from, which are
    merged again in memory for each evaluation."""
    units = list(units)
    initial = {unit.initial.key for unit in units if isinstance(unit, TrainUnit) and unit.initial}
    return {unit.key: unit for unit in units if not isinstance(unit, MergeUnit) or unit.key in initial}


def make_jobs(units: Iterable[Unit]) -> list[Job]:
    """The units as jobs: evaluations that have the same inputs and model are one job."""
    groups: dict[Any, list[Unit]] = {}
    for unit in units:
        group = unit.key
        if isinstance(unit, EvalUnit):
            group = (*(source.key for source in unit.inputs), unit.mask is None, unit.model)
        groups.setdefault(group, []).append(unit)
    return [Job(tuple(group), frozenset(_needs(group[0]))) for group in groups.values()]


def priorities(jobs: Iterable[Job], seconds: Callable[[Unit], float]) -> dict[str, float]:
    """By key of job, the duration of it and of the longest chain of jobs that depend on it."""
    jobs = list(jobs)
    dependents: dict[str, list[Job]] = {}
    for job in jobs:
        for key in job.needs:
            dependents.setdefault(key, []).append(job)
    longest: dict[str, float] = {}

    def chain(job: Job) -> float:
        if job.key not in longest:
            after = {other.key: other for unit in job.units for other in dependents.get(unit.key, [])}
            longest[job.key] = sum(map(seconds, job.units)) + max(map(chain, after.values()), default=0.0)
        return longest[job.key]

    return {job.key: chain(job) for job in jobs}


def seconds_left(jobs: Iterable[Job], seconds: Callable[[Unit], float], workers: int) -> float:
    """Seconds until all jobs are done by so many workers, at least those of the longest chain of dependent jobs."""
    jobs = list(jobs)
    work = sum(seconds(unit) for job in jobs for unit in job.units)
    return max(work / workers, max(priorities(jobs, seconds).values(), default=0.0))


def _needs(unit: Unit) -> Iterable[str]:
    """Keys of the units that must be done before; instead of a merge in memory, those of its experts."""
    for source in unit.inputs:
        if source.kind == "merge" and unit.kind == "evaluate":
            yield from _needs(source)
        else:
            yield source.key
