"""Passes of all kinds at the effective weight: decoding, threads, watched layers, trained base weights."""

import copy
import threading

import pytest
import torch
from helpers.paper import paper_config
from peft import get_peft_model
from torch import nn

import sparselet
from sparselet.errors import SelectionError
from sparselet.tuner import sparselet_layers

IDS = torch.tensor([[5, 9, 20, 31, 7]])
RANDOM = {"initial_mask": "random", "reselect_every": 0, "density": 0.5}


def dense_model(base, model, names=("default",)):
    """A copy of the base model with the adapters' changes added, rounded once."""
    dense = copy.deepcopy(base)
    for target, layer in sparselet_layers(model).items():
        weight = dense.get_submodule(target).weight
        change = sum(layer.delta(name).to_dense() for name in names)
        with torch.no_grad():
            weight.copy_(weight + change)
    return dense


def is_base(model, base):
    return all(
        torch.equal(layer.base_weight, base.get_submodule(target).weight) for target, layer in sparselet_layers(model).items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_answers_as_the_dense_model_and_leaves_the_base(make_llama, wrap, dtype):
    base = make_llama(dtype)
    model = wrap(base, fill=0.3)
    expected = dense_model(base, model).generate(IDS, max_new_tokens=12, do_sample=False)
    assert not torch.equal(expected, base.generate(IDS, max_new_tokens=12, do_sample=False))
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=12, do_sample=False), expected)
    assert is_base(model, base)


def test_generate_writes_each_weight_once_and_a_forward_pass_none(make_llama, wrap):
    base = make_llama()
    model = wrap(base, fill=0.3)
    layers = sparselet_layers(model).values()
    before = [layer.base_weight._version for layer in layers]
    with torch.no_grad():
        model(IDS)
    assert [layer.base_weight._version for layer in layers] == before
    model.generate(input_ids=IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert [layer.base_weight._version for layer in layers] == [version + 2 for version in before]  # in and out


def test_an_error_in_generate_leaves_the_base(make_llama, wrap):
    def fail_late(ids, scores):
        if ids.shape[1] > 8:
            raise KeyboardInterrupt
        return scores

    base = make_llama()
    model = wrap(base, fill=0.3)
    with pytest.raises(KeyboardInterrupt):
        model.generate(input_ids=IDS, max_new_tokens=12, do_sample=False, logits_processor=[fail_late])
    assert is_base(model, base)


def test_switching_within_generate_is_followed(make_llama, wrap, add_adapter):
    base = make_llama()
    model = wrap(base, fill=0.3)
    add_adapter(model, "other", fill=0.3, seed=1)
    seen = {}

    def ask_others(ids, scores):
        if ids.shape[1] == 9:
            with torch.no_grad(), model.disable_adapter():
                seen["base"] = model(IDS).logits
            model.set_adapter("other")
            seen["other"] = model(IDS).logits
            model.set_adapter("default")
        return scores

    expected = dense_model(base, model).generate(IDS, max_new_tokens=12, do_sample=False)
    found = model.generate(input_ids=IDS, max_new_tokens=12, do_sample=False, logits_processor=[ask_others])
    assert torch.equal(found, expected)
    assert torch.equal(seen["base"], base(IDS).logits)
    assert torch.equal(seen["other"], dense_model(base, model, ["other"])(IDS).logits)
    assert is_base(model, base)


def test_threads_share_a_model(make_llama, wrap):
    base = make_llama()
    model = wrap(base, fill=0.3)
    dense = dense_model(base, model)
    expected = dense.generate(IDS, max_new_tokens=10, do_sample=False), dense(IDS).logits
    wrong = []

    def work():
        for _ in range(5):
            answer = model.generate(input_ids=IDS, max_new_tokens=10, do_sample=False)
            with torch.no_grad():
                logits = model.base_model.model(IDS).logits
            if not torch.equal(answer, expected[0]) or not torch.allclose(logits, expected[1], atol=1e-5):
                wrong.append(answer)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert is_base(model, base)


def test_generation_between_forward_and_backward_changes_no_gradient(make_llama, wrap, make_batches):
    model, batch, gradients = wrap(make_llama(), fill=0.3), make_batches(1)[0], []
    for asked in (False, True):
        model.zero_grad()
        loss = model(**batch).loss
        if asked:
            model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False)
            model.merge_adapter()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6, dtype=dtype), nn.Tanh(), nn.Linear(6, 4, dtype=dtype))


X = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def filled(**changes):
    model = get_peft_model(net(), paper_config(**{"target_modules": ["0", "2"], **RANDOM, **changes}))
    sparselet.freeze_masks(model)
    for layer in sparselet_layers(model).values():
        layer.sparse_values["default"].data.normal_(std=0.3)
    return model


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("block_size", [1, 2, "row", "column"])
def test_base_weights_and_biases_that_require_gradients_get_them_too(watched, block_size):
    model = filled(block_size=block_size)
    layers = sparselet_layers(model)
    if watched:
        for layer in layers.values():
            layer.base_layer.register_forward_hook(lambda module, inputs, output: output * 2)
    for layer in layers.values():
        layer.base_layer.requires_grad_(True)
    dense = dense_model(net(), model).requires_grad_(True)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    model(x).square().sum().backward()
    times = 2 if watched else 1
    out = torch.tanh(dense[0](y) * times)
    (dense[2](out) * times).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for target, layer in layers.items():
        own = dense.get_submodule(target)
        torch.testing.assert_close(layer.base_layer.weight.grad, own.weight.grad)
        torch.testing.assert_close(layer.base_layer.bias.grad, own.bias.grad)
        at_mask = sparselet.kernels.gather(own.weight.grad, layer.sparse_indices["default"], layer.sparse_mask["default"].block)
        torch.testing.assert_close(layer.sparse_values["default"].grad, at_mask)


def test_values_given_by_functional_call_are_used():
    model = filled()
    values = {name: p.detach() * 2 for name, p in model.named_parameters() if "sparse_values" in name}
    found = torch.func.functional_call(model, values, (X,))
    for name, value in values.items():
        model.get_parameter(name).data = value
    assert torch.equal(found, model(X))


def test_a_changed_base_weight_is_not_differentiated_silently():
    model = filled()
    loss = model(X).sum()
    with torch.no_grad():
        sparselet_layers(model)["2"].base_weight.add_(1)
    with pytest.raises(SelectionError, match="2: the base weight was changed between"):
        loss.backward()


def test_a_moved_mask_gets_no_gradient_of_the_old_one():
    model = filled()
    loss = model(X).sum()
    layer = sparselet_layers(model)["0"]
    layer.set_mask("default", torch.arange(24), torch.zeros(24))
    with pytest.raises(SelectionError, match="adapter 'default' was changed"):
        loss.backward()


def test_a_weight_that_is_not_in_memory_is_refused():
    model = filled()
    sparselet_layers(model)["0"].base_layer.to("meta")
    with pytest.raises(SelectionError, match="not in memory"):
        model(X)


def test_a_weight_that_is_not_contiguous_is_used_and_merged():
    base = net()
    base[0].weight = nn.Parameter(torch.randn(8, 6, dtype=torch.float64).t())
    model = get_peft_model(copy.deepcopy(base), paper_config(target_modules=["0"], **RANDOM))
    sparselet_layers(model)["0"].sparse_values["default"].data.normal_()
    expected = dense_model(base, model)(X)
    torch.testing.assert_close(model(X), expected)  # not to the bit: the layout of the weight decides how products are summed
    model.merge_adapter()
    torch.testing.assert_close(model(X), expected)
    model.unmerge_adapter()
    assert is_base(model, base)


@pytest.mark.parametrize(
    "mask", [*({"density": 0.3, "block_size": size} for size in (1, 2, "row", "column")), {"initial_mask": "dense"}]
)
def test_a_state_of_another_mask_is_taken_over(mask):
    first, second = filled(), get_peft_model(net(), paper_config(target_modules=["0", "2"], **{**RANDOM, **mask, "seed": 3}))
    for layer in sparselet_layers(second).values():
        layer.sparse_values["default"].data.normal_(std=0.3)
    first.load_state_dict({name: tensor.clone() for name, tensor in second.state_dict().items()})
    assert torch.equal(first(X), second(X))
    with first.disable_adapter():
        assert torch.equal(first(X), net()(X))


def test_indices_that_cannot_be_a_mask_are_refused():
    model = filled()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["base_model.model.0.sparse_indices.default"][0] = 10_000
    with pytest.raises(sparselet.SparseletError):
        model.load_state_dict(state)
    with model.disable_adapter():
        assert torch.equal(model(X), net()(X))


@pytest.mark.parametrize("how", ["add", "data", "fused"])
def test_dense_values_that_change_before_the_backward_pass_are_refused(how):
    model = get_peft_model(net(), paper_config(target_modules=["0", "2"]))
    losses = [model(X).square().sum() for _ in range(2)]
    values = [p for p in model.parameters() if p.requires_grad]
    if how == "fused":
        losses.pop().backward()
        torch.optim.AdamW(values, fused=True).step()
    else:
        with torch.no_grad():
            (values[1] if how == "add" else values[1].data).add_(1)
    with pytest.raises(SelectionError, match=r"2: .*was changed between"):
        losses[0].backward()


@pytest.mark.parametrize("initial_mask", ["dense", "random"])
def test_a_state_that_was_loaded_stays_as_it_is_when_training_goes_on(initial_mask):
    model = get_peft_model(net(), paper_config(target_modules=["0", "2"], initial_mask=initial_mask, reselect_every=0))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    model.load_state_dict(state)
    for layer in sparselet_layers(model).values():
        layer.sparse_values["default"].data.add_(1)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
