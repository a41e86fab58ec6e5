"""The gradient of the sparse values equals dense autograd's gradient of the weight, read at the mask."""

import copy

import pytest
import torch
from helpers.paper import paper_config
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import sparselet
from sparselet import SparseDelta
from sparselet.kernels import gather
from sparselet.tuner import sparselet_layers


def dense_gradients(base, model, batches, autocast=None):
    """Dense ∂L/∂W, summed over the batches, of a copy of the base model with the adapter's values added."""
    oracle = copy.deepcopy(base).requires_grad_(False)
    weights = {}
    for name, layer in sparselet_layers(model).items():
        weight = oracle.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_(weight + layer.delta("default").to_dense())  # rounded once, as the tuner does
        weights[name] = weight.requires_grad_()
    for batch in batches:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = oracle(**batch).loss
        loss.backward()
    return {name: weight.grad for name, weight in weights.items()}


def assert_gradients(base, model, batches, rtol=1e-10, atol=1e-12, autocast=None):
    for batch in batches:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(**batch).loss
        loss.backward()
    expected = dense_gradients(base, model, batches, autocast)
    for name, layer in sparselet_layers(model).items():
        state, values = layer.sparse_mask["default"], layer.sparse_values["default"]
        dense = expected[name]
        at_mask = dense if state.dense else gather(dense, layer.sparse_indices["default"], state.block)
        assert values.grad.dtype == values.dtype
        assert at_mask.abs().max() > 0
        torch.testing.assert_close(
            values.grad, at_mask.to(values.dtype), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", ["make_llama", "make_gpt2"])
@pytest.mark.parametrize(
    "mask",
    [*({"block_size": size} for size in (1, 4, "row", "column")), {"initial_mask": "dense"}],
    ids=["element", "tiles", "rows", "columns", "dense"],
)
def test_gradient_equals_dense_autograd(request, wrap, make_batches, kind, mask):
    base = request.getfixturevalue(kind)(torch.float64)
    assert_gradients(base, wrap(base, **mask), make_batches(1))


@pytest.mark.parametrize("block_size", [1, 4, "row", "column"])
def test_gradients_of_micro_batches_add_up(make_llama, wrap, make_batches, block_size):
    base = make_llama(torch.float64)
    assert_gradients(base, wrap(base, block_size=block_size), make_batches(3))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["make_llama", "make_gpt2"])
def test_gradient_under_gradient_checkpointing(request, wrap, make_batches, kind, reentrant):
    base = request.getfixturevalue(kind)(torch.float64)
    model = wrap(base)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    assert_gradients(base, model, make_batches(2))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("initial_mask", ["dense", "gradient"])
