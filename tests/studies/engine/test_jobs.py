"""Units as jobs: which go together, what waits for what, what is begun first."""

import json
from dataclasses import replace

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselet.evaluation import EvalSettings
from sparselet.studies.engine.cost import EVALUATE_SECONDS, ROWS, TRAIN_SECONDS, Estimates, summarize_costs
from sparselet.studies.engine.jobs import Job, make_jobs, priorities, seconds_left, stored
from sparselet.studies.engine.unit import EvalUnit, MergeUnit, ModelSettings, TrainUnit, closure, units_from_json, units_to_json
from sparselet.studies.engine.unit_results import UnitCost
from sparselet.training.settings import TrainSettings

MODEL = ModelSettings("tiny", "base")


def train(name, *starts, **settings):
    initial = starts[0] if starts else None
    settings = TrainSettings(task=name, init_from=initial and initial.key, **settings)
    return TrainUnit(MODEL, {name: "rows"}, settings, initial, name)


def score(task, subject=None, mask=None, model=MODEL):
    return EvalUnit(model, task, "rows", EvalSettings(), subject, mask, f"asked {task}")


A, B = train("a"), train("b", method="lora")
MERGED = MergeUnit("overlap", {}, (A, B), "a and b")
OTHER = MergeUnit("ties", {"density": 0.1}, (A, B), "a and b by ties")
LATER = train("later", MERGED)
SCORES = [score(task, subject) for subject in (A, MERGED, OTHER, LATER) for task in ("a", "b")]
UNITS = closure([*SCORES, score("a"), score("a", MERGED, mask=A)])


def test_units_come_back_from_json_with_their_keys():
    back = units_from_json(json.loads(json.dumps(units_to_json(SCORES))))
    assert list(back) == list(closure(SCORES))
    assert [unit.label for unit in back.values()] == [unit.label for unit in closure(SCORES).values()]


def test_a_job_comes_back_from_json():
    for job in make_jobs(stored(UNITS.values()).values()):
        back = Job.from_json(json.loads(json.dumps(job.to_json())))
        assert [unit.key for unit in back.units] == [unit.key for unit in job.units]
        assert back.needs == job.needs


def test_only_merges_that_a_training_starts_from_are_kept():
    kept = stored(UNITS.values())
    assert MERGED.key in kept
    assert OTHER.key not in kept
    assert len(kept) == len(UNITS) - 1


def test_evaluations_of_one_subject_are_one_job():
    jobs = make_jobs(stored(UNITS.values()).values())
    assert sorted(len(job.units) for job in jobs if job.units[0].kind == "evaluate") == [1, 1, 2, 2, 2, 2]
    for job in jobs:
        assert len({tuple(i.key for i in unit.inputs) for unit in job.units}) == 1
        assert job.units[0].kind == "evaluate" or len(job.units) == 1


@pytest.mark.parametrize(("name", "value"), [("model", "big"), ("base", "other"), ("threads", 2), ("dtype", "bfloat16")])
def test_evaluations_of_other_models_are_other_jobs(name, value):
    other = replace(MODEL, **{name: value})
    assert len(make_jobs([score("a", A), score("b", A, model=other)])) == 2
    assert len(make_jobs([score("a", A, model=other), score("b", A, model=replace(other))])) == 1


@pytest.mark.parametrize(
    ("unit", "needs"),
    [
        (A, []),
        (MERGED, [A, B]),
        (LATER, [MERGED]),
        (score("a"), []),
        (score("a", A), [A]),
        (score("a", MERGED), [A, B]),  # merged anew in memory
        (score("a", OTHER, mask=A), [A, B]),
        (score("a", LATER), [LATER]),
    ],
)
def test_what_must_be_done_before(unit, needs):
    (job,) = make_jobs([unit])
    assert job.needs == {one.key for one in needs}


@given(st.lists(st.integers(1, 100), min_size=len(UNITS), max_size=len(UNITS)))
def test_a_priority_is_the_longest_path_in_the_graph_of_jobs(times):
    seconds = dict(zip(UNITS, map(float, times), strict=True))
    jobs = make_jobs(stored(UNITS.values()).values())
    owner = {unit.key: job.key for job in jobs for unit in job.units}
    graph = networkx.DiGraph()
    for job in jobs:
        graph.add_edge(job.key, "end", weight=sum(seconds[unit.key] for unit in job.units))
        for key in job.needs:
            before = next(j for j in jobs if j.key == owner[key])
            graph.add_edge(before.key, job.key, weight=sum(seconds[unit.key] for unit in before.units))
    found = priorities(jobs, lambda unit: seconds[unit.key])
    for job in jobs:
        part = graph.subgraph({job.key, *networkx.descendants(graph, job.key)})
        assert found[job.key] == networkx.dag_longest_path_length(part)
    every = sum(seconds[unit.key] for job in jobs for unit in job.units)
    assert seconds_left(jobs, lambda unit: seconds[unit.key], 1) == every
    assert seconds_left(jobs, lambda unit: seconds[unit.key], 10**6) == max(found.values())


def test_estimates_before_anything_is_measured():
    estimates = Estimates(1000)
    unit = train("a", epochs=2.0, train_rows=50)
    assert estimates.seconds(unit) == TRAIN_SECONDS * 100
    assert estimates.seconds(score("a")) == EVALUATE_SECONDS * ROWS
    assert not estimates.is_measured(unit)
    assert estimates.bytes(train("a", method="full")) == 1000
    assert 0 < estimates.bytes(unit) < 1000
    assert estimates.bytes(score("a")) == 0


def test_estimates_follow_the_nearest_that_was_measured():
    estimates = Estimates()
    full = train("a", method="full", epochs=1.0, train_rows=10)
    estimates.learn(train("a", epochs=1.0, train_rows=10), UnitCost(20.0, bytes=7))
    assert estimates.is_measured(full)
    assert estimates.seconds(full) == 20
    estimates.learn(full, UnitCost(100.0, bytes=9))
    assert estimates.seconds(train("b", method="full", epochs=3.0, train_rows=10)) == 300
    assert estimates.seconds(train("a", epochs=1.0, train_rows=20)) == 40
    assert estimates.bytes(train("b", method="full")) == 9
    assert not estimates.is_measured(score("a"))


def test_what_units_took_together():
    cost = UnitCost(10.0, 3600.0, 5)
    found = summarize_costs([(A, cost), (B, replace(cost, peak_bytes=7)), (score("a"), cost)])
    assert found["units"]["train"] == {"count": 2, "seconds": 20.0, "cpu_seconds": 7200.0}
    assert (found["core_hours"], found["peak_rss_bytes"]) == (3.0, 7)
