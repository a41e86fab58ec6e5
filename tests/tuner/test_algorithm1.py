"""The tuner against Algorithm 1 of the paper, written out with dense tensors."""

import copy
import os

import pytest
import torch
from helpers.paper import paper_config
from peft import get_peft_model
from torch.func import functional_call

import sparselet
from sparselet.delta import block_for
from sparselet.tuner import sparselet_layers

SCORES = {
    "mcs": lambda w, g: w * g,
    "mcs_neg": lambda w, g: -w * g,
    "cs": lambda w, g: (w * g).abs(),
    "gm": lambda w, g: g.abs(),
    "wm": lambda w, g: w.abs(),
}


class DenseAlgorithm1:
    """W, Ŵ and M of every target as dense tensors; the forward pass computes with W + Ŵ·M."""

    def __init__(self, base, targets, density, block_size, score, make_optimizer):
        self.base = base.requires_grad_(False)
        self.density, self.block_size, self.score = density, block_size, score
        self.weights = {name: base.get_submodule(name).weight.detach() for name in targets}
        self.hats = {name: torch.zeros_like(weight).requires_grad_() for name, weight in self.weights.items()}
        self.masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        self.scores = {}
        self.optimizer = make_optimizer(list(self.hats.values()))

    def loss(self, batch, masked):
        hats = {name: hat * self.masks[name] if masked else hat for name, hat in self.hats.items()}
        weights = {f"{name}.weight": self.weights[name] + hat for name, hat in hats.items()}
        return functional_call(self.base, weights, kwargs=batch).loss

    def step(self, batch):
        self.optimizer.zero_grad()
        loss = self.loss(batch, masked=True)
        loss.backward()
        before = {name: hat.detach().clone() for name, hat in self.hats.items()}
        self.optimizer.step()
        # Weight decay moves every entry; those outside the mask stay as they were.
        for name, hat in self.hats.items():
            hat.data = torch.where(self.masks[name], hat.data, before[name])
        return loss.detach()

    def select(self, batches):
        self.optimizer.zero_grad()
        for batch in batches:
            (self.loss(batch, masked=False) / len(batches)).backward()
        for name, hat in self.hats.items():
            self.scores[name] = self.blocks(SCORES[self.score](hat.detach(), hat.grad))
            self.masks[name] = self.entries(self.top(self.scores[name]), hat)
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[hat][moment] *= self.masks[name]
        self.optimizer.zero_grad()

    def blocks(self, entries):
        h, w = block_for(self.block_size, entries.shape)
        return entries.unfold(0, h, h).unfold(1, w, w).sum((-1, -2))

    def top(self, scores):
        kept = max(1, round(self.density * scores.numel()))
        order = scores.flatten().argsort(descending=True)
        return torch.isin(torch.arange(scores.numel()), order[:kept]).view(scores.shape)

    def entries(self, blocks, like):
        """One number a block, at all of its entries."""
        h, w = block_for(self.block_size, like.shape)
        return blocks.repeat_interleave(h, 0).repeat_interleave(w, 1)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


def calm_adamw(parameters):
    """AdamW that makes little of gradients as small as float32's rounding."""
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1, eps=1e-3)


def prepare(base, *, density, block_size, score, make_optimizer=adamw):
    model = get_peft_model(copy.deepcopy(base), paper_config(density=density, block_size=block_size, score=score))
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    targets = list(sparselet_layers(model))
    oracle = DenseAlgorithm1(copy.deepcopy(base), targets, density, block_size, score, make_optimizer)
    return model, optimizer, oracle


def step(model, optimizer, batch):
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def masks_of(model):
    return {name: layer.delta("default").mask() for name, layer in sparselet_layers(model).items()}


def assert_same_masks(model, oracle):
    for name, mask in masks_of(model).items():
        assert torch.equal(mask, oracle.masks[name]), f"{name}: {(mask ^ oracle.masks[name]).sum()} entries differ"


