"""What units take: measured while they are done, and estimated before, from those of their kind that are done."""

import contextlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparselet.studies.engine.unit import Unit

# Where nothing is measured yet: seconds a training row and epoch, and an evaluated row, of a model of 135M parameters on one
# core; rows where the settings take all of them.
TRAIN_SECONDS, EVALUATE_SECONDS, ROWS = 0.25, 0.4, 1000


@contextlib.contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """Yields a dictionary that is filled at the end: seconds, cpu_seconds, peak_bytes (of resident memory) and host."""
    cost: dict[str, Any] = {}
    _reset_peak()
    started, cpu = time.monotonic(), time.process_time()
    yield cost
    cost |= {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu}
    cost |= {"peak_bytes": _peak(), "host": platform.node()}


def together(cost: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """A cost with what came before it for its sake: times added, the higher peak."""
    seconds = {name: cost[name] + before.get(name, 0.0) for name in ("seconds", "cpu_seconds")}
    return {**cost, **seconds, "peak_bytes": max(cost["peak_bytes"], before["peak_bytes"])}


def total(costs: Iterable[tuple[Unit, Mapping[str, Any]]]) -> dict[str, Any]:
    """What units took together: by kind their count, seconds and cpu_seconds; core_hours; peak_rss_bytes of a process."""
    kinds: dict[str, dict[str, float]] = {}
    peak = 0
    for unit, cost in costs:
        own = kinds.setdefault(unit.kind, {"count": 0, "seconds": 0.0, "cpu_seconds": 0.0})
        own["count"] += 1
        own["seconds"] += cost["seconds"]
        own["cpu_seconds"] += cost["cpu_seconds"]
        peak = max(peak, cost["peak_bytes"])
    core_hours = sum(own["cpu_seconds"] for own in kinds.values()) / 3600
    return {"units": kinds, "core_hours": core_hours, "peak_rss_bytes": peak}


class Estimates:
    """Seconds and bytes of units, from those done: by row, of the nearest kind that was measured.

    A unit's rate is the median rate of units alike in kind, method and tasks, else in kind and method, else in kind.
    model_bytes: size of the base model's weights, for what full methods write.
    """

    def __init__(self, model_bytes: int = 0) -> None:
        self.model_bytes = model_bytes
        self._seconds: dict[tuple[str, ...], list[float]] = {}
        self._bytes: dict[tuple[str, ...], list[float]] = {}
        self._rates: dict[tuple[str, ...], float] = {}

    def learn(self, unit: Unit, cost: Mapping[str, Any]) -> None:
        """Add what a unit took."""
        for alike in _alike(unit):
            self._seconds.setdefault(alike, []).append(cost["seconds"] / _amount(unit))
            self._rates.pop(alike, None)
        for alike in _alike(unit)[:2]:
            self._bytes.setdefault(alike, []).append(cost.get("bytes", 0))

    def seconds(self, unit: Unit) -> float:
        """How long a unit takes."""
        for alike in _alike(unit):
            if alike in self._seconds:
                if alike not in self._rates:
                    self._rates[alike] = statistics.median(self._seconds[alike])
                return self._rates[alike] * _amount(unit)
        return {"train": TRAIN_SECONDS, "merge": 1.0, "evaluate": EVALUATE_SECONDS}[unit.kind] * _amount(unit)

    def bytes(self, unit: Unit) -> float:
        """What a unit leaves on the disk."""
        for alike in _alike(unit)[:2]:
            if alike in self._bytes:
                return statistics.median(self._bytes[alike])
        if unit.kind == "evaluate":
            return 0.0
        train = unit.settings.get("train", {})
        if train.get("method") in ("full", "multitask"):
            return self.model_bytes
        # The targets are about a fifth of a small model; an entry has an index beside its value.
        return 0.2 * self.model_bytes * (2 * train.get("density", 0.1))

    def known(self, unit: Unit) -> bool:
        """Whether anything of its kind was measured."""
        return any(alike in self._seconds for alike in _alike(unit))


def _alike(unit: Unit) -> list[tuple[str, ...]]:
    """Names of ever larger sets of units that take about as long, for each row."""
    settings = unit.settings
    method = str(settings.get("train", {}).get("method", "sparse")) if unit.kind == "train" else ""
    tasks = settings.get("task", [])
    return [(unit.kind, method, *([tasks] if isinstance(tasks, str) else tasks)), (unit.kind, method, "any"), (unit.kind,)]


def _amount(unit: Unit) -> float:
    """Rows that a unit goes through."""
    if unit.kind == "train":
        train = unit.settings["train"]
        return (train.get("train_rows") or ROWS) * len(unit.settings["task"]) * train.get("epochs", 5.0)
    return (unit.settings["eval"].get("rows") or ROWS) if unit.kind == "evaluate" else max(1, len(unit.inputs))


def _reset_peak() -> None:
    """From here on the peak counts anew, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The peak of resident memory, in bytes."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
