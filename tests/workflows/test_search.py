"""Searching weights, density and λ: never worse than what was asked for, the same for the same seed."""

import importlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import make_adapter, save_task

from sparselet import SparseAdapter, SparseDelta, merge
from sparselet.errors import ConfigError, MissingExtra, MissingFile, TaskError
from sparselet.evaluation import EvalResult, EvalSettings, evaluate
from sparselet.merging import METHODS, MergeRecipe
from sparselet.models import load_model, load_tokenizer
from sparselet.tasks.task import Row, Task, load_task
from sparselet.workflows.search import SearchSettings, Trial, search

module = importlib.import_module("sparselet.workflows.search")  # the package's `search` is the function

TASKS = [Task(name, {"validation": (Row("a", "b"),)}) for name in ("one", "two")]
ASKED = EvalSettings(split="validation")
Q = "layers.0.q"


def lone(place, value=1.0):
    """An expert of one entry."""
    return SparseAdapter({Q: SparseDelta((4, 8), torch.tensor([place]), torch.tensor([value]))})


@pytest.fixture
def recipe(tmp_path):
    names = tuple(str(lone(place).save(tmp_path / f"e{place}")) for place in (0, 5))
    return MergeRecipe(names, "arithmetic", (1.0, 1.0))


@pytest.fixture
def scores(monkeypatch):
    """Stands in for answering: scores a merged adapter by a function of its dense change. Set `scores.by`."""
    told = SimpleNamespace(by=lambda dense: 0.0, merged=[])

    def stand_in(model, tokenizer, tasks, adapter, asked):
        assert (model, tokenizer, asked) == ("model", "tokenizer", ASKED)
        told.merged.append(adapter)
        score = told.by(adapter[Q].to_dense())
        return [EvalResult(task.name, {"rougeL": score + i}, 1, ()) for i, task in enumerate(tasks)]

    monkeypatch.setattr(module, "evaluate", stand_in)
    return told


def run(recipe, settings, **more):
    return search(recipe, settings, "model", "tokenizer", TASKS, ASKED, **more)


def near(*wanted):
    """Best where the two experts' entries have these values."""
    return lambda dense: 50.0 - sum((dense.view(-1)[place].item() - w) ** 2 for place, w in zip((0, 5), wanted, strict=True))


def test_the_first_trial_is_what_was_asked_for(recipe, scores):
    recipe = replace(recipe, weights=(0.25, 1.5))
    result = run(recipe, SearchSettings("weights", trials=1))
    assert result.trials == (Trial({"weight 1": 0.25, "weight 2": 1.5}, 0.5, {"one": 0.0, "two": 1.0}),)
    assert result.recipe == recipe
    expected = merge(recipe.experts, recipe.method, recipe.weights)
    assert torch.equal(scores.merged[0][Q].values, expected[Q].values)


@pytest.mark.parametrize("wanted", [(0.3, 1.7), (1.0, 1.0), (-5.0, 9.0)])
def test_the_result_is_the_best_trial_and_never_worse_than_the_first(recipe, scores, wanted):
    scores.by, steps = near(*wanted), []
    result = run(recipe, SearchSettings("weights", trials=12), progress=steps.append)
    assert steps == [1] * 12
    assert len(result.trials) == 12
    assert result.best.score == max(trial.score for trial in result.trials) >= result.trials[0].score
    assert result.recipe.weights == tuple(result.best.chosen.values())
    assert replace(result.recipe, weights=recipe.weights) == recipe
    merged = merge(result.recipe.experts, "arithmetic", result.recipe.weights)
    assert near(*wanted)(merged[Q].to_dense()) + 0.5 == result.best.score
    assert all(0 <= w <= 2 for trial in result.trials for w in trial.chosen.values())


def test_of_equal_scores_the_earlier_trial_counts(recipe, scores):
    result = run(recipe, SearchSettings("weights", trials=5))
    assert len({trial.score for trial in result.trials}) == 1
    assert result.recipe == recipe