def test_gradient_checkpointing_does_not_change_what_is_selected(make_llama, make_batches, reentrant, initial_mask):
    batches, masks = make_batches(2), []
    for checkpointed in (False, True):
        config = paper_config(density=0.1, initial_mask=initial_mask, score="gm")
        model = get_peft_model(make_llama(torch.float64), config)
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        sparselet.reselect(model, batches)
        masks.append([layer.sparse_indices["default"] for layer in sparselet_layers(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_first_layer_whose_input_needs_no_gradient_is_trained(wrap):
    base = nn.Sequential(nn.Linear(8, 6, dtype=torch.float64), nn.Tanh(), nn.Linear(6, 4, dtype=torch.float64))
    model = wrap(base, target_modules=["0", "2"])
    x = torch.randn(5, 8, dtype=torch.float64)
    oracle = copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in sparselet_layers(model).items():
            oracle.get_submodule(name).weight += layer.delta("default").to_dense()
    model(x).square().sum().backward()
    oracle(x).square().sum().backward()
    for name, layer in sparselet_layers(model).items():
        expected = gather(oracle.get_submodule(name).weight.grad, layer.sparse_indices["default"])
        torch.testing.assert_close(layer.sparse_values["default"].grad, expected)


def test_gradient_of_the_input_is_that_of_the_changed_weight(wrap):
    base = nn.Sequential(nn.Linear(8, 6, dtype=torch.float64))
    model = wrap(base, target_modules=["0"])
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()
    weight = base[0].weight + sparselet_layers(model)["0"].delta("default").to_dense()
    assert not torch.equal(weight, base[0].weight)
    torch.testing.assert_close(x.grad, 2 * (x @ weight.T + base[0].bias) @ weight)


@pytest.mark.parametrize("kind", ["make_llama", "make_gpt2"])
def test_gradient_under_autocast(request, wrap, make_batches, kind):
    base = request.getfixturevalue(kind)()
    assert_gradients(base, wrap(base), make_batches(2), rtol=2e-2, atol=2e-4, autocast=torch.bfloat16)


def test_gradient_of_a_bfloat16_model_is_float32(make_llama, wrap, make_batches):
    base = make_llama(torch.bfloat16)
    model = wrap(base)
    for layer in sparselet_layers(model).values():
        assert layer.sparse_values["default"].dtype == torch.float32
    assert_gradients(base, model, make_batches(1), rtol=2e-2, atol=2e-4)


def test_reselect_leaves_gradients_of_modules_to_save_alone(make_batches):
    base = BertForSequenceClassification(
        BertConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
        )
    )
    model = get_peft_model(base, paper_config(modules_to_save=["classifier"]))
    batch = {"input_ids": make_batches(1)[0]["input_ids"], "labels": torch.tensor([0, 1, 2, 0])}
    classifier = {n: p for n, p in model.named_parameters() if p.requires_grad and "classifier" in n}
    assert classifier
    sparselet.reselect(model, [batch])
    assert all(p.grad is None for p in classifier.values())
    model(**batch).loss.backward()
    before = {n: p.grad.clone() for n, p in classifier.items()}
    sparselet.reselect(model, [batch])
    assert all(torch.equal(p.grad, before[n]) for n, p in classifier.items())
    assert all(p.requires_grad for p in classifier.values())


class Twice(nn.Module):
    """One layer applied twice in a forward pass."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(8, 8, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.shared(torch.tanh(self.shared(x))).square().sum()


def test_layer_called_twice_gets_the_sum_of_both_gradients(wrap):
    base, x = Twice(), torch.randn(4, 8, dtype=torch.float64)
    model = wrap(base, target_modules=["shared"])
    oracle = copy.deepcopy(base)
    layer = sparselet_layers(model)["shared"]
    with torch.no_grad():
        oracle.shared.weight += layer.delta("default").to_dense()
    model(x).backward()
    oracle(x).backward()
    torch.testing.assert_close(
        layer.sparse_values["default"].grad, gather(oracle.shared.weight.grad, layer.sparse_indices["default"])
    )


@pytest.mark.parametrize("batches", [1, 2])
def test_layer_called_twice_is_scored_by_the_sum_of_both_gradients(batches):
    base, inputs = Twice(), [torch.randn(4, 8, dtype=torch.float64) for _ in range(batches)]
    oracle = copy.deepcopy(base)
    model = get_peft_model(base, paper_config(target_modules=["shared"], density=0.25, score="gm"))
    sparselet.reselect(model, [{"x": x} for x in inputs], loss=lambda model, batch: model(**batch))
    for x in inputs:
        oracle(x).backward()
    expected = oracle.shared.weight.grad.abs().flatten().topk(16).indices.sort().values
    assert sparselet_layers(model)["shared"].sparse_indices["default"].tolist() == expected.tolist()


def test_layer_whose_output_is_changed_in_place_has_the_right_gradient(wrap):
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 8, dtype=torch.float64)

        def forward(self, x):
            return self.proj(x).clamp_(-0.5, 0.5).sum()

    base, x = Clamped(), torch.randn(4, 8, dtype=torch.float64)
    model = wrap(base, target_modules=["proj"])
    layer = sparselet_layers(model)["proj"]
    weight = (layer.weight + layer.delta("default").to_dense()).detach().requires_grad_()
    model(x).backward()
    nn.functional.linear(x, weight, base.proj.bias).clamp(-0.5, 0.5).sum().backward()
    torch.testing.assert_close(layer.sparse_values["default"].grad, gather(weight.grad, layer.sparse_indices["default"]))


def test_several_active_adapters_each_get_the_gradient_at_their_mask(make_llama, wrap, add_adapter, make_batches):
    model = wrap(make_llama(torch.float64), density=0.2)
    add_adapter(model, "other", density=0.2, block_size=4, seed=1)
    model.base_model.set_adapter(["default", "other"])
    model(**make_batches(1)[0]).loss.backward()
    for layer in sparselet_layers(model).values():
        dense = {n: SparseDelta(layer.shape, layer.sparse_indices[n], v.grad) for n, v in layer.sparse_values.items()}
        both = dense["default"].mask() & dense["other"].mask()
        assert both.any()
        assert torch.equal(dense["default"].to_dense()[both], dense["other"].to_dense()[both])


def test_frozen_and_disabled_adapters_get_no_gradient(make_llama, wrap, make_batches):
    model, batch = wrap(make_llama()), make_batches(1)[0]
    with torch.no_grad():
        assert not model(**batch).loss.requires_grad
    with model.disable_adapter():
        assert not model(**batch).loss.requires_grad
    model.requires_grad_(False)
    assert not model(**batch).loss.requires_grad
