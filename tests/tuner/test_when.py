"""When masks are chosen: once before the first step, or a part at a time during training; and what scores read of a model."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

import sparselet
from sparselet import SparseletConfig
from sparselet.errors import ConfigError, SelectionError
from sparselet.masks import blocks_to_keep
from sparselet.scores import SCORES
from sparselet.tuner import sparselet_layers

NAME = "default"
DATA_FREE = [name for name, score in SCORES.items() if score.ranks_untrained and not score.needs_data]


def start(base, **config):
    model = get_peft_model(copy.deepcopy(base), SparseletConfig(**{"density": 0.1, "when": "static", **config}))
    return model, sparselet_layers(model)


def masks(layers):
    return {name: layer.sparse_indices[NAME].tolist() for name, layer in layers.items()}


def gradients_by_batch(base, names, batches):
    """Dense gradients of plain autograd, one mapping a batch."""
    oracle = copy.deepcopy(base).requires_grad_(False)
    weights = {name: oracle.get_submodule(name).weight.requires_grad_() for name in names}
    results = []
    for batch in batches:
        oracle(**batch).loss.backward()
        results.append({name: weight.grad.clone() for name, weight in weights.items()})
        oracle.zero_grad()
    return results


def largest(score, density=0.1):
    count = blocks_to_keep(density, score.numel())
    return sorted(score.flatten().sort(descending=True, stable=True).indices[:count].tolist())


@pytest.mark.parametrize("score", DATA_FREE)
def test_a_score_of_the_weights_alone_needs_no_schedule_and_no_data(make_llama, make_batches, score):
    base = make_llama()
    model, layers = start(base, score=score)
    assert all(not layer.sparse_mask[NAME].selecting and layer.sparse_mask[NAME].selections == 1 for layer in layers.values())
    assert masks(layers) == masks(start(base, score=score)[1])
    if score == "magnitude":
        assert masks(layers) == {name: largest(base.get_submodule(name).weight.abs()) for name in layers}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = masks(layers)
    losses = []
    for _ in range(4):
        for batch in make_batches(1):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert masks(layers) == before


def test_lift_ranks_by_the_low_rank_part(make_llama):
    base = make_llama(torch.float64)
    _, layers = start(base, score="lift", density=0.4)
    for name, layer in layers.items():
        weight = base.get_submodule(name).weight.detach()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        rank = min(*weight.shape, max(8, round(blocks_to_keep(0.4, weight.numel()) / sum(weight.shape))))
        part = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert layer.sparse_indices[NAME].tolist() == largest(part.abs(), 0.4)


@pytest.mark.parametrize("score", ["gm", "snip", "fisher"])
def test_static_masks_are_the_best_by_the_mean_over_the_scoring_batches(make_llama, make_batches, score):
    base, batches = make_llama(torch.float64), make_batches(3)
    model, layers = start(base, score=score)
    sparselet.reselect(model, batches)
    sparselet.freeze_masks(model)
    by_batch = gradients_by_batch(base, layers, batches)
    for name, layer in layers.items():
        g = torch.stack([gradients[name] for gradients in by_batch])
        weight = base.get_submodule(name).weight.detach()
        expected = {"gm": g.mean(0).abs(), "snip": (weight * g.mean(0)).abs(), "fisher": g.square().mean(0)}[score]
        assert layer.sparse_indices[NAME].tolist() == largest(expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_wanda_reads_the_norms_of_the_inputs(make_llama, make_gpt2, make_batches, architecture):
    base, batches = (make_llama if architecture == "llama" else make_gpt2)(torch.float64), make_batches(2)
    model, layers = start(base, score="wanda")
    sparselet.reselect(model, batches)
    oracle, sums = copy.deepcopy(base), {}
    for name in layers:

        def record(module, arguments, name=name):
            x = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.square().sum(0)

        oracle.get_submodule(name).register_forward_pre_hook(record)
    for batch in batches:
        oracle(**batch)
    for name, layer in layers.items():
        weight, norms = base.get_submodule(name).weight.detach(), sums[name].sqrt()
        score = weight.abs() * (norms[:, None] if layer.transposed else norms[None, :])
        chosen = set(layer.sparse_indices[NAME].tolist())
        assert len(chosen ^ set(largest(score))) <= 2  # norms are summed in float32


@pytest.mark.parametrize("block_size", [1, 4])
def test_balanced_masks_have_as_many_blocks_in_each_output_row(make_llama, make_gpt2, block_size):
    for base in (make_llama(), make_gpt2()):
        _, layers = start(base, score="magnitude", balance="row", block_size=block_size, density=0.3)
        for name, layer in layers.items():
            weight = base.get_submodule(name).weight
            blocks = layer.sparse_indices[NAME].long()
            assert len(blocks) == blocks_to_keep(0.3, weight.numel() // block_size**2)
            columns = weight.shape[1] // block_size
            rows = blocks % columns if layer.transposed else blocks // columns
            count = rows.bincount(minlength=(weight.shape[1] if layer.transposed else weight.shape[0]) // block_size)
            assert count.min() >= len(blocks) // len(count)


def test_a_refresh_exchanges_what_moved_least_and_keeps_the_rest_with_its_moments(make_llama, make_batches):
    base, batches = make_llama(torch.float64), make_batches(4)
    model, layers = start(base, when="refresh", score="gm", replaced=0.5, density=0.2)
    sparselet.reselect(model, batches[:1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    before = {
        name: (layer.sparse_indices[NAME].long(), layer.sparse_values[NAME].detach().clone()) for name, layer in layers.items()
    }
    moments = {name: optimizer.state[layer.sparse_values[NAME]]["exp_avg"].clone() for name, layer in layers.items()}
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in layers.items():
            tuned.get_submodule(name).weight.copy_(layer.effective_weight())
    selection = sparselet.reselect(model, batches[:2], optimizer, progress=0.5)
    by_batch = gradients_by_batch(tuned, layers, batches[:2])
    for name, layer in layers.items():
        indices, values = before[name]
        count, exchanged = len(indices), round(0.25 * len(indices))
        stay = indices[values.abs().sort(descending=True, stable=True).indices[: count - exchanged]]
        g = torch.stack([gradients[name] for gradients in by_batch])
        score = g.mean(0).abs().flatten()
        score[indices] = -1
        grown = score.sort(descending=True, stable=True).indices[:exchanged]
        now = layer.sparse_indices[NAME].long()
        assert set(now.tolist()) == set(stay.tolist()) | set(grown.tolist())
        state = optimizer.state[layer.sparse_values[NAME]]
        kept = torch.isin(now, stay)
        torch.testing.assert_close(layer.sparse_values[NAME].detach()[kept], values[torch.isin(indices, stay)])
        torch.testing.assert_close(state["exp_avg"][kept], moments[name][torch.isin(indices, stay)])
        assert not layer.sparse_values[NAME].detach()[~kept].any()
        steps, new = int(state["step"]), now[~kept]
        torch.testing.assert_close(state["exp_avg"][~kept], (1 - 0.9**steps) * g.mean(0).flatten()[new])
        torch.testing.assert_close(state["exp_avg_sq"][~kept], (1 - 0.999**steps) * g.square().mean(0).flatten()[new])
    assert selection.changed == pytest.approx(0.25, abs=0.02)


def test_a_layer_used_twice_counts_once_a_batch_in_the_mean_of_squares():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.q_proj = nn.Linear(8, 8, dtype=torch.float64)

        def forward(self, x):
            return self.q_proj(torch.tanh(self.q_proj(x))).square().mean()

    base, generator = Twice(), torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    model, layers = start(base, score="fisher", target_modules=["q_proj"])
    sparselet.reselect(model, batches, loss=lambda module, x: module(x))
    squares = torch.zeros(8, 8, dtype=torch.float64)
    for x in batches:
        base.zero_grad()
        base(x).backward()
        squares += base.q_proj.weight.grad.square()
    assert layers["q_proj"].sparse_indices[NAME].tolist() == largest(squares)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"when": "static", "score": "mcs"}, "score 'mcs' is 0 for entries that were never trained"),
        ({"when": "static", "score": "gm", "initial_mask": "random"}, "initial_mask is a setting of when='paper'"),
        ({"when": "static", "score": "gm", "reselect_every": 5}, "reselect_every does not go with when='static'"),
        ({"when": "refresh", "score": "gm", "replaced": 1.5}, "replaced is a fraction of the mask"),
        ({"score": "gm", "balance": "row", "scope": "global"}, "balance='row' does not go with scope='global'"),
        ({"when": "never"}, "when must be one of"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SparseletConfig(**settings)


def test_static_masks_that_need_data_must_be_selected_before_they_are_frozen(make_llama):
    model, _ = start(make_llama(), score="gm")
    with pytest.raises(SelectionError, match="was never selected"):
        sparselet.freeze_masks(model)
    with pytest.raises(SelectionError, match="no batch to score on"):
        sparselet.reselect(model, [])