def test_equal_seeds_give_equal_trials(recipe, scores):
    scores.by = near(0.3, 1.7)
    found = [run(recipe, SearchSettings("weights", trials=14, seed=seed)) for seed in (3, 3, 4)]
    assert found[0] == found[1]
    assert found[0].trials[1:] != found[2].trials[1:]
    assert found[0].trials[0] == found[2].trials[0]


def test_more_trials_find_better_weights(recipe, scores):
    scores.by = near(0.3, 1.7)
    result = run(recipe, SearchSettings("weights", trials=60))
    assert result.best.score - 0.5 > 50 - 0.05


# Density and λ


@pytest.mark.parametrize("method", [m for m in METHODS if "density" in METHODS[m].defaults])
def test_the_density_of_every_method_that_has_one_can_be_searched(recipe, scores, method):
    recipe = MergeRecipe(recipe.experts, method)
    result = run(recipe, SearchSettings("density", trials=6))
    assert result.trials[0].chosen == {"density": METHODS[method].defaults["density"]}
    assert len({trial.chosen["density"] for trial in result.trials}) == 6
    assert all(0.01 <= trial.chosen["density"] <= 1 for trial in result.trials)
    scores.by = lambda dense: float(len(scores.merged))  # the last is the best
    result = run(recipe, SearchSettings("density", trials=2))
    assert result.recipe.parameters == {**recipe.parameters, **result.trials[1].chosen}
    assert result.recipe.weights == recipe.weights


def test_the_range_ends_where_the_method_refuses(recipe, scores):
    for epsilon, low, high in ((0.2, 0.2, 0.8), (0.5, 0.5, 0.5)):
        asked = MergeRecipe(recipe.experts, "della", (), {"density": 0.5, "epsilon": epsilon})
        result = run(asked, SearchSettings("density", trials=12))
        drawn = [trial.chosen["density"] for trial in result.trials]
        assert all(low - 1e-9 <= density <= high + 1e-9 for density in drawn)
        assert max(drawn) - min(drawn) > 0.5 * (high - low) or low == high


@pytest.mark.parametrize("method", [m for m in METHODS if "scale" in METHODS[m].defaults])
def test_lambda_is_the_methods_scale(recipe, scores, method):
    asked = MergeRecipe(recipe.experts, method, (0.5, 1.0), {"scale": 0.75})
    scores.by = lambda dense: float(len(scores.merged))
    result = run(asked, SearchSettings("lambda", trials=2))
    assert result.trials[0].chosen == {"scale": 0.75}
    assert result.recipe == replace(asked, parameters={**asked.parameters, **result.trials[1].chosen})


def test_lambda_of_overlap_is_a_factor_on_the_weights(recipe, scores):
    asked = MergeRecipe(recipe.experts, "overlap", (0.5, {"*.q": 2.0}), keep_counts=True)
    scores.by = lambda dense: float(len(scores.merged))
    result = run(asked, SearchSettings("lambda", trials=2))
    factor = result.trials[1].chosen["scale"]
    assert result.recipe == replace(asked, weights=(0.5 * factor, {"*": factor, "*.q": 2 * factor}))
    for adapter, expected in zip(scores.merged, (1.0, factor), strict=True):
        assert adapter[Q].values.tolist() == pytest.approx([0.5 * expected, 2 * expected])


# Time


