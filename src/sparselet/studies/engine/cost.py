"""The cost of units: measured while they run, and estimated from similar units that are done."""

import contextlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparselet.studies.engine.unit import AnalysisUnit, EvalUnit, MergeUnit, TrainUnit, Unit
from sparselet.studies.engine.unit_results import UnitCost

# Defaults without a measurement: seconds of a training row in an epoch, and of an evaluated row, for a model of 135M parameters
# on one core; rows of a task whose settings take all of them.
TRAIN_SECONDS, EVALUATE_SECONDS, ROWS = 0.25, 0.4, 1000
DEFAULT_SECONDS = {"train": TRAIN_SECONDS, "merge": 1.0, "evaluate": EVALUATE_SECONDS, "analyse": 60.0}


class CostMeter:
    """Measures time and memory of this process from its creation on."""

    def __init__(self) -> None:
        _reset_peak()
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def read(self, size: int = 0) -> UnitCost:
        """The cost until now. size: bytes of the files that were written."""
        seconds, cpu_seconds = time.monotonic() - self._wall, time.process_time() - self._cpu
        return UnitCost(seconds, cpu_seconds, _peak(), platform.node(), size)


def summarize_costs(costs: Iterable[tuple[Unit, UnitCost]]) -> dict[str, Any]:
    """The sum of costs as JSON values: count, seconds and cpu_seconds of each kind; core_hours; the highest peak_rss_bytes."""
    kinds: dict[str, dict[str, float]] = {}
    peak = 0
    for unit, cost in costs:
        row = kinds.setdefault(unit.kind, {"count": 0, "seconds": 0.0, "cpu_seconds": 0.0})
        row["count"] += 1
        row["seconds"] += cost.seconds
        row["cpu_seconds"] += cost.cpu_seconds
        peak = max(peak, cost.peak_bytes)
    core_hours = sum(row["cpu_seconds"] for row in kinds.values()) / 3600
    return {"units": kinds, "core_hours": core_hours, "peak_rss_bytes": peak}


class Estimates:
    """Seconds and bytes of units, from those of similar units.

    The seconds of a row are the median of the units of the same kind, method and tasks; without one, of the same kind and
    method; without one, of the same kind. model_bytes: size of the base model's weights, which full methods write.
    """

    def __init__(self, model_bytes: int = 0) -> None:
        self.model_bytes = model_bytes
        self._seconds: dict[tuple[str, ...], list[float]] = {}
        self._bytes: dict[tuple[str, ...], list[float]] = {}
        self._medians: dict[tuple[str, ...], float] = {}

    def learn(self, unit: Unit, cost: UnitCost) -> None:
        """Add the cost of a unit."""
        for group in _groups(unit):
            self._seconds.setdefault(group, []).append(cost.seconds / _rows(unit))
            self._medians.pop(group, None)
        for group in _groups(unit)[:2]:
            self._bytes.setdefault(group, []).append(cost.bytes)

    def seconds(self, unit: Unit) -> float:
        """The duration of a unit."""
        for group in _groups(unit):
            if group in self._seconds:
                if group not in self._medians:
                    self._medians[group] = statistics.median(self._seconds[group])
                return self._medians[group] * _rows(unit)
        return DEFAULT_SECONDS[unit.kind] * _rows(unit)

    def bytes(self, unit: Unit) -> float:
        """The size of a unit's files."""
        for group in _groups(unit)[:2]:
            if group in self._bytes:
                return statistics.median(self._bytes[group])
        if isinstance(unit, EvalUnit | AnalysisUnit):
            return 0.0
        if isinstance(unit, TrainUnit) and unit.settings.method in ("full", "multitask"):
            return self.model_bytes
        density = unit.settings.density if isinstance(unit, TrainUnit) else 0.1
        return 0.2 * self.model_bytes * (2 * density)  # targets: about a fifth of a small model; each entry has an index

    def is_measured(self, unit: Unit) -> bool:
        """Whether a unit of this kind was measured."""
        return any(group in self._seconds for group in _groups(unit))


def _groups(unit: Unit) -> list[tuple[str, ...]]:
    """Ever larger groups of units that take about as long for each row."""
    method = unit.settings.method if isinstance(unit, TrainUnit) else ""
    if isinstance(unit, AnalysisUnit):
        method = unit.analysis
    tasks = unit.settings.tasks if isinstance(unit, TrainUnit) else (unit.task,) if isinstance(unit, EvalUnit) else ()
    return [(unit.kind, method, *tasks), (unit.kind, method, "any"), (unit.kind,)]


def _rows(unit: Unit) -> float:
    """Rows that a unit processes; experts of a merge."""
    if isinstance(unit, MergeUnit):
        return max(1, len(unit.experts))
    if isinstance(unit, EvalUnit):
        return unit.settings.rows or ROWS
    if isinstance(unit, AnalysisUnit):
        return 1
    return (unit.settings.train_rows or ROWS) * len(unit.settings.tasks) * unit.settings.epochs


def _reset_peak() -> None:
    """Reset the peak of resident memory, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The peak of resident memory, in bytes."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
