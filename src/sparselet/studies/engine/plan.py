"""The plan of a study and its progress: units, their state, estimated time and disk."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparselet.studies.engine.cost import Estimates
from sparselet.studies.engine.jobs import make_jobs, seconds_left, stored
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.unit import KINDS, Unit, closure
from sparselet.studies.table import Table


@dataclass
class Progress:
    """The state of a study's units, by key. units: all that have a result of their own. done: those that have it now.

    running: the fraction that is done. failed: errors. blocked: the key of the failed unit that a unit depends on.
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
        """Units that are not done."""
        return {key: unit for key, unit in self.units.items() if key not in self.done}


def plan(units: Iterable[Unit], store: Store) -> Progress:
    """The units and all their inputs: which are done, and which failed at the last attempt. Raises BadConfig."""
    planned = stored(closure(units).values())
    done = set(store.results(planned.values()))
    failures = {key: error for key, error in store.failures().items() if key in planned and key not in done}
    return Progress(planned, done, failed=failures)


def learn_costs(progress: Progress, store: Store, model_bytes: int = 0) -> Estimates:
    """Estimates from the costs of the units that are done. model_bytes: size of the base model's weights. Raises BadConfig."""
    estimates = Estimates(model_bytes)
    for key in sorted(progress.done):
        cost = store.cost(key)
        if cost is not None:
            estimates.learn(progress.units[key], cost)
    return estimates


def describe_plan(tables: Mapping[str, Table], progress: Progress, estimates: Estimates, workers: int) -> dict[str, Any]:
    """The plan as JSON values; a unit counts for the first table that needs it.

    tables: by name the number of units of each kind and of those `left` to do, and their seconds of work. Then the same for all
    units, `done` and `failed`; seconds until `workers` have done all; bytes that will be written; `rough` if a kind of unit was
    never measured.
    """
    missing, seen = progress.missing, set()
    rows = {}
    for name, table in tables.items():
        new = {key: unit for key, unit in closure(table.units()).items() if key not in seen}
        seen |= new.keys()
        left = [unit for key, unit in new.items() if key in missing]
        rows[name] = _count_kinds(new.values(), len(left), sum(map(estimates.seconds, left)))
    jobs = make_jobs(missing.values())
    units = closure(unit for table in tables.values() for unit in table.units()).values()
    return {
        "tables": rows,
        **_count_kinds(units, len(missing), seconds_left(jobs, estimates.seconds, workers)),
        "done": len(progress.done),
        "failed": len(progress.failed),
        "bytes": sum(map(estimates.bytes, missing.values())),
        "rough": not all(map(estimates.is_measured, missing.values())),
        "workers": workers,
    }


def describe_state(progress: Progress) -> dict[str, Any]:
    """Numbers of done and missing units by kind, failed units with their errors, and blocked units, as JSON values."""

    def describe(key: str) -> dict[str, str]:
        return {"key": key, "kind": progress.units[key].kind, "label": progress.units[key].label}

    return {
        "done": dict(Counter(progress.units[key].kind for key in progress.done)),
        "missing": dict(Counter(unit.kind for unit in progress.missing.values())),
        "failed": [describe(key) | {"error": error} for key, error in progress.failed.items()],
        "blocked": [describe(key) | {"waits_for": progress.units[cause].label} for key, cause in progress.blocked.items()],
    }


def _count_kinds(units: Iterable[Unit], left: int, seconds: float) -> dict[str, Any]:
    kinds = Counter(unit.kind for unit in units)
    return {**{kind: kinds[kind] for kind in KINDS}, "left": left, "seconds": seconds}