def test_no_trial_starts_after_the_time_but_the_first_always(recipe, scores, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    assert len(run(recipe, SearchSettings("weights", trials=50, seconds=4.5)).trials) == 5
    assert len(run(recipe, SearchSettings("weights", trials=50, seconds=1e-9)).trials) == 1
    assert len(run(recipe, SearchSettings("weights", trials=3, seconds=1e9)).trials) == 3


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choose": "all"}, "choose must be one of weights, density, lambda, got 'all'"),
        ({"choose": "weights", "trials": 0}, "trials must be at least 1, got 0"),
        ({"choose": "weights", "seconds": 0}, "seconds must be above 0, got 0"),
        ({"choose": "weights", "seconds": float("nan")}, "seconds must be a finite number below"),
        (
            {"choose": "weights", "seed": -1},
            r"seed must be (an integer of at least 0 and|a finite number) below",
        ),
        (
            {"choose": "weights", "seed": 2**32},
            r"seed must be (an integer of at least 0 and|a finite number) below",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SearchSettings(**settings)


@pytest.mark.parametrize(
    ("what", "changes", "message"),
    [
        ("density", {}, "method arithmetic has no density to search; ties, breadcrumbs, dare, della, .* have"),
        ("lambda", {"method": "uniform", "parameters": {}}, "method uniform has no lambda to search; overlap, arithmetic"),
        ("weights", {"weights": ({"*": 1.0}, 1.0)}, "weights by pattern cannot be searched"),
        ("weights", {"weights": (1.0, -0.5)}, "from 0 to 2; the recipe starts outside: weight 2 -0.5"),
        ("lambda", {"parameters": {"scale": 2.5}}, "from 0 to 2; the recipe starts outside: scale 2.5"),
        (
            "density",
            {"method": "ties", "parameters": {"density": 0.005}},
            "from 0.01 to 1; the recipe starts outside: density 0.005",
        ),
    ],
)
def test_what_the_recipe_leaves_no_room_for_is_refused_before_an_expert_is_opened(scores, what, changes, message):
    recipe = replace(MergeRecipe(("nothing/a", "nothing/b"), "arithmetic"), **changes)
    with pytest.raises(ConfigError, match=message):
        run(recipe, SearchSettings(what))
    assert not scores.merged


def test_no_task_and_experts_that_are_not_there_are_refused(recipe, scores, tmp_path):
    with pytest.raises(ConfigError, match="at least one task to score on"):
        search(recipe, SearchSettings("weights"), "model", "tokenizer", [], ASKED)
    with pytest.raises(MissingFile, match="nothing is not a directory"):
        run(replace(recipe, experts=(recipe.experts[0], str(tmp_path / "nothing"))), SearchSettings("weights"))
    assert not scores.merged


def test_experts_that_are_open_are_not_opened_again(recipe, scores, monkeypatch):
    monkeypatch.setattr(module, "open_expert", lambda name: pytest.fail(f"opened {name}"))
    result = run(replace(recipe, experts=("a", "b")), SearchSettings("weights", trials=2), experts=[lone(0), lone(5)])
    assert result.recipe.experts == ("a", "b")


def test_without_optuna_the_extra_is_named(recipe, scores, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"pip install 'sparselet\[search\]'"):
        run(recipe, SearchSettings("weights"))


# On a model


def test_scores_are_those_of_the_merged_model(tmp_path, base_dir):
    model, tokenizer = load_model(base_dir), load_tokenizer(base_dir)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = tuple(str(make_adapter(model, seed=seed).save(tmp_path / f"e{seed}")) for seed in (1, 2))
    tasks = [load_task(save_task(tmp_path / task), ("validation",)) for task in ("a", "b")]
    asked = EvalSettings(rows=2, max_new_tokens=4, split="validation")
    recipe = MergeRecipe(names, "overlap", (1.0, 0.5))
    result = search(recipe, SearchSettings("lambda", trials=3, seed=1), model, tokenizer, tasks, asked)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for trial in result.trials:
        merged = merge(names, "overlap", [trial.chosen["scale"], 0.5 * trial.chosen["scale"]])
        found = {r.task: r.scores["rougeL"] for r in evaluate(model, tokenizer, tasks, merged, asked)}
        assert trial.tasks == found
        assert trial.score == pytest.approx(sum(found.values()) / 2)
    twins = [load_task(save_task(tmp_path / part / "same"), ("validation",)) for part in ("x", "y")]
    with pytest.raises(TaskError, match="two tasks are called same"):
        search(recipe, SearchSettings("weights"), model, tokenizer, twins, asked)
