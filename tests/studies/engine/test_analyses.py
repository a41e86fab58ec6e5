"""Analyses as units of a study: their keys, their numbers against the functions they call, and their place in a table."""

import pytest
from helpers.units import TASKS, InThisProcess, make_train, model_of

from sparselet.adapter import SparseAdapter
from sparselet.analysis.compare import compare
from sparselet.analysis.locate import locate
from sparselet.studies.analyses import ANALYSES
from sparselet.studies.engine.run import run_study
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.unit import AnalysisUnit, closure, units_from_json, units_to_json
from sparselet.studies.numbers import cell_number
from sparselet.studies.table import Cell
from sparselet.tasks.task import SPLITS, load_task

GRAFT = {"rows": 2, "fractions": [0.1, 0.5], "parts": ["top", "random_rescaled"], "max_new_tokens": 3}


def make_analysis(sources, name, experts=(), tasks=(), subject="x", **settings):
    data = {task: load_task(sources.tasks[task], SPLITS).fingerprint() for task in tasks}
    return AnalysisUnit(model_of(sources), name, settings, subject, data, tuple(experts), f"{name} of {subject}")


@pytest.fixture(scope="module")
def experts(sources):
    return [make_train(sources, (task,), density=0.25) for task in TASKS[:2]]


@pytest.fixture(scope="module")
def analyses(sources, experts):
    return {
        "locate": make_analysis(sources, "locate", experts[:1], subject="backwards"),
        "compare": make_analysis(sources, "compare", experts, subject="backwards and second", density=0.1),
        "graft": make_analysis(sources, "graft", experts[:1], TASKS[:1], "backwards", **GRAFT),
        "probe": make_analysis(sources, "probe", (), TASKS[1:2], "second", rows=3),
        "pretrain": make_analysis(sources, "pretrain", subject="run 0", seed=0, steps=2, probe_every=1),
    }


@pytest.fixture(scope="module")
def store(sources, analyses, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("analyses"))
    progress = run_study(list(analyses.values()), store, InThisProcess(store, sources))
    assert not progress.failed
    return store


def test_every_analysis_is_tried_here(analyses):
    assert analyses.keys() == ANALYSES.keys()


def test_units_survive_json_and_differ_in_each_part(sources, analyses, experts):
    for unit in analyses.values():
        assert units_from_json(units_to_json([unit]))[unit.key].key == unit.key
    others = [
        make_analysis(sources, "compare", experts, subject="backwards and second", density=0.2),
        make_analysis(sources, "compare", experts, subject="other", density=0.1),
        make_analysis(sources, "compare", experts[::-1], subject="backwards and second", density=0.1),
        make_analysis(sources, "probe", (), TASKS[:1], "second", rows=3),
    ]
    keys = [unit.key for unit in (*analyses.values(), *others)]
    assert len(set(keys)) == len(keys)


def test_numbers_are_those_of_the_library(store, analyses, experts):
    first, second = (SparseAdapter.load(store.expert(unit.key)) for unit in experts)
    location, numbers = locate(first), store.result(analyses["locate"]).measures()
    assert numbers["Gini"] == 100 * location.whole.gini
    assert numbers["within 50 %"] == 100 * location.selected.carrying[0.5]
    assert numbers["Gaussian 90 %"] == pytest.approx(44.5, abs=0.1)
    both, numbers = compare(first, second, density=0.1), store.result(analyses["compare"]).measures()
    assert numbers["jaccard"] == 100 * both.largest.jaccard
    assert numbers["beyond chance"] == pytest.approx(numbers["jaccard"] - numbers["chance"])
    numbers = store.result(analyses["graft"]).measures()
    assert {"base", "whole", "top 0.1", "random_rescaled 0.5", "advantage 0.1"} <= numbers.keys()
    numbers = store.result(analyses["probe"]).measures()
    for statistic in ("hoyer", "top5"):
        change = numbers[f"raw {statistic} shuffled"] - numbers[f"raw {statistic} natural"]
        assert numbers[f"raw {statistic} difference"] == pytest.approx(change)
    assert numbers["raw hoyer random"] != numbers["raw hoyer natural"]
    assert -100 <= numbers["rest hoyer loss"] <= 100
    numbers = store.result(analyses["pretrain"]).measures()
    assert numbers["familiar loss highest"] >= numbers["familiar loss end"] > 0
    assert 0 < numbers["unfamiliar hoyer end"] < 100


def test_a_cell_is_the_mean_over_subjects(store, analyses):
    units = (analyses["locate"], analyses["compare"])
    measures = {unit.key: store.result(unit).measures() for unit in closure(units).values()}
    number = cell_number(Cell((units[:1],), "Gini"), measures)
    assert number.tasks == {"backwards": store.result(units[0]).measures()["Gini"]}
    assert number.missing == 0


def test_an_unknown_analysis_fails_by_name(sources, tmp_path):
    unit, store = make_analysis(sources, "guess"), Store(tmp_path)
    progress = run_study([unit], store, InThisProcess(store, sources))
    assert "there is no analysis 'guess'" in progress.failed[unit.key]
