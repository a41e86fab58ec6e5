"""A learned graft: its first step against autograd on a mask, and that it does better than the largest entries."""

import pytest
import torch
from helpers.tiny import make_adapter

import sparselet as sl
from sparselet.activations.probe import probe
from sparselet.apply import apply_temporarily
from sparselet.errors import DensityOutOfRange
from sparselet.models import load_model, load_tokenizer
from sparselet.tasks.rows import Row
from sparselet.workflows import learned_graft as module
from sparselet.workflows.graft import grafted
from sparselet.workflows.learned_graft import learn_graft


@pytest.fixture
def loaded(base_dir):
    model = load_model(base_dir)
    rows = [Row(f"word {i}?", str(i) * 3) for i in range(8)]
    return model, sl.probe_rows(model, load_tokenizer(base_dir), rows)


def loss_with(model, part, rows):
    with apply_temporarily(model, part), torch.no_grad():
        return float(module._loss(model, rows))


def test_the_loss_is_that_of_the_probe(loaded):
    model, rows = loaded
    losses = probe(model, rows, [-1]).losses
    scored = torch.tensor([float(row.scored) for row in rows], dtype=torch.float64)
    assert float(module._loss(model, rows).detach()) == pytest.approx(float((losses * scored).sum() / scored.sum()), rel=1e-4)


def test_a_step_follows_the_gradient_of_the_mask(loaded):
    model, rows = loaded
    expert = make_adapter(model, density=0.5, chat_template=False)
    name = next(iter(expert))
    delta, gamma = expert[name], torch.zeros(expert[name].nnz)
    gamma[delta.values.abs().argsort(descending=True)[: round(0.2 * delta.nnz)]] = 1
    gamma.requires_grad_()
    others = {other: part for other, part in grafted(expert, "top", 0.2, 0).items() if other != name}
    module_of_target = model.get_submodule(name)
    with apply_temporarily(model, others):
        dense = torch.zeros(delta.size).index_put((delta.indices.long(),), gamma * delta.values).view(delta.shape)
        weight = module_of_target.weight.detach() + dense
        del module_of_target._parameters["weight"]
        module_of_target.weight = weight
        (expected,) = torch.autograd.grad(module._loss(model, rows), gamma)
    scores = module._scaled(delta.values.abs()) - module.RATE * module._scaled(expected)
    best = scores.argsort(descending=True)[: round(0.2 * delta.nnz)].sort().values
    fresh = load_model(model.name_or_path)
    learned = learn_graft(fresh, expert, rows, 0.2, steps=1)
    assert set(learned[name].indices.tolist()) == set(delta.indices[best].tolist())


def test_a_learned_graft_has_a_lower_loss_and_leaves_the_weights(loaded):
    model, rows = loaded
    before = [parameter.clone() for parameter in model.parameters()]
    expert = make_adapter(model, density=0.5, chat_template=False)
    learned, top = learn_graft(model, expert, rows, 0.2, steps=20), grafted(expert, "top", 0.2, 0)
    assert learned.nnz == top.nnz
    assert loss_with(model, learned, rows) < loss_with(model, top, rows)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(DensityOutOfRange):
        learn_graft(model, expert, rows, 0.0)


def test_it_is_a_part_that_can_be_measured(experts, task_dir):
    settings = sl.GraftSettings((0.1,), ("top", "learned"), learning_rows=8, learning_steps=3)
    result = sl.graft(experts[0], task_dir, settings=settings, eval_settings=sl.EvalSettings(rows=2, max_new_tokens=3))
    top, learned = result.curve.points
    assert (top.part, learned.part, top.kept) == ("top", "learned", learned.kept)
    assert "learned" in str(result)
