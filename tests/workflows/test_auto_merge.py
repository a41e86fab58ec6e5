"""The automatic merge: what is tried for which experts, in which order, that the best is kept and its recipe runs again."""

import importlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.made_experts import contents
from helpers.made_profiles import profile_for
from helpers.tiny import make_adapter, make_model, save_task

import sparselet as sl
from sparselet import SparseAdapter, SparseDelta
from sparselet.adapter import AdapterFile
from sparselet.apply import apply_temporarily
from sparselet.errors import ArgumentError, BadProfile, ConfigError, TaskError
from sparselet.evaluation import EvalResult, EvalSettings
from sparselet.merging import METHODS, MergeRecipe, merge
from sparselet.models import load_model, load_tokenizer
from sparselet.tasks.task import Row, Task, load_task
from sparselet.workflows.auto_merge import AutoSettings, auto_merge, suitable_merges
from sparselet.workflows.validation_loss import ValidationLoss

module = importlib.import_module("sparselet.workflows.auto_merge")

TASKS = [Task(name, {"validation": (Row("a", "b"),)}) for name in ("one", "two")]
SETTINGS = EvalSettings(split="validation")
RECIPE = MergeRecipe(("a", "b"))
Q = "layers.0.q"


def small(seed, density=0.3, block=1, profiled=True, task=None):
    """An expert of one target in each of three layers."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for layer in range(3):
        mask = torch.rand(8, 16, generator=generator) < density
        mask = mask[:, :1].expand(8, 16).contiguous() if block == "row" else mask
        deltas[f"layers.{layer}.q"] = SparseDelta.from_dense(torch.randn(8, 16, generator=generator), mask, block)
    expert = SparseAdapter(deltas, {"block_size": block, "task": task})
    expert.profile = profile_for(expert, seed) if profiled else None
    return expert


@pytest.fixture
def scores(monkeypatch):
    """Stands in for answering: scores a merged adapter by a function of its change. Set `scores.by`."""
    state = SimpleNamespace(by=lambda merged: 0.0, merged=[])

    def stand_in(model, tokenizer, tasks, adapter, settings):
        assert (model, tokenizer, settings) == ("model", "tokenizer", SETTINGS)
        state.merged.append(adapter)
        score = state.by(adapter)
        return [EvalResult(task.name, {"rougeL": score + i}, 1, ()) for i, task in enumerate(tasks)]

    monkeypatch.setattr(module, "evaluate", stand_in)
    return state


def run(experts, settings=None, recipe=RECIPE, **more):
    return auto_merge(recipe, settings or AutoSettings(), "model", "tokenizer", TASKS, SETTINGS, experts=experts, **more)


def methods(experts):
    return {proposal.method for proposal in suitable_merges(RECIPE, experts)}


def test_what_is_tried_follows_from_the_experts(caplog):
    plain = {name for name, method in METHODS.items() if method.tried and not method.needs_profiles and not method.for_dense}
    whole = {name for name, method in METHODS.items() if method.for_dense}
    assert {"uniform", "arithmetic", "ties", "actmat", "tsv"} <= plain - {"overlap"}
    assert {"iso_c", "localize"} <= whole
    sparse, dense, rows = ([small(i, *how) for i in (1, 2)] for how in ((0.3,), (1.0,), (0.3, "row")))
    bare = [small(1), small(2, profiled=False, task="the second")]
    caplog.set_level("INFO", "sparselet")
    assert methods(bare) == plain - {"overlap"}
    assert "Methods that need profiles are left out: the second has none" in caplog.text
    assert methods(sparse) == (plain | {"regmean"}) - {"overlap"}
    assert methods(dense) == methods(rows) == (plain | whole | {"regmean"}) - {"overlap"}
    assert methods([sparse[0], dense[0]]) == methods(sparse)
    assert methods([*sparse, SparseAdapter({})]) == methods(sparse)
    masks = [proposal.parameters["mask"] for proposal in suitable_merges(RECIPE, sparse) if proposal.method == "regmean"]
    assert masks == ["union", "full"]
    assert [proposal.method for proposal in suitable_merges(RECIPE, sparse)][:3] == ["regmean", "regmean", "uniform"]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.tried])
def test_all_tried_parameters_are_the_methods_own(method):
    experts = [small(1, 1.0), small(2, 1.0)]
    for parameters in METHODS[method].tried:
        merge(experts, method, parameters=parameters)


def test_the_recipe_is_first_and_the_best_is_kept(scores):
    scores.by = lambda merged: float(merged.metadata.merge["method"] == "uniform")
    experts, steps = [small(1), small(2)], []
    result = run(experts, progress=steps.append)
    assert steps == [1] * len(result.trials)
    assert result.trials[0].recipe == RECIPE
    assert result.best.recipe.method == "uniform"
    assert (result.best.score, dict(result.best.tasks)) == (1.5, {"one": 1.0, "two": 2.0})
    first = next(trial for trial in result.trials if trial.recipe.method == "uniform")
    assert result.best is first  # of equals
    for adapter, trial in zip(scores.merged, result.trials, strict=True):
        how = (trial.recipe.method, trial.recipe.weights, trial.recipe.parameters)
        again = merge(experts, *how, layer_scaling=trial.recipe.layer_scaling)
        assert all(torch.equal(adapter[name].values, again[name].values) for name in again)
        assert trial.entries == again.nnz


@pytest.mark.parametrize(("best", "expected"), [(2.0, 1.3**3), (0.5, 1.3**-3), (1.0, 1.0)])
def test_the_scale_of_the_best_is_climbed(scores, best, expected):
    experts = [small(1), small(2)]
    norm = torch.cat([delta.values for delta in merge(experts).values()]).norm()

    def by(merged):
        if merged.metadata.merge["method"] != "overlap":
            return -100.0
        scales = torch.stack([merged[f"layers.{i}.q"].values.norm() for i in range(3)]) / torch.stack(
            [merge(experts)[f"layers.{i}.q"].values.norm() for i in range(3)]
        )
        return -float((scales - best).abs().sum() / norm)

    scores.by = by
    alpha, beta = run(experts, AutoSettings(trials=40)).best.recipe.layer_scaling or (1.0, 0.0)
    assert beta == 0
    assert alpha == pytest.approx(expected, abs=1e-3)


def test_layers_are_scaled_by_depth_if_that_is_better(scores):
    experts = [small(1), small(2)]
    plain = merge(experts)

    def by(merged):
        if merged.metadata.merge["method"] != "overlap":
            return -100.0
        ratio = [float(merged[f"layers.{i}.q"].values.norm() / plain[f"layers.{i}.q"].values.norm()) for i in range(3)]
        return -abs(ratio[0] - 0.5) - abs(ratio[1] - 1) - abs(ratio[2] - 1.5)

    scores.by = by
    assert run(experts, AutoSettings(trials=40)).best.recipe.layer_scaling == (0.5, 1.0)


def test_the_budget_bounds_the_trials(scores, monkeypatch):
    experts = [small(1), small(2)]
    whole = run(experts, AutoSettings(trials=100)).trials
    assert run(experts, AutoSettings(trials=3)).trials == whole[:3]
    now = iter(range(100))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    assert run(experts, AutoSettings(trials=50, seconds=2.5)).trials == whole[:3]
    assert len(run(experts, AutoSettings(trials=50, seconds=1e-9)).trials) == 1


def test_a_merge_that_fails_is_no_candidate(scores, caplog):
    recipe = replace(RECIPE, weights=(1.0, -1.0))
    result = run([small(1), small(2)], recipe=recipe)
    failed = {trial.recipe.method: trial.error for trial in result.trials if trial.score is None}
    assert set(failed) == {"uniform", "regmean"}
    assert "the sum of the weights, which is 0" in failed["uniform"]
    assert "A merge by uniform failed" in caplog.text
    scores.by = lambda merged: float("nan") if merged.metadata.merge["method"] == "ties" else 0.0
    nan = [trial for trial in run([small(1), small(2)]).trials if trial.recipe.method == "ties"]
    assert nan
    assert all(trial.score is None and "NaN or infinite" in trial.error for trial in nan)
    with pytest.raises(ArgumentError, match="sum of the weights"):
        run([small(1), small(2)], recipe=replace(recipe, method="uniform"))


def test_what_makes_no_sense_is_refused(scores, tmp_path):
    for settings, message in (
        ({"trials": 0}, "trials must be at least 1"),
        ({"seconds": 0.0}, "seconds must be above 0"),
        ({"score": "exact"}, "score must be one of rougeL, loss"),
    ):
        with pytest.raises(ConfigError, match=message):
            AutoSettings(**settings)
    with pytest.raises(ConfigError, match="validation tasks are needed"):
        auto_merge(RECIPE, AutoSettings(), "model", "tokenizer", [], SETTINGS, experts=[small(1), small(2)])
    with pytest.raises(ConfigError, match="keep_counts does not go with a choice"):
        run([small(1), small(2)], recipe=replace(RECIPE, keep_counts=True))
    path = small(1).save(tmp_path / "damaged")
    (path / "profile.safetensors").write_bytes((path / "profile.safetensors").read_bytes().replace(b"tokens", b"tokins"))
    with pytest.raises(BadProfile):
        run([small(2), AdapterFile(path)])
    assert len(scores.merged) == 1


# On a model


def test_the_loss_is_that_of_the_targets_tokens(base_dir, task_dir):
    model, tokenizer = load_model(base_dir), load_tokenizer(base_dir)
    task = load_task(task_dir, ("validation",))
    loss = ValidationLoss(model, tokenizer, [task], replace(SETTINGS, chat_template=False))
    total, count = 0.0, 0
    for row in loss.rows["backwards"]:
        ids = torch.tensor([row["prompt"] + row["target"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double().log_softmax(-1)
        for i in range(len(row["prompt"]), ids.shape[1]):
            total, count = total - float(logits[i - 1, ids[0, i]]), count + 1
    assert loss.by_task() == {"backwards": pytest.approx(total / count, rel=1e-5)}
    with pytest.raises(TaskError, match="two tasks are called backwards"):
        ValidationLoss(model, tokenizer, [task, task], SETTINGS)


def test_by_loss_the_lowest_is_best(base_dir, experts, task_dir, tmp_path):
    report = sl.auto_merge(experts, [task_dir], AutoSettings(trials=6, score="loss"), base=base_dir, out=tmp_path / "x")
    result = report.result
    assert result.best.score == min(trial.score for trial in result.trials) <= result.trials[0].score
    model, tokenizer = load_model(base_dir), load_tokenizer(base_dir)
    rows = ValidationLoss(model, tokenizer, [load_task(task_dir, ("validation",))], replace(SETTINGS, chat_template=False))
    with apply_temporarily(model, sl.load(tmp_path / "x")):
        assert rows.by_task() == {"backwards": pytest.approx(result.best.score, rel=1e-6)}
    assert "best" in str(report)
    assert "scale=0.5" in str(report)
    assert "trim=" not in str(report)


@pytest.mark.parametrize("score", ["rougeL", "loss"])
def test_on_the_command_line_the_recipe_runs_again(cli, refused, experts, base_dir, task_dir, tmp_path, score):
    flags = ("--auto", "--validation", task_dir, save_task(tmp_path / "other"), "--validation-rows", 2, "--max-new-tokens", 3)
    more = ("--trials", 9, "--score", score)
    code, out, err = cli("merge", *experts, *flags, *more, "--out", tmp_path / "x")
    assert code == 0, err
    trials = json.loads((tmp_path / "x" / "auto.json").read_text())["trials"]
    assert len(trials) == 9
    assert trials[0]["method"] == "regmean"  # what `merge` does with these experts
    assert set(trials[0]["tasks"]) == {"backwards", "other"}
    assert "Best of 9 trials: number" in out
    assert "regmean" in out
    assert cli("merge", "--recipe", tmp_path / "x" / "recipe.toml", "--out", tmp_path / "y")[0] == 0
    first, again = contents(tmp_path / "x"), contents(tmp_path / "y")
    assert {name: first[name] for name in again} == again
    code, out, _ = cli("merge", *experts, *flags, *more, "--out", tmp_path / "z", "--json")
    printed = json.loads(out)["auto"]
    assert printed["trials"] == trials
    assert contents(tmp_path / "z") == first
    assert "--validation goes with --auto or --tune" in refused("merge", *experts, "--validation", "t", "--out", tmp_path / "w")
    assert "goes with --auto" in refused("merge", *experts, "--trials", 3, "--out", tmp_path / "w")
    assert "set --validation" in refused("merge", *experts, "--auto", "--out", tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_experts_that_record_no_base_model_need_one(tmp_path, task_dir):
    paths = [str(make_adapter(make_model(), seed=seed).save(tmp_path / f"e{seed}")) for seed in (1, 2)]
    with pytest.raises(ConfigError, match="record no base model; set `base`"):
        sl.auto_merge(paths, [task_dir])


def test_three_loras_of_peft_without_profiles(tmp_path, base_dir, task_dir, cli):
    """Adapters of another library merge, and can be profiled for regmean."""
    peft = pytest.importorskip("peft")
    loras = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        peft.get_peft_model(load_model(base_dir), config).save_pretrained(tmp_path / f"lora{seed}")
        loras.append(str(tmp_path / f"lora{seed}"))
    flags = ("--auto", "--validation", task_dir, "--validation-rows", 2, "--max-new-tokens", 3, "--no-chat-template")
    code, out, err = cli("merge", *loras, *flags, "--out", tmp_path / "x")
    assert code == 0, err
    assert "tsv" in out
    assert "regmean" not in out
    for lora in loras:
        assert cli("profile", lora, "--task", task_dir)[0] == 0
    assert cli("merge", *loras, "--method", "regmean", "--out", tmp_path / "r")[0] == 0
    code, out, err = cli("merge", *loras, *flags, "--out", tmp_path / "y")
    assert code == 0, err
    assert "regmean" in out
