"""Tuned weights: their gradient and path against torch's autograd on dense weights; the recipe; what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.dense_merges import full_deltas
from helpers.made_experts import contents
from helpers.strategies import spelt_out
from helpers.tiny import make_adapter, make_gpt2, make_model, save_task
from torch.func import functional_call

import sparselet as sl
from sparselet import SparseAdapter, SparseDelta
from sparselet.apply import apply_temporarily
from sparselet.errors import ConfigError
from sparselet.evaluation import EvalSettings
from sparselet.generation.prefix import token_loss
from sparselet.merging import METHODS, MergeRecipe, merge, read_recipe
from sparselet.merging.method import STATS
from sparselet.models import load_model, load_tokenizer
from sparselet.names import Names
from sparselet.tasks.task import load_task
from sparselet.workflows.tune import LinearMerge, TuneSettings, tune
from sparselet.workflows.validation_loss import ValidationLoss

IDS = torch.tensor([[5, 9, 200, 31, 7, 44, 8], [6, 6, 17, 90, 2, 3, 4]])
SETTINGS = EvalSettings(split="validation", chat_template=False)
LINEAR = [name for name, method in METHODS.items() if method.linear]


def loss_of(model):
    return lambda: token_loss(False, model(input_ids=IDS), IDS)


def dense_loss(model, parts, weights, shift, layers):
    """The loss of the model with Σ (w + s)·P added to its weights, by torch alone."""
    parameters = dict(model.named_parameters())
    changed = {}
    for name in parts[0]:
        total = sum(
            (weights[i] + shift[i, layers[name]]).float() * part[name].to_dense().float() for i, part in enumerate(parts)
        )
        changed[f"{name}.weight"] = parameters[f"{name}.weight"].detach() + total
    return token_loss(False, functional_call(model, changed, (), {"input_ids": IDS}), IDS)


def adapters(model, count=3):
    return [
        make_adapter(model, block, seed=seed, chat_template=False) for seed, block in zip(range(count), (1, 4, 1), strict=True)
    ]


@pytest.mark.parametrize("method", LINEAR)
def test_the_linear_methods_are(method):
    deltas = full_deltas(3, density=0.4)
    weights = [0.5, -2.0, 3.0]
    stats = METHODS[method].global_stats
    more = {STATS: stats(lambda: [(deltas, weights)], METHODS[method].defaults)} if stats else {}
    parts = [METHODS[method].function(deltas, unit, **more) for unit in torch.eye(3).tolist()]
    whole = METHODS[method].function(deltas, weights, **more)
    assert all(torch.equal(part.indices, whole.indices) for part in parts)
    expected = sum(w * spelt_out(part)[0] for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(spelt_out(whole)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("scaling", [None, (0.5, 1.0)])
def test_the_gradient_is_autograds(method, scaling):
    model = make_model()
    experts, weights = adapters(model), [1.0, 0.5, -0.25]
    recipe = MergeRecipe(("a", "b", "c"), method, tuple(weights), {}, layer_scaling=scaling)
    merged = LinearMerge(recipe, experts)
    assert merged.coefficients == (3, 2)
    shift = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.3
    units = torch.eye(3).tolist()
    parts = [merge(experts, method, unit, recipe.parameters, layer_scaling=scaling) for unit in units]
    layers = {name: int(name.split(".")[2]) for name in parts[0]}
    dense = shift.clone().requires_grad_()
    loss = dense_loss(model, parts, weights, dense, layers)
    (expected,) = torch.autograd.grad(loss, dense)
    before = [p.detach().clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    torch.testing.assert_close(merged.gradient(shift, model, loss_of(model)), expected, rtol=1e-4, atol=1e-6)
    with apply_temporarily(model, merged.adapter(shift)), torch.no_grad():
        torch.testing.assert_close(loss_of(model)(), loss.detach(), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert flags == [p.requires_grad for p in model.parameters()]


def test_weights_stored_in_out_have_their_gradient_too():
    model = make_gpt2()
    name = "transformer.h.1.attn.c_attn"
    shape = tuple(Names(model).layers[name].parameter.shape)
    experts = [SparseAdapter({name: SparseDelta.from_dense(torch.randn(shape))}) for _ in range(2)]
    merged, shift = LinearMerge(MergeRecipe(("a", "b"), "arithmetic"), experts), torch.zeros(2, 1, dtype=torch.float64)
    dense = shift.clone().requires_grad_()
    (expected,) = torch.autograd.grad(dense_loss(model, experts, [1.0, 1.0], dense, {name: 0}), dense)
    torch.testing.assert_close(merged.gradient(shift, model, loss_of(model)), expected, rtol=1e-4, atol=1e-6)


@pytest.fixture
def loaded(base_dir, task_dir):
    model = load_model(base_dir)
    return model, load_tokenizer(base_dir), [load_task(task_dir, ("validation",))]


def test_the_path_is_that_of_adam_on_the_penalised_loss(loaded):
    model, tokenizer, tasks = loaded
    experts = adapters(model)
    recipe, settings = MergeRecipe(("a", "b", "c"), weights=(1.0, 0.5, 2.0)), TuneSettings(4, 0.05, 0.3, 2)
    result = tune(recipe, settings, model, tokenizer, tasks, SETTINGS, experts=experts)
    losses = ValidationLoss(model, tokenizer, tasks, SETTINGS)
    (rows,) = losses.rows.values()
    parts = [merge(experts, "overlap", unit) for unit in torch.eye(3).tolist()]
    parameters = dict(model.named_parameters())
    shift = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([shift], lr=0.05)
    for step in range(4):
        changed = {}
        for name in parts[0]:
            layer = int(name.split(".")[2])
            scaled = [(w + shift[i, layer]).float() * parts[i][name].to_dense() for i, w in enumerate(recipe.weights)]
            changed[f"{name}.weight"] = parameters[f"{name}.weight"].detach() + sum(scaled)
        batch = dict(losses._collate([rows[(2 * step + i) % len(rows)] for i in range(2)]))
        labels = batch.pop("labels")
        loss = token_loss(False, functional_call(model, changed, (), batch), labels)
        adam.zero_grad()
        (loss + 0.3 / 2 * shift.square().sum()).backward()
        adam.step()
    for i, weight in enumerate(result.recipe.weights):
        expected = {f"model.layers.{layer}.*": recipe.weights[i] + shift[i, layer].item() for layer in (0, 1)}
        assert weight == pytest.approx(expected, abs=2e-4)


def test_the_loss_falls_and_the_recipe_is_what_was_measured(loaded):
    model, tokenizer, tasks = loaded
    experts = adapters(model)
    before = [p.detach().clone() for p in model.parameters()]
    recipe = MergeRecipe(("a", "b", "c"))
    result = tune(recipe, TuneSettings(30, 0.05, 0.0), model, tokenizer, tasks, SETTINGS, experts=experts)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert result.after["backwards"] < result.before["backwards"] - 0.01
    losses = ValidationLoss(model, tokenizer, tasks, SETTINGS)
    for one, expected in ((recipe, result.before), (result.recipe, result.after)):
        with apply_temporarily(model, merge(experts, one.method, one.weights)):
            assert losses.by_task() == pytest.approx(expected, rel=1e-6)
    held = tune(recipe, TuneSettings(30, 0.05, 1e4), model, tokenizer, tasks, SETTINGS, experts=experts).recipe.weights
    moved = max(abs(w - 1) for weight in result.recipe.weights for w in weight.values())
    assert all(abs(w - 1) < 0.5 * moved for weight in held for w in (weight.values() if isinstance(weight, dict) else [weight]))


def test_a_recipe_that_is_not_improved_stays(loaded, monkeypatch):
    model, tokenizer, tasks = loaded
    gradient = LinearMerge.gradient
    monkeypatch.setattr(LinearMerge, "gradient", lambda self, *inputs: -gradient(self, *inputs))
    recipe = MergeRecipe(("a", "b", "c"))
    result = tune(recipe, TuneSettings(20, 0.05, 0.0), model, tokenizer, tasks, SETTINGS, experts=adapters(model))
    assert result.recipe == recipe
    assert result.after == result.before


def test_weights_that_differ_within_a_layer_keep_their_difference():
    names = ("layers.0.q", "layers.0.v", "layers.10.q", "layers.1.q", "head[0]")
    experts = [SparseAdapter({name: SparseDelta.from_dense(torch.ones(2, 2)) for name in names}) for _ in range(2)]
    recipe = MergeRecipe(("a", "b"), weights=(1.0, {"*.v": 3.0}))
    merged = LinearMerge(recipe, experts)
    assert merged.coefficients == (2, 4)
    shift = torch.zeros(2, 4, dtype=torch.float64)
    tuned = merged.recipe(shift + 0.25)
    assert set(tuned.weights[0]) == {"layers.0.*", "layers.10.*", "layers.1.*", "head[[]0]"}
    assert tuned.weights[1]["layers.0.q"] == 1.25
    assert tuned.weights[1]["layers.0.v"] == 3.25
    direct = merge(experts, "overlap", tuned.weights)
    for name, delta in merged.adapter(shift + 0.25).items():
        assert torch.equal(delta.to_dense(), direct[name].to_dense())


def test_what_makes_no_sense_is_refused(loaded):
    model, tokenizer, tasks = loaded
    for settings, message in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"task_rows": 0}, "task_rows must be at least 1"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"penalty": -1.0}, "penalty must be at least 0"),
        ({"rate": float("nan")}, "rate must be a finite number"),
    ):
        with pytest.raises(ConfigError, match=message):
            TuneSettings(**settings)
    recipe, rest = MergeRecipe(("a", "b", "c")), (TuneSettings(1), model, tokenizer)
    with pytest.raises(ConfigError, match=r"method ties is not linear in its weights.*overlap, arithmetic, localize are"):
        tune(replace(recipe, method="ties", parameters={}), *rest, tasks, SETTINGS, experts=adapters(model))
    with pytest.raises(ConfigError, match="validation tasks are needed to tune"):
        tune(recipe, *rest, [], SETTINGS, experts=adapters(model))


def test_on_the_command_line_the_recipe_runs_again(cli, refused, experts, task_dir, tmp_path):
    flags = ("--tune", "--validation", task_dir, save_task(tmp_path / "other"), "--steps", 8, "--rate", 0.05, "--penalty", 0)
    code, out, err = cli("merge", *experts, *flags, "--validation-rows", 3, "--out", tmp_path / "x")
    assert code == 0, err
    assert "tuned" in out
    assert "Weights by layer: see the recipe." in out
    losses = json.loads((tmp_path / "x" / "tune.json").read_text())
    assert set(losses["before"]) == {"backwards", "other"}
    assert sum(losses["after"].values()) < sum(losses["before"].values())
    weights = read_recipe(tmp_path / "x" / "recipe.toml").weights
    assert set(weights[0]) == {"model.layers.0.*", "model.layers.1.*"}
    assert cli("merge", "--recipe", tmp_path / "x" / "recipe.toml", "--out", tmp_path / "y")[0] == 0
    first, again = contents(tmp_path / "x"), contents(tmp_path / "y")
    assert {name: first[name] for name in again} == again
    code, out, _ = cli("merge", *experts, *flags, "--validation-rows", 3, "--out", tmp_path / "z", "--json")
    assert json.loads(out)["tune"] == losses
    assert contents(tmp_path / "z") == first
    for more, message in (
        (("--tune", "--auto"), "--auto and --tune do not go together"),
        (("--tune", "--groups", 2), "--tune and --groups do not go together"),
        (("--tune", "--trials", 3), "--trials, --seconds and --score goes with --auto"),
        (("--auto", "--steps", 3), "--steps, --rate, --penalty and --task-rows goes with --tune"),
        (("--validation", "t"), "--validation goes with --auto or --tune"),
        (("--tune",), "set --validation"),
    ):
        assert message in refused("merge", *experts, *more, "--out", tmp_path / "w")
    with pytest.raises(ConfigError, match="set `validation`"):
        sl.tune(experts, [])
    assert not (tmp_path / "w").exists()
