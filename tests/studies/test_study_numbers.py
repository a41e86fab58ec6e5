"""Means, errors and bootstraps, against the standard library, all resamples written out, and the paper's own arithmetic."""

import itertools
import math
import statistics

import pytest
from helpers.plans import made
from helpers.strategies import few
from hypothesis import given
from hypothesis import strategies as st

from sparselet.studies.numbers import bootstrap, cell_number
from sparselet.studies.table import Cell

STUDY = made()
TASKS = STUDY.settings.held_in
scores = st.floats(0, 100).map(lambda value: round(value, 2))
by_task = st.dictionaries(st.sampled_from([f"task {i}" for i in range(8)]), scores, min_size=1)


def cell_of(*draws, measure="rougeL"):
    """A cell of one unit a number, and the results."""
    found, units = {}, []
    for i, values in enumerate(draws):
        own = made(seeds=(i,), test_rows=3 + i)
        subject = own.merge(own.experts(), "overlap")
        units.append(own.held_in(subject, tasks=list(values)).draws[0])
        found |= {
            unit.key: {measure: value} for unit, value in zip(units[-1], values.values(), strict=True) if value is not None
        }
    return Cell(tuple(units), measure), found


@few
@given(st.lists(scores, min_size=2, max_size=4))
def test_a_mean_over_tasks_and_its_error(values):
    got = cell_number(*cell_of(dict(zip(TASKS, values, strict=False))))
    assert got.mean == pytest.approx(statistics.fmean(values))
    assert got.error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)
    assert (got.count, got.missing) == (len(values), 0)
    assert got.tasks == dict(sorted(zip(TASKS, values, strict=False)))


def test_of_several_draws_the_error_is_over_their_means():
    first, second = {"one": 10.0, "two": 30.0}, {"two": 50.0, "three": 70.0}
    got = cell_number(*cell_of(first, second))
    assert got.mean == 40.0
    assert got.error == pytest.approx(statistics.stdev([20.0, 60.0]) / math.sqrt(2))
    assert got.count == 2
    assert got.tasks == {"one": 10.0, "two": 40.0, "three": 70.0}


def test_one_task_has_no_error():
    assert cell_number(*cell_of({"one": 10.0})).error is None


def test_what_is_missing_is_counted_and_left_out():
    got = cell_number(*cell_of({"one": 10.0, "two": None, "three": 20.0}))
    assert (got.mean, got.missing, got.count) == (15.0, 1, 2)
    none = cell_number(*cell_of({"one": None}, {"two": None}))
    assert (none.mean, none.error, none.count, none.missing, none.tasks) == (None, None, 0, 2, {})
    part, found = cell_of({"one": None}, {"one": 4.0, "two": 6.0})
    assert (cell_number(part, found).mean, cell_number(part, found).missing) == (5.0, 1)


def test_a_training_on_several_tasks_is_one():
    multitask = STUDY.multitask()
    cell = Cell(((multitask[0],),), "parameters")
    got = cell_number(cell, {multitask[0].key: {"parameters": 7}})
    assert (got.mean, got.tasks) == (7.0, {"one+two+three+four": 7.0})


def test_the_papers_interference_follows_from_its_other_figures():
    """Figure 5: 20.61 % lost inside the masks and 13.05 % outside, of 77.54 alone (Table 2); merged 51.44 (Table 1)."""
    experts = STUDY.experts()
    merged = STUDY.merge(experts, "overlap")
    alone, own, every = STUDY.individual(experts), STUDY.own_masks(merged, experts), STUDY.held_in(merged)
    values = ((alone, 77.54), (own, 61.56), (every, 51.44))
    found = {unit.key: {"rougeL": value} for cell, value in values for unit in cell.units()}
    inside = cell_number(Cell(alone.draws, minus=own, percent_of=alone), found)
    outside = cell_number(Cell(own.draws, minus=every, percent_of=alone), found)
    assert inside.mean == pytest.approx(20.61, abs=0.01)
    assert outside.mean == pytest.approx(13.05, abs=0.01)


@few
@given(st.lists(st.floats(1, 100), min_size=4, max_size=4), st.lists(st.floats(1, 100), min_size=4, max_size=4))
def test_differences_and_percentages_are_those_of_the_means(first, second):
    one, found = cell_of(dict(zip(TASKS, first, strict=True)))
    experts = STUDY.individual(STUDY.experts())
    found |= {unit.key: {"rougeL": value} for unit, value in zip(experts.draws[0], second, strict=True)}
    difference = cell_number(Cell(one.draws, minus=experts), found)
    assert difference.mean == pytest.approx(statistics.fmean(first) - statistics.fmean(second))
    assert cell_number(Cell(one.draws, minus=one), found).mean == 0
    assert cell_number(Cell(one.draws, percent_of=one), found).mean == pytest.approx(100)
    share = cell_number(Cell(one.draws, percent_of=experts), found)
    assert share.mean == pytest.approx(100 * statistics.fmean(first) / statistics.fmean(second))
    assert share.error == pytest.approx(100 * statistics.stdev(first) / 2 / statistics.fmean(second), abs=1e-9)


def test_a_percentage_of_nothing_is_none_and_its_units_count_as_missing():
    one, found = cell_of({"one": 1.0})
    other = STUDY.individual(STUDY.experts())
    got = cell_number(Cell(one.draws, percent_of=other), found)
    assert (got.mean, got.missing) == (None, 4)
    got = cell_number(Cell(one.draws, minus=other), found)
    assert (got.mean, got.missing) == (None, 4)


def test_a_bootstrap_has_the_quantiles_of_all_resamples():
    differences = {"a": 4.0, "b": -1.0, "c": 7.0, "d": 2.5, "e": 3.0}
    got = bootstrap(differences, dict.fromkeys(differences, 0.0))
    every = sorted(statistics.fmean(drawn) for drawn in itertools.product(differences.values(), repeat=5))
    assert got.difference == statistics.fmean(differences.values())
    assert got.tasks == 5
    # The 2.5th percentile of 10,000 draws lies between the 2nd and 3rd of all 3,125 resamples, and so above.
    assert every[int(0.02 * 3125)] <= got.low <= every[int(0.03 * 3125)]
    assert every[int(0.97 * 3125)] <= got.high <= every[int(0.98 * 3125)]


@few
@given(by_task, by_task, st.floats(-50, 50))
def test_a_bootstrap_keeps_its_algebra(better, worse, shift):
    common = better.keys() & worse.keys()
    if not common:
        return
    got, turned = bootstrap(better, worse), bootstrap(worse, better)
    differences = [better[task] - worse[task] for task in common]
    assert got.difference == pytest.approx(statistics.fmean(differences), abs=1e-9)
    slack = 1e-9
    assert min(differences) - slack <= got.low <= got.high <= max(differences) + slack
    assert (turned.low, turned.high) == pytest.approx((-got.high, -got.low), abs=1e-9)
    moved = bootstrap({task: value + shift for task, value in better.items()}, worse)
    assert (moved.low, moved.high) == pytest.approx((got.low + shift, got.high + shift), abs=1e-9)


@few
@given(by_task, by_task)
def test_a_bootstrap_does_not_depend_on_the_order_of_the_tasks(better, worse):
    if better.keys() & worse.keys():
        assert bootstrap(dict(reversed(better.items())), worse) == bootstrap(better, dict(reversed(worse.items())))