def run(base, batches, *, steps, phase, every, density, block_size, score, make_optimizer=adamw):
    """Train both, comparing losses at every step and masks at every selection."""
    model, optimizer, oracle = prepare(base, density=density, block_size=block_size, score=score, make_optimizer=make_optimizer)
    selections, moved = 0, 0.0
    for i in range(1, steps + 1):
        batch = batches[i % len(batches)]
        assert torch.allclose(step(model, optimizer, batch), oracle.step(batch), rtol=1e-6, atol=1e-7)
        if i <= phase and i % every == 0:
            scoring = [batch, batches[(i + 1) % len(batches)]]
            selection = sparselet.reselect(model, scoring, optimizer)
            oracle.select(scoring)
            assert_same_masks(model, oracle)
            selections, moved = selections + 1, moved + selection.changed
        if i == phase:
            sparselet.freeze_masks(model)
    for name, layer in sparselet_layers(model).items():
        delta, expected = layer.delta("default"), oracle.hats[name].detach() * oracle.masks[name]
        assert torch.allclose(delta.to_dense(), expected, rtol=0, atol=1e-5)
        assert torch.allclose(layer.effective_weight(), oracle.weights[name] + expected, rtol=0, atol=1e-5)
        state = optimizer.state[layer.sparse_values["default"]]
        dense_state = oracle.optimizer.state[oracle.hats[name]]
        assert state["step"] == dense_state["step"] == steps
        moment = sparselet.SparseDelta(delta.shape, delta.indices, state["exp_avg"])
        assert torch.allclose(moment.to_dense(), dense_state["exp_avg"], rtol=0, atol=1e-7)
    assert selections == phase // every
    return moved


@pytest.mark.parametrize("kernel", ["dense", "bands"])
@pytest.mark.parametrize(("block_size", "density"), [(1, 0.1), (4, 0.25), ("row", 0.25), ("column", 0.25)])
def test_a_full_run_equals_the_dense_algorithm(make_llama, make_batches, monkeypatch, block_size, density, kernel):
    monkeypatch.setenv("SPARSELET_KERNEL", kernel)
    moved = run(
        make_llama(torch.float64),
        make_batches(20),
        steps=200,
        phase=100,
        every=20,
        density=density,
        block_size=block_size,
        score="mcs",
    )
    assert moved > 0.3  # else the masks agree only because they never change


@pytest.mark.parametrize(("block_size", "density"), [(1, 0.1), (16, 0.25), ("row", 0.25), ("column", 0.25)])
@pytest.mark.parametrize("kernel", ["dense", "bands", "triton"])
def test_a_run_in_float32_equals_the_dense_algorithm(make_llama, make_batches, monkeypatch, block_size, density, kernel):
    if kernel == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("runs by Triton's interpreter, from tests/test_triton.py")
    monkeypatch.setenv("SPARSELET_KERNEL", kernel)
    run(
        make_llama(),
        make_batches(12, rows=2),
        steps=15,
        phase=10,
        every=5,
        density=density,
        block_size=block_size,
        score="mcs",
        make_optimizer=calm_adamw,
    )


@pytest.mark.parametrize("block_size", [1, 4, "row", "column"])
@pytest.mark.parametrize("score", ["mcs", "mcs_neg", "cs", "gm", "wm"])
def test_every_score_selects_what_the_dense_algorithm_selects(make_llama, make_batches, score, block_size):
    run(
        make_llama(torch.float64),
        make_batches(12),
        steps=60,
        phase=40,
        every=10,
        density=0.1,
        block_size=block_size,
        score=score,
    )


@pytest.mark.parametrize("block_size", [1, 4, "row", "column"])
def test_float32_masks_differ_from_the_dense_ones_at_near_ties_only(make_llama, make_batches, block_size):
    batches = make_batches(10)
    model, optimizer, oracle = prepare(make_llama(), density=0.1, block_size=block_size, score="mcs")
    for batch in batches:
        step(model, optimizer, batch)
        oracle.step(batch)
    sparselet.reselect(model, batches[:2], optimizer)
    oracle.select(batches[:2])
    for name, mask in masks_of(model).items():
        scores = oracle.entries(oracle.scores[name], mask)
        threshold = scores[oracle.masks[name]].min()
        assert mask.sum() == oracle.masks[name].sum()
        assert ((scores - threshold).abs()[mask ^ oracle.masks[name]] < 1e-3 * threshold.abs()).all()


def test_a_value_that_left_the_mask_returns_when_selected_again(make_llama, make_batches):
    batches = make_batches(30)
    model, optimizer, _ = prepare(make_llama(torch.float64), density=0.1, block_size=1, score="mcs")
    returned, seen = 0, {}
    for i, batch in enumerate(batches, start=1):
        step(model, optimizer, batch)
        if i % 5:
            continue
        now = masks_of(model)
        values = {name: layer.delta("default").to_dense() for name, layer in sparselet_layers(model).items()}
        for name, value in values.items():
            seen[name] = torch.where(now[name], value, seen.get(name, value))
        before = now
        sparselet.reselect(model, [batch], optimizer)
        for name, mask in masks_of(model).items():
            back = mask & ~before[name]
            assert torch.equal(sparselet_layers(model)[name].delta("default").to_dense()[back], seen[name][back])
            returned += int((seen[name][back] != 0).sum())
    assert returned > 0
