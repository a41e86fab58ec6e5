"""Means, standard errors and paired bootstraps of what was measured. Nothing here is rounded."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparselet.studies.engine.unit import Unit
from sparselet.studies.table import Cell

# The result of each unit that was done, by its key.
Found = Mapping[str, Mapping[str, Any]]

RESAMPLES = 10_000
INTERVAL = 95  # percent
SEED = 0


@dataclass(frozen=True)
class Number:
    """What a cell came to.

    mean: None if nothing was measured. error: the standard error of the mean: over the draws, if there are several, else over
    the tasks; None for fewer than two. count: how many it is over. tasks: the mean of each task over the draws; their mean is
    `mean` where all draws have the same tasks. missing: units without a result.
    """

    mean: float | None
    error: float | None
    count: int
    tasks: Mapping[str, float]
    missing: int


@dataclass(frozen=True)
class Interval:
    """The mean difference of two cells over their tasks, and where it lies with 95 %."""

    difference: float
    low: float
    high: float
    tasks: int


def number(cell: Cell, found: Found) -> Number:
    """The cell's number, of the results there are."""
    draws = [_by_task(draw, cell.measure, found) for draw in cell.draws]
    missing = len({unit.key for unit in cell.units() if unit.key not in found})
    if cell.minus is not None:
        other = number(cell.minus, found).tasks
        draws = [{task: value - other[task] for task, value in draw.items() if task in other} for draw in draws]
    if cell.percent_of is not None:
        whole = number(cell.percent_of, found).mean
        draws = [{task: 100 * value / whole for task, value in draw.items()} for draw in draws] if whole else []
    draws = [draw for draw in draws if draw]
    means = [_mean(list(draw.values())) for draw in draws]
    tasks: dict[str, list[float]] = defaultdict(list)
    for draw in draws:
        for task, value in draw.items():
            tasks[task].append(value)
    over = means if len(means) > 1 else [value for draw in draws for value in draw.values()]
    return Number(
        mean=_mean(means) if means else None,
        error=_standard_error(over),
        count=len(over),
        tasks={task: _mean(values) for task, values in sorted(tasks.items())},
        missing=missing,
    )


def bootstrap(better: Mapping[str, float], worse: Mapping[str, float]) -> Interval:
    """The paired bootstrap over tasks (Efron & Tibshirani 1993, §16): the tasks are drawn again 10,000 times with replacement.

    better, worse: a number for each task; those that both have count, at least one. The seed is fixed, and tasks are taken in
    the order of their names, so the same numbers give the same interval. It is that of the 2.5th and 97.5th percentile.
    """
    differences = np.array([better[task] - worse[task] for task in sorted(better.keys() & worse.keys())])
    drawn = np.random.default_rng(SEED).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.percentile(differences[drawn].mean(axis=1), [(100 - INTERVAL) / 2, (100 + INTERVAL) / 2])
    return Interval(float(differences.mean()), float(low), float(high), len(differences))


def _by_task(units: Sequence[Unit], measure: str, found: Found) -> dict[str, float]:
    """The measure of each unit that has a result. A training on several tasks is one, by all their names."""
    values = {}
    for unit in units:
        if unit.key in found:
            task = unit.settings["task"]
            values[task if isinstance(task, str) else "+".join(task)] = float(found[unit.key][measure])
    return values


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float | None:
    """The standard deviation (with n − 1) over √n; None for fewer than two."""
    if len(values) < 2:
        return None
    centre = _mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))
