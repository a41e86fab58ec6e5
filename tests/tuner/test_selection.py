"""Choosing masks: scopes, starts, moments, and what a selection must leave alone."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from helpers.paper import paper_config
from helpers.strategies import block_sums
from peft import PeftModel, get_peft_model
from torch import nn

import sparselet
from sparselet import SparseAdapter
from sparselet.delta import block_for
from sparselet.errors import ConfigError, NonFiniteScore, SelectionError
from sparselet.masks import blocks_to_keep
from sparselet.scores import Score
from sparselet.tuner import sparselet_layers, to_adapter


def layers(model):
    return sparselet_layers(model)


def masks(model):
    return {name: layer.sparse_indices["default"].tolist() for name, layer in layers(model).items()}


def values(model):
    return {name: layer.sparse_values["default"] for name, layer in layers(model).items()}


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def start(base, optimizer=None, **config):
    model = get_peft_model(copy.deepcopy(base), paper_config(**config))
    make = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2))
    return model, make(parameters(model))


def train(model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def dense_gradients(base, names, batches):
    oracle = copy.deepcopy(base).requires_grad_(False)
    weights = {name: oracle.get_submodule(name).weight.requires_grad_() for name in names}
    for batch in batches:
        (oracle(**batch).loss / len(batches)).backward()
    return {name: weight.grad for name, weight in weights.items()}


# Scope and layer drop


@pytest.mark.parametrize("block_size", [1, 4, "row", "column"])
def test_global_scope_keeps_the_best_of_all_targets_together(make_llama, make_batches, block_size):
    base, batches = make_llama(torch.float64), make_batches(2)
    model, _ = start(base, density=0.1, block_size=block_size, score="gm", scope="global")
    selection = sparselet.reselect(model, batches)
    gradients = dense_gradients(base, list(layers(model)), batches)
    scores = {n: block_sums(g.abs(), block_size) for n, g in gradients.items()}
    everything = torch.cat([score.flatten() for score in scores.values()])
    kept = round(0.1 * everything.numel())
    threshold = everything.sort(descending=True).values[kept - 1]
    assert masks(model) == {n: (score.flatten() >= threshold).nonzero().flatten().tolist() for n, score in scores.items()}
    assert isinstance(block_size, str) or selection.entries == kept * block_size**2
    assert selection.entries == sum(v.numel() for v in values(model).values())
    assert len({len(mask) for mask in masks(model).values()}) > 1


def test_target_scope_keeps_the_same_fraction_in_each_target(make_llama, make_batches):
    model, _ = start(make_llama(), density=0.1)
    selection = sparselet.reselect(model, make_batches(1))
    for layer in layers(model).values():
        assert layer.sparse_indices["default"].numel() == blocks_to_keep(0.1, layer.get_base_layer().weight.numel())
    assert (selection.targets, selection.active_layers) == (6, 2)


def dead_layer(make_llama):
    """Three layers, of which the middle one's attention cannot change the output, so that its gradients are 0."""
    base = make_llama(num_hidden_layers=3)
    with torch.no_grad():
        base.model.layers[1].self_attn.o_proj.weight.zero_()
    return base


