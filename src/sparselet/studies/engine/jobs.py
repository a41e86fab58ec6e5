"""What a worker is given at once: one training, one merge to start from, or all evaluations of one subject."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sparselet.studies.engine.unit import Unit, packed, unpacked


@dataclass(frozen=True)
class Job:
    """Units that are done together, in this order; evaluations share their inputs and their model.

    needs: keys of the units that must be done before.
    """

    units: tuple[Unit, ...]
    needs: frozenset[str]

    @property
    def key(self) -> str:
        """That of its first unit."""
        return self.units[0].key

    def without(self, done: Collection[str]) -> "Job":
        """What is left of it."""
        return Job(tuple(unit for unit in self.units if unit.key not in done), self.needs)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for `from_json`."""
        return {"units": packed(self.units), "wanted": [unit.key for unit in self.units], "needs": sorted(self.needs)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Job":
        """What `to_json` gave."""
        units = unpacked(content["units"])
        return cls(tuple(units[key] for key in content["wanted"]), frozenset(content["needs"]))


def stored(units: Iterable[Unit]) -> dict[str, Unit]:
    """Those of the units of a plan that have a result of their own, by key: all but merges that no training starts from,
    which are made anew in memory wherever they are evaluated."""
    units = list(units)
    starts = {one.key for unit in units if unit.kind == "train" for one in unit.inputs}
    return {unit.key: unit for unit in units if unit.kind != "merge" or unit.key in starts}


def make_jobs(units: Iterable[Unit]) -> list[Job]:
    """The units as jobs: evaluations that have the same inputs, model and threads are one."""
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(_subject(unit) if unit.kind == "evaluate" else unit.key, []).append(unit)
    return [Job(tuple(group), frozenset(_needs(group[0]))) for group in groups.values()]


def priorities(jobs: Iterable[Job], seconds: Callable[[Unit], float]) -> dict[str, float]:
    """By key of job, how long it and the longest chain of jobs that wait for it take: what is to be begun first."""
    jobs = list(jobs)
    waiting: dict[str, list[Job]] = {}
    for job in jobs:
        for key in job.needs:
            waiting.setdefault(key, []).append(job)
    found: dict[str, float] = {}

    def chain(job: Job) -> float:
        if job.key not in found:
            after = {other.key: other for unit in job.units for other in waiting.get(unit.key, [])}
            found[job.key] = sum(map(seconds, job.units)) + max(map(chain, after.values()), default=0.0)
        return found[job.key]

    return {job.key: chain(job) for job in jobs}


def seconds_left(jobs: Iterable[Job], seconds: Callable[[Unit], float], workers: int) -> float:
    """Until all jobs are done by so many workers: at least as long as the longest chain of jobs that wait for each other."""
    jobs = list(jobs)
    every = sum(seconds(unit) for job in jobs for unit in job.units)
    return max(every / workers, max(priorities(jobs, seconds).values(), default=0.0))


def _subject(unit: Unit) -> str:
    """What is in the model when an evaluation is made."""
    same = {name: unit.settings.get(name) for name in ("mask", "model", "base", "threads", "dtype")}
    return f"{[one.key for one in unit.inputs]} {same}"


def _needs(unit: Unit) -> Iterable[str]:
    """Keys of the units that must be done before: of a merge that is made in memory, its experts."""
    for one in unit.inputs:
        if one.kind == "merge" and unit.kind == "evaluate":
            yield from _needs(one)
        else:
            yield one.key
