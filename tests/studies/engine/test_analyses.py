"""Analyses as units of a study: their keys, their numbers against the functions they call, and their place in a table."""

import random
import re

import pytest
import torch
from helpers.tiny import make_adapter
from helpers.units import TASKS, InThisProcess, make_train, model_of

from sparselet.adapter import SparseAdapter
from sparselet.analysis.compare import compare
from sparselet.analysis.locate import locate
from sparselet.apply import apply_temporarily
from sparselet.models import load_model, load_tokenizer
from sparselet.studies.analyses import ANALYSES
from sparselet.studies.engine.run import run_study
from sparselet.studies.engine.store import Store
from sparselet.studies.engine.unit import AnalysisUnit, closure, units_from_json, units_to_json
from sparselet.studies.numbers import cell_number
from sparselet.studies.sparse_regions.fast_slow_runs import Drift
from sparselet.studies.sparse_regions.isolation_runs import isolation_run
from sparselet.studies.sparse_regions.steering_runs import last_number, worked
from sparselet.studies.table import Cell
from sparselet.tasks.task import SPLITS, load_task

GRAFT = {"rows": 2, "fractions": [0.1, 0.5], "parts": ["top", "random_rescaled"], "max_new_tokens": 3}

TRAIN = {"batch_size": 2, "train_rows": 4, "validation_rows": 2}
FAST_SLOW = {
    "train": {**TRAIN, "epochs": 1, "learning_rate": 1e-2},
    "how": {
        "reward": "helpers.units:small_letters",
        "generations": 2,
        "pool": 2,
        "fast_every": 1,
        "fast_calls": 6,
        "fast_rows": 2,
        "max_new_tokens": 3,
    },
    "gain": 0.1,
    "rows": 2,
}
ISOLATION = {"train_settings": TRAIN, "epochs": 1.0, "rows": 2, "validation_rows": 1, "max_new_tokens": 3}
STEERING = {"seed": 0, "train_settings": {"epochs": 0.5, "batch_size": 8}, "train_rows": 8, "pairs": 3, "kl": 0.02, "rows": 2}
STEERING |= {"max_new_tokens": 4}


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
        "fast_slow": make_analysis(sources, "fast_slow", (), TASKS[:2], "seed 0", **FAST_SLOW),
        "isolation": make_analysis(sources, "isolation", (), TASKS[:2], "seed 0", arm="isolated", **ISOLATION),
        "steering": make_analysis(sources, "steering", subject="seed 0", **STEERING),
    }


@pytest.fixture(scope="module")
def store(sources, analyses, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("analyses"))
    progress = run_study(list(analyses.values()), store, InThisProcess(store, sources))
    assert not progress.failed
    return store


def test_every_analysis_is_tried_here(analyses):
    elsewhere = {"routed", "frontier", "scaling"}  # in test_routed.py, test_frontier.py and test_scaling.py
    assert analyses.keys() | elsewhere == ANALYSES.keys()


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


def test_runs_of_training_give_the_numbers_of_their_tables(store, analyses):
    numbers = store.result(analyses["fast_slow"]).measures()
    assert set(numbers) == {"base first", "base final", "tuned first", "tuned final", "steps", "KL", "loss"}
    assert 0 <= numbers["steps"] <= 2
    assert numbers["KL"] >= 0
    assert set(store.result(analyses["isolation"]).measures()) == {"rougeL", "forgotten"}
    numbers = store.result(analyses["steering"]).measures()
    assert numbers["none fewer"] == 0
    assert numbers["second random tokens"] > 0
    assert {"goal fewer", "steered accuracy", "second reversed fewer"} <= numbers.keys()


def test_the_distance_from_the_base_is_that_of_torch(sources):
    base = load_model(sources.model), load_tokenizer(sources.model)
    task, second = (load_task(sources.tasks[task]) for task in TASKS[:2])
    drift = Drift(base, task, second, "Say: {input}")
    adapter, sums, count = make_adapter(base[0]), 0.0, 0
    losses = [drift.steps[0][1]]
    with apply_temporarily(base[0], adapter):
        drift.measure(1)
    for row in task.rows("validation"):
        prompt, target = (base[1](text)["input_ids"] for text in (f"Say: {row.input}", f" {row.target}"))
        tokens = torch.tensor([[*prompt, *target, base[1].eos_token_id]])
        with torch.no_grad():
            before = base[0](tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            with apply_temporarily(base[0], adapter):
                after = base[0](tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        sums += float(torch.nn.functional.kl_div(before, after, reduction="sum", log_target=True))
        count += len(before)
    assert drift.steps[0][0] == 0
    assert drift.steps[1][0] == pytest.approx(sums / count, rel=1e-4)
    assert drift.steps[1][1] != losses[0]


@pytest.mark.parametrize("arm", ["sequential", "RegMean"])
def test_what_core_isolation_is_compared_with(sources, arm):
    base = load_model(sources.model), load_tokenizer(sources.model)
    tasks, reports = [load_task(sources.tasks[task]) for task in TASKS[:2]], []
    numbers = isolation_run(base, tasks, arm=arm, **ISOLATION, progress=reports.append)
    assert 0 <= numbers["rougeL"] <= 100
    assert reports[-1] == 1
    assert arm == "sequential" or numbers["forgotten"] == 0


def test_worked_answers_are_right():
    for kind, sign in (("sums", 1), ("differences", -1)):
        rows = worked(kind, random.Random(0), 50)
        for prompt, verbose, terse in rows:
            a, b = map(int, re.findall(r"\d+", prompt))
            assert terse == f"The answer is {a + sign * b}."
            assert verbose.endswith(f"= {a + sign * b}. {terse}")
            assert all(eval(left) == int(right) for left, right in re.findall(r"(\d+ [+-] \d+) = (-?\d+)", verbose))
        assert len({prompt for prompt, *_ in rows}) == 50
    assert last_number(["it is 4", "5 then 6", "none"], ["4.", "5.", "7."]) == pytest.approx(100 / 3)


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
