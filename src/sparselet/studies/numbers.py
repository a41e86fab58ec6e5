"""Means, standard errors and paired bootstraps of measured results. Nothing is rounded here."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparselet.studies.engine.unit import EvalUnit, TrainUnit
from sparselet.studies.table import Cell, Measured

# The measured numbers of each unit that is done, by key and name.
Measures = Mapping[str, Mapping[str, float]]

RESAMPLES = 10_000
INTERVAL = 95  # percent
SEED = 0


@dataclass(frozen=True)
class Number:
    """The number of a cell.

    mean: None if nothing was measured. error: the standard error of the mean, over the draws if there are several, else over
    the tasks; None for fewer than two. count: the number of draws or tasks. tasks: the mean of each task over the draws.
    Their mean is `mean` where all draws have the same tasks. missing: units without a result.
    """

    mean: float | None
    error: float | None
    count: int
    tasks: Mapping[str, float]
    missing: int


@dataclass(frozen=True)
class Interval:
    """The mean difference of two cells over their tasks, and its 95 % interval."""

    difference: float
    low: float
    high: float
    tasks: int


def cell_number(cell: Cell, measures: Measures) -> Number:
    """The cell's number, from the results that exist."""
    draws = [_by_task(draw, cell.measure, measures) for draw in cell.draws]
    missing = len({unit.key for unit in cell.units() if unit.key not in measures})
    if cell.minus is not None:
        subtrahend = cell_number(cell.minus, measures).tasks
        draws = [{task: value - subtrahend[task] for task, value in draw.items() if task in subtrahend} for draw in draws]
    if cell.percent_of is not None:
        hundred = cell_number(cell.percent_of, measures).mean
        draws = [{task: 100 * value / hundred for task, value in draw.items()} for draw in draws] if hundred else []
    draws = [draw for draw in draws if draw]
    if cell.worst:
        draws = [dict([min(draw.items(), key=lambda item: item[1])]) for draw in draws]
    means = [_mean(list(draw.values())) for draw in draws]
    tasks: dict[str, list[float]] = defaultdict(list)
    for draw in draws:
        for task, value in draw.items():
            tasks[task].append(value)
    samples = means if len(means) > 1 else [value for draw in draws for value in draw.values()]
    return Number(
        mean=_mean(means) if means else None,
        error=_standard_error(samples),
        count=len(samples),
        tasks={task: _mean(values) for task, values in sorted(tasks.items())},
        missing=missing,
    )


def bootstrap(better: Mapping[str, float], worse: Mapping[str, float]) -> Interval:
    """The paired bootstrap over tasks (Efron & Tibshirani 1993, §16): the tasks are resampled 10,000 times with replacement.

    better, worse: a number for each task; at least one task must be in both. The interval is from the 2.5th to the 97.5th
    percentile. The seed is fixed and tasks are sorted by name, so the same numbers give the same interval.
    """
    differences = np.array([better[task] - worse[task] for task in sorted(better.keys() & worse.keys())])
    drawn = np.random.default_rng(SEED).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.percentile(differences[drawn].mean(axis=1), [(100 - INTERVAL) / 2, (100 + INTERVAL) / 2])
    return Interval(float(differences.mean()), float(low), float(high), len(differences))


def _by_task(units: Sequence[Measured], measure: str, measures: Measures) -> dict[str, float]:
    """The measure of each unit that has a result, by task; a training on several tasks counts once, by all their names."""
    values = {}
    for unit in units:
        if unit.key in measures:
            name = _name(unit)
            values[name] = float(measures[unit.key][measure])
    return values


def _name(unit: Measured) -> str:
    """What a unit's numbers are of."""
    if isinstance(unit, TrainUnit):
        return "+".join(unit.settings.tasks)
    return unit.task if isinstance(unit, EvalUnit) else unit.subject


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float | None:
    """The standard deviation (with n − 1) over √n; None for fewer than two."""
    if len(values) < 2:
        return None
    centre = _mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))