@pytest.mark.parametrize("block_size", [1, 4, "row", "column"])
@pytest.mark.parametrize("scope", ["target", "global"])
def test_layer_drop_leaves_layers_below_the_threshold_out(make_llama, make_batches, tmp_path, scope, block_size):
    base, batches = dead_layer(make_llama), make_batches(6)
    model, optimizer = start(base, density=0.1, score="gm", scope=scope, layer_drop=True, block_size=block_size)
    train(model, optimizer, batches)
    selection = sparselet.reselect(model, batches[:1], optimizer)
    assert selection.active_layers == 2
    assert selection.targets == sum(bool(mask) for mask in masks(model).values())
    for name, mask in masks(model).items():
        if ".1." in name:
            assert not mask
        elif scope == "target":
            layer = layers(model)[name]
            assert len(mask) == blocks_to_keep(0.1, math.prod(layer.shape) // math.prod(block_for(block_size, layer.shape)))
    train(model, optimizer, batches)
    sparselet.freeze_masks(model)
    for name, layer in layers(model).items():
        if ".1." in name:
            assert torch.equal(layer.effective_weight(), base.get_submodule(name).weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(**batches[0]).logits, model(**batches[0]).logits)
    file = SparseAdapter.load(tmp_path)
    assert len(file) == 9
    assert all(file[name].indices.tolist() == mask for name, mask in masks(model).items())


def test_dropped_layer_comes_back_when_it_matters_again(make_llama, make_batches):
    base, batches = dead_layer(make_llama), make_batches(2)
    model, optimizer = start(base, density=0.5, score="gm", layer_drop=True)
    train(model, optimizer, batches)
    assert sparselet.reselect(model, batches, optimizer).active_layers == 2
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.o_proj.weight.normal_(std=0.3)
    assert sparselet.reselect(model, batches, optimizer).active_layers == 3
    train(model, optimizer, batches)


# Other starts


def test_gradient_start_needs_a_selection_before_the_first_step(make_llama, make_batches):
    batches = make_batches(2)
    model, optimizer = start(make_llama(), initial_mask="gradient")
    with pytest.raises(SelectionError, match="call sparselet"):
        model(**batches[0])
    with torch.no_grad():
        model(**batches[0])  # the base model's output; nothing is trained
    sparselet.reselect(model, batches, optimizer)
    train(model, optimizer, batches)


@pytest.mark.parametrize("score", ["gm", "cs", "mcs"])
@pytest.mark.parametrize("block_size", [1, 4, "row", "column"])
def test_gradient_start_selects_by_gradient_magnitude_whatever_the_score(make_llama, make_batches, score, block_size):
    base, batches = make_llama(torch.float64), make_batches(3)
    model, _ = start(base, initial_mask="gradient", score=score, density=0.1, block_size=block_size)
    sparselet.reselect(model, batches)
    for name, gradient in dense_gradients(base, list(layers(model)), batches).items():
        scores = block_sums(gradient.abs(), block_size)
        kept = max(1, round(0.1 * scores.numel()))
        assert masks(model)[name] == scores.topk(kept).indices.sort().values.tolist()
        assert not values(model)[name].any()


def test_sparse_starts_hold_nothing_dense(make_llama, make_batches):
    for initial_mask in ("gradient", "random"):
        model, optimizer = start(make_llama(), initial_mask=initial_mask, score="gm", density=0.1)
        assert all(value.ndim == 1 for value in values(model).values())
        batches = make_batches(2)
        for _ in range(2):
            sparselet.reselect(model, batches, optimizer)
            train(model, optimizer, batches)
        for layer in layers(model).values():
            assert layer.sparse_mask["default"].pending is None
            assert layer.sparse_values["default"].numel() == blocks_to_keep(0.1, layer.get_base_layer().weight.numel())


@pytest.mark.parametrize("score", ["mcs", "mcs_neg", "cs", "wm"])
def test_sparse_start_refuses_a_score_that_cannot_move_the_mask(score):
    with pytest.raises(ConfigError, match="reselect_every"):
        paper_config(initial_mask="gradient", score=score, reselect_every=10)
    assert paper_config(initial_mask="gradient", score=score).selection.interval == 0


def test_value_that_left_a_sparse_start_is_dropped(make_llama, make_batches):
    base, batches = make_llama(), make_batches(8)
    model, optimizer = start(base, initial_mask="gradient", score="gm", density=0.1)
    sparselet.reselect(model, batches[:1], optimizer)
    for batch in batches:
        train(model, optimizer, [batch])
        before = {n: layer.delta("default") for n, layer in layers(model).items()}
        sparselet.reselect(model, [batch], optimizer)
        for name, layer in layers(model).items():
            after = layer.delta("default")
            new = after.mask() & ~before[name].mask()
            assert not after.to_dense()[new].any()
            kept = after.mask() & before[name].mask()
            assert torch.equal(after.to_dense()[kept], before[name].to_dense()[kept])


@pytest.mark.parametrize("block_size", [1, 4, "row", "column"])
def test_random_masks_depend_on_seed_and_target_only(make_llama, block_size):
    config = {"initial_mask": "random", "density": 0.1, "reselect_every": 0, "block_size": block_size}
    first, again, other = (masks(start(make_llama(seed=i), seed=seed, **config)[0]) for i, seed in enumerate((3, 3, 4)))
    assert first == again
    assert all(first[name] != other[name] for name in first)
    square = [mask for name, mask in first.items() if "q_proj" in name]
    assert square[0] != square[1]
    assert all(mask == sorted(set(mask)) for mask in first.values())


def test_random_score_is_seeded_and_moves_at_each_selection(make_llama, make_batches):
    runs = []
    for _ in range(2):
        model, _ = start(make_llama(), score="random", density=0.1)
        run = []
        for _ in range(2):
            sparselet.reselect(model, make_batches(1))
            run.append(masks(model))
        runs.append(run)
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


# Batches and memory


@pytest.mark.parametrize("scope", ["target", "global"])
def test_several_scoring_batches_equal_one_large_batch(make_llama, make_batches, scope):
    base, batches = make_llama(torch.float64), make_batches(3)
    together = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    found = []
    for scoring in (batches, [together], iter(batches)):
        model, optimizer = start(base, score="mcs_neg", density=0.1, scope=scope)
        train(model, optimizer, batches)
        sparselet.reselect(model, scoring, optimizer)
        found.append(masks(model))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("count", [1, 3])
def test_score_sees_all_values_and_the_mean_gradient_there(make_llama, make_batches, monkeypatch, count):
    base, batches, seen = make_llama(torch.float64), make_batches(3), []

    def spy(values, gradient, kept, mask):
        seen.append(SimpleNamespace(values=values, gradient=gradient, kept=kept, mask=mask))
        return gradient.abs().flatten()

    monkeypatch.setitem(sparselet.SCORES, "spy", Score(spy))
    model, optimizer = start(base, score="spy", density=0.1)
    for selections in range(2):
        train(model, optimizer, batches)
        oracle = copy.deepcopy(base)
        dense = {name: layer.dense_values("default") for name, layer in layers(model).items()}
        with torch.no_grad():
            for name, value in dense.items():
                oracle.get_submodule(name).weight += value
        before = masks(model)
        gradients = dense_gradients(oracle, list(dense), batches[:count])
        sparselet.reselect(model, batches[:count], optimizer)
        assert len(seen) == 6
        for name in dense:
            found = [c for c in seen if torch.equal(c.values, dense[name])]
            assert len(found) == 1
            torch.testing.assert_close(found[0].gradient, gradients[name])
            assert found[0].kept == round(0.1 * dense[name].numel())
            assert (found[0].mask is None) if selections == 0 else (found[0].mask.tolist() == before[name])
        seen.clear()


def test_grow_and_drop_replaces_a_fifth_of_the_mask(make_llama, make_batches):
    base, batches = make_llama(torch.float64), make_batches(4)
    model, optimizer = start(base, score="gd", density=0.2)
    train(model, optimizer, batches)
    magnitudes = {n: layer.dense_values("default").abs().flatten() for n, layer in layers(model).items()}
    sparselet.reselect(model, batches, optimizer)
    for name, mask in masks(model).items():
        assert mask == magnitudes[name].topk(len(mask)).indices.sort().values.tolist()
    for _ in range(2):
        train(model, optimizer, batches)
        oracle, before = copy.deepcopy(base), masks(model)
        dense = {name: layer.dense_values("default") for name, layer in layers(model).items()}
        with torch.no_grad():
            for name, value in dense.items():
                oracle.get_submodule(name).weight += value
        gradients = dense_gradients(oracle, list(dense), batches)
        sparselet.reselect(model, batches, optimizer)
        for name, mask in masks(model).items():
            inside, replaced = torch.tensor(before[name]), round(0.2 * len(mask))
            stay = inside[dense[name].flatten()[inside].abs().topk(len(mask) - replaced).indices]
            growth = gradients[name].abs().flatten()
            growth[inside] = -1
            assert mask == sorted(stay.tolist() + growth.topk(replaced).indices.tolist())


def test_offload_changes_nothing_but_where_pending_values_live(make_llama, make_batches):
    found, batches = [], make_batches(12)
    for offload in (False, True):
        model, optimizer = start(make_llama(), score="mcs", density=0.1, offload=offload)
        for i in range(0, 12, 4):
            train(model, optimizer, batches[i : i + 4])
            sparselet.reselect(model, batches[:2], optimizer)
        found.append((masks(model), values(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], value) for name, value in found[1][1].items())


@pytest.mark.parametrize("scope", ["target", "global"])
def test_offload_keeps_what_waits_in_cpu_memory_and_changes_nothing(make_llama, make_batches, monkeypatch, scope):
    from sparselet.tuner import scorer, selection

    moved, found = [], []
    for module in (scorer, selection):
        monkeypatch.setattr(module, "offload", lambda dense: (moved.append(dense.shape), dense.cpu())[1])
    for offload in (False, True):
        model, optimizer = start(make_llama(), scope=scope, offload=offload)
        train(model, optimizer, make_batches(3))
        moved.clear()
        sparselet.reselect(model, make_batches(3), optimizer)
        found.append(masks(model))
        assert len(moved) == (3 * len(layers(model)) if offload else 0)  # after two of three batches, and the values
    assert found[0] == found[1]


def test_what_comes_from_cuda_is_pinned_and_nothing_else(monkeypatch):
    from sparselet.tuner import scorer

    dense = torch.randn(3, 4)
    assert scorer.offload(dense) is dense
    asked, empty_like = [], torch.empty_like

    def unpinned(like, **options):
        asked.append(options)
        return empty_like(like, device=options["device"])

    monkeypatch.setattr(torch, "empty_like", unpinned)
    monkeypatch.setattr(scorer, "_on_cuda", lambda tensor: True)
    copied = scorer.offload(dense)
    assert asked == [{"device": "cpu", "pin_memory": True}]
    assert torch.equal(copied, dense)
    assert copied is not dense


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_values_of_a_model_on_cuda_are_pinned(make_llama, make_batches):
    model, _ = start(make_llama().cuda(), offload=True)
    sparselet.reselect(model, [{key: value.cuda() for key, value in batch.items()} for batch in make_batches(2)])
    pending = [layer.sparse_mask["default"].pending for layer in layers(model).values()]
    assert all(values.is_pinned() and values.device.type == "cpu" for values in pending)


def test_only_one_dense_gradient_lives_at_a_time_with_one_batch(make_llama, make_batches, monkeypatch):
    from sparselet.tuner import scorer

    alive, original = [], scorer.Scorer.__call__

    def spy(self, layer, gradient):
        original(self, layer, gradient)
        alive.append(len(self.gradients))

    monkeypatch.setattr(scorer.Scorer, "__call__", spy)
    model, _ = start(make_llama())
    sparselet.reselect(model, make_batches(1))
    assert alive == [0] * 6


# Optimizer


def state_by_entry(layer, optimizer, key):
    """A moment as a dense tensor, and the mask it belongs to."""
    parameter, state = layer.sparse_values["default"], layer.sparse_mask["default"]
    moment = optimizer.state[parameter][key]
    assert moment.shape == parameter.shape
    if state.dense:
        return moment.clone(), torch.ones(layer.shape, dtype=torch.bool)
    delta = sparselet.SparseDelta(layer.shape, layer.sparse_indices["default"], moment)
    return delta.to_dense(), delta.mask()


@pytest.mark.parametrize("block_size", [1, 4, "row", "column"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_moments_follow_their_entries(make_llama, make_batches, block_size, amsgrad):
    batches = make_batches(15)
    model, optimizer = start(
        make_llama(), lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=amsgrad), density=0.2, block_size=block_size, score="mcs"
    )
    keys = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
    newcomers = 0
    for i in range(0, 15, 5):
        train(model, optimizer, batches[i : i + 5])
        before = {(n, k): state_by_entry(layer, optimizer, k) for n, layer in layers(model).items() for k in keys}
        sparselet.reselect(model, batches[i : i + 1], optimizer)
        for (name, key), (old, was) in before.items():
            new, now = state_by_entry(layers(model)[name], optimizer, key)
            assert torch.equal(new[now & was], old[now & was])
            assert not new[now & ~was].any()
            newcomers += int((now & ~was).sum())
        assert all(optimizer.state[value]["step"] == i + 5 for value in values(model).values())
    assert newcomers > 0


def test_parameters_keep_their_identity_group_and_schedule(make_llama, make_batches):
    batches = make_batches(4)
    model, optimizer = start(make_llama())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = parameters(model)
    for _ in range(2):
        train(model, optimizer, batches)
        schedule.step()
        sparselet.reselect(model, batches[:1], optimizer)
    assert all(a is b for a, b in zip(before, parameters(model), strict=True))
    assert all(a is b for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 3)


def test_momentum_of_sgd_follows(make_llama, make_batches):
    batches = make_batches(3)
    model, optimizer = start(make_llama(), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    train(model, optimizer, batches)
    before = {n: state_by_entry(layer, optimizer, "momentum_buffer")[0] for n, layer in layers(model).items()}
    sparselet.reselect(model, batches, optimizer)
    for name, layer in layers(model).items():
        after, mask = state_by_entry(layer, optimizer, "momentum_buffer")
        assert torch.equal(after, before[name] * mask)
    train(model, optimizer, batches)


def test_optimizer_that_cannot_follow_is_refused_and_nothing_changes(make_llama, make_batches):
    batches = make_batches(2)
    model, optimizer = start(make_llama(), lambda p: torch.optim.Adafactor(p, lr=1e-2))
    train(model, optimizer, batches)
    before = {name: value.detach().clone() for name, value in values(model).items()}
    with pytest.raises(SelectionError, match="Adafactor keeps"):
        sparselet.reselect(model, batches, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    assert all(layer.sparse_mask["default"].dense for layer in layers(model).values())
    train(model, optimizer, batches)


def test_selection_before_the_first_step_and_without_optimizer(make_llama, make_batches):
    batches = make_batches(2)
    model, optimizer = start(make_llama(), score="gm")
    sparselet.reselect(model, batches, optimizer)
    train(model, optimizer, batches)
    sparselet.reselect(model, batches)  # the caller then makes a new optimizer
    train(model, torch.optim.AdamW(parameters(model), lr=1e-2), batches)


def test_selection_with_a_loss_still_alive(make_llama, make_batches):
    batches = make_batches(9)
    model, optimizer = start(make_llama(), score="mcs", density=0.1)
    losses = []
    for i, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss)  # keeps the autograd graph, with the parameters' old shapes
        optimizer.step()
        if i % 3 == 1:
            sparselet.reselect(model, [batch], optimizer)
    assert all(value.grad.shape == value.shape for value in values(model).values())


# What a selection leaves alone


class Head(nn.Module):
    """A target, a layer trained in full and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.proj, self.head, self.frozen = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.frozen(self.head(self.proj(x).tanh())).square().mean()


def head(**config):
    model, optimizer = start(Head(), target_modules=["proj"], modules_to_save=["head"], density=0.25, **config)
    return model, optimizer, torch.randn(4, 8)


def call(model, batch):
    return model(batch["x"])


def test_selection_leaves_other_gradients_and_flags_alone():
    model, optimizer, x = head()
    model(x).backward()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "head" in name}
    assert gradients
    sparselet.reselect(model, [{"x": x}], optimizer, loss=call)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())
    assert all(p.grad is None for name, p in model.named_parameters() if "sparse_values" in name)


@pytest.mark.parametrize("selections", [0, 1])
def test_selection_restores_everything_when_the_loss_fails(selections):
    model, optimizer, x = head(score="cs")
    for _ in range(selections):
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        sparselet.reselect(model, [{"x": x}], optimizer, loss=call)
    model(x).backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def fail(model, batch):
        if batch["x"] is None:
            raise RuntimeError("no such row")
        return model(batch["x"])

    with pytest.raises(RuntimeError, match="no such row"):
        sparselet.reselect(model, [{"x": x}, {"x": None}], optimizer, loss=fail)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())
    optimizer.zero_grad()
    model(x).backward()
    assert all(p.grad is not None for p in parameters(model))


def test_diverged_loss_is_refused_and_nothing_changes():
    model, optimizer, x = head()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NonFiniteScore, match="learning rate"):
        sparselet.reselect(model, [{"x": x * float("nan")}], optimizer, loss=call)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_selection_works_where_gradients_are_switched_off():
    model, optimizer, x = head()
    with torch.no_grad():
        selection = sparselet.reselect(model, [{"x": x}], optimizer, loss=call)
    assert selection.entries == 16


def test_selection_keeps_training_mode_and_weights(make_llama, make_batches):
    base, batches = make_llama(), make_batches(4)
    model, optimizer = start(base, score="mcs")
    for mode in (True, False):
        model.train(mode)
        train(model, optimizer, batches)
        sparselet.reselect(model, batches, optimizer)
        assert model.training == mode
        for name, layer in layers(model).items():
            weight = base.get_submodule(name).weight.detach()
            delta = layer.delta("default")
            assert torch.equal(layer.weight, weight)
            assert torch.equal(layer.effective_weight(), torch.where(delta.mask(), weight + delta.to_dense(), weight))


def test_scoring_sees_values_outside_the_mask(make_llama, make_batches):
    base, batches = make_llama(), make_batches(5)
    model, optimizer = start(base, score="mcs")
    train(model, optimizer, batches)
    dense = {n: base.get_submodule(n).weight + layer.dense_values("default") for n, layer in layers(model).items()}
    sparselet.reselect(model, batches, optimizer)
    seen = {}

    def look(model, batch):
        output = model(**batch)
        seen.update({n: layer.effective_weight() for n, layer in layers(model).items()})
        return output.loss

    sparselet.reselect(model, batches[:1], optimizer, loss=look)
    assert all(torch.equal(seen[name], weight) for name, weight in dense.items())


# What is refused


def test_freezing_before_a_selection_is_refused(make_llama):
    model, _ = start(make_llama())
    with pytest.raises(SelectionError, match="never selected"):
        sparselet.freeze_masks(model)


def test_selection_after_freezing_is_refused(make_llama, make_batches):
    model, _ = start(make_llama())
    sparselet.reselect(model, make_batches(1))
    sparselet.freeze_masks(model)
    assert all(layer.sparse_mask["default"].pending is None for layer in layers(model).values())
    with pytest.raises(SelectionError, match="frozen"):
        sparselet.reselect(model, make_batches(1))
    with pytest.raises(SelectionError, match="frozen"):
        sparselet.freeze_masks(model)


def test_selection_without_batches_or_loss_is_refused(make_llama, make_batches):
    model, _ = start(make_llama())
    with pytest.raises(SelectionError, match="no batch"):
        sparselet.reselect(model, [])
    with pytest.raises(SelectionError, match="no loss"):
        sparselet.reselect(model, [{"input_ids": make_batches(1)[0]["input_ids"]}])


def test_selection_with_several_active_adapters_is_refused(make_llama, make_batches):
    model, _ = start(make_llama())
    model.add_adapter("other", paper_config())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(SelectionError, match="exactly one"):
        sparselet.reselect(model, make_batches(1))


def test_selection_of_a_loaded_adapter_is_refused(make_llama, make_batches, wrap, tmp_path):
    base = make_llama()
    wrap(base).save_pretrained(tmp_path)
    with pytest.raises(SelectionError, match="not trainable"):
        sparselet.reselect(PeftModel.from_pretrained(base, tmp_path), make_batches(1))


def test_selection_of_a_merged_or_disabled_adapter_is_refused():
    model, optimizer, x = head()
    with model.disable_adapter(), pytest.raises(SelectionError, match="not trainable"):
        sparselet.reselect(model, [{"x": x}], optimizer, loss=call)
    model.merge_adapter()
    with pytest.raises(SelectionError, match="unmerge_adapter"):
        sparselet.reselect(model, [{"x": x}], optimizer, loss=call)
    model.unmerge_adapter()
    sparselet.reselect(model, [{"x": x}], optimizer, loss=call)


def test_target_that_takes_no_part_is_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x).sum()

    model, optimizer = start(Unused(), target_modules=["used", "unused"])
    with pytest.raises(SelectionError, match=r"^unused got no gradient"):
        sparselet.reselect(model, [{"x": torch.randn(2, 4)}], optimizer, loss=call)
    assert all(layer.sparse_mask["default"].dense for layer in layers(model).values())


def test_only_the_active_adapter_is_selected(make_llama, make_batches):
    batches = make_batches(2)
    model, _ = start(make_llama(), density=0.1)
    model.add_adapter("other", paper_config(density=0.2))
    model.set_adapter("other")
    sparselet.reselect(model, batches)
    sparselet.freeze_masks(model)
    for layer in layers(model).values():
        assert layer.sparse_mask["default"].dense
        assert not layer.sparse_mask["other"].dense
    assert to_adapter(model, "other").density == pytest.approx(0.2, abs=1e-3)


def test_density_one_keeps_every_entry(make_llama, make_batches):
    batches = make_batches(3)
    model, optimizer = start(make_llama(), density=1.0, score="mcs")
    train(model, optimizer, batches)
    before = {n: layer.delta("default").to_dense() for n, layer in layers(model).items()}
    assert sparselet.reselect(model, batches, optimizer).changed == 0
    assert all(torch.equal(layer.delta("default").to_dense(), before[n]) for n, layer in layers(model).items())


def test_at_least_one_entry_is_kept(make_llama, make_batches):
    model, _ = start(make_llama(), density=1e-9)
    assert sparselet.reselect(model, make_batches(1)).entries == 6


def test_a_selection_that_no_score_informs_warns(make_llama, make_batches):
    model, _ = start(make_llama(), score="mcs_neg")
    with pytest.warns(UserWarning, match="every mcs_neg score is 0"):
        sparselet.reselect(model, make_batches(1))


def test_random_masks_differ_by_data_and_by_seed_alone(make_llama):
    base = make_llama()

    def mask(**config):
        return masks(start(base, initial_mask="random", **config)[0])

    assert mask(data_fingerprint="a") == mask(data_fingerprint="a")
    assert mask(data_fingerprint="a") != mask(data_fingerprint="b")
    assert mask(seed=1) != mask(seed=2)
