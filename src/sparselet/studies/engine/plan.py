"""What a study has to do, before and while it is done: units, their state, estimated time and disk."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparselet.studies.engine.cost import Estimates
from sparselet.studies.engine.jobs import make_jobs, seconds_left, stored
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.unit import Unit, closure
from sparselet.studies.table import Table


@dataclass
class Progress:
    """How far a study is. units: all that have a result of their own, by key. done: those that have it now.

    running: fraction done of those under way. failed: why, by key. blocked: the failed unit that each waits for, by key.
    seconds_left: an estimate.
    """

    units: Mapping[str, Unit]
    done: set[str]
    running: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    seconds_left: float = 0.0

    @property
    def missing(self) -> dict[str, Unit]:
        """The units that are not done."""
        return {key: unit for key, unit in self.units.items() if key not in self.done}


def plan(units: Iterable[Unit], store: Store) -> Progress:
    """What a study has to do, what of it is done, and what failed at the last attempt. Raises BadConfig."""
    wanted = stored(closure(units).values())
    done = set(store.results(wanted))
    failures = store.failures()
    return Progress(wanted, done, failed={key: failures[key] for key in wanted if key in failures and key not in done})


def learn(progress: Progress, store: Store, model_bytes: int = 0) -> Estimates:
    """Estimates from the units that are done. model_bytes: size of the base model's weights. Raises BadConfig."""
    estimates = Estimates(model_bytes)
    for key in sorted(progress.done):
        cost = store.cost(key)
        if cost is not None:
            estimates.learn(progress.units[key], cost)
    return estimates


def describe_plan(tables: Mapping[str, Table], progress: Progress, estimates: Estimates, workers: int) -> dict[str, Any]:
    """The plan as JSON values; a unit counts for the first table that needs it.

    tables: by name the units of each kind, `left` to do, and seconds of work in them. Then the same of all, `done` and
    `failed`; seconds until so many workers have done all; bytes that will be written; `rough` if these are guesses, as nothing
    of some kind was measured.
    """
    missing, seen = progress.missing, set()
    rows = {}
    for name, table in tables.items():
        own = {key: unit for key, unit in closure(table.units()).items() if key not in seen}
        seen |= own.keys()
        left = [unit for key, unit in own.items() if key in missing]
        rows[name] = _counted(own.values(), len(left), sum(map(estimates.seconds, left)))
    jobs = make_jobs(missing.values())
    every = closure(unit for table in tables.values() for unit in table.units()).values()
    return {
        "tables": rows,
        **_counted(every, len(missing), seconds_left(jobs, estimates.seconds, workers)),
        "done": len(progress.done),
        "failed": len(progress.failed),
        "bytes": sum(map(estimates.bytes, missing.values())),
        "rough": not all(map(estimates.known, missing.values())),
        "workers": workers,
    }


def describe_state(progress: Progress) -> dict[str, Any]:
    """What is done, missing, failed and why, as JSON values."""

    def about(key: str, **more: str) -> dict[str, str]:
        return {"key": key, "kind": progress.units[key].kind, "label": progress.units[key].label, **more}

    return {
        "done": dict(Counter(progress.units[key].kind for key in progress.done)),
        "missing": dict(Counter(unit.kind for unit in progress.missing.values())),
        "failed": [about(key, error=error) for key, error in progress.failed.items()],
        "blocked": [about(key, waits_for=progress.units[other].label) for key, other in progress.blocked.items()],
    }


def _counted(units: Iterable[Unit], left: int, seconds: float) -> dict[str, Any]:
    kinds = Counter(unit.kind for unit in units)
    return {**{kind: kinds[kind] for kind in ("train", "merge", "evaluate")}, "left": left, "seconds": seconds}
