"""What a pass uses is the base weights plus the active adapters' values, and the base weights stay as they are, bit for bit."""

import copy

import pytest
import torch
from helpers.paper import paper_config
from peft import get_peft_model
from torch import nn
from transformers import Adafactor as TransformersAdafactor

from sparselet.errors import NonFiniteValue, SelectionError
from sparselet.tuner import sparselet_layers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.values())
every_block = pytest.mark.parametrize("block_size", [1, 4, "row", "column"], ids=["element", "tiles", "rows", "columns"])


def layers(model):
    return sparselet_layers(model)


def expected_weight(base, layer, names):
    """Base plus values, added in the values' dtype and rounded once, at the masks; the base elsewhere."""
    weight = base.get_submodule(layer.target_name).weight.detach()
    deltas = [layer.delta(name) for name in names]
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    mask = torch.zeros(layer.shape, dtype=torch.bool)
    for delta in deltas:
        total = total + delta.to_dense()
        mask |= delta.mask()
    return torch.where(mask, total.to(weight.dtype), weight)


def used_weight(layer):
    """The weight of a forward pass, read off by unit vectors."""
    with torch.no_grad():
        return layer(torch.eye(layer.in_features, dtype=layer.base_weight.dtype)).t()


def assert_used(model, base, names=("default",), merged=False):
    """A pass uses base plus values, and the model's own weights are the base's, unless adapters are merged."""
    for layer in layers(model).values():
        expected = expected_weight(base, layer, names)
        assert torch.equal(used_weight(layer), expected), layer.target_name
        own = expected if merged else base.get_submodule(layer.target_name).weight
        assert torch.equal(bits(layer.get_base_layer().weight), bits(own)), layer.target_name


def assert_restored(model, base):
    """Every parameter of `base` has its equal, to the last bit, in the model with or without adapters."""
    found = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "sparse_values" not in name}
    for name, parameter in base.named_parameters():
        assert torch.equal(bits(found[name]), bits(parameter)), name


def bits(tensor):
    """Integers, so that −0 differs from 0."""
    return tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def changed(model, base):
    return any(not torch.equal(used_weight(layer), base.get_submodule(n).weight) for n, layer in layers(model).items())


def train(model, batch, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


@every_dtype
@pytest.mark.parametrize(
    "mask",
    [{}, {"block_size": 4}, {"block_size": "row"}, {"block_size": "column"}, {"initial_mask": "dense"}],
    ids=["element", "tiles", "rows", "columns", "dense"],
)
def test_weight_is_base_plus_values_after_each_optimizer_step(make_llama, wrap, make_batches, dtype, mask):
    base = make_llama(dtype)
    model = wrap(base, fill=0, **mask)
    assert_used(model, base)
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-2)
    for batch in make_batches(3):
        train(model, batch, optimizer, steps=1)
        assert_used(model, base)
    assert all(value.dtype == torch.float32 for layer in layers(model).values() for value in layer.sparse_values.values())
    assert changed(model, base)


def test_values_smaller_than_a_bfloat16_step_are_not_lost(make_llama, wrap):
    base = make_llama(torch.bfloat16)
    model = wrap(base, fill=0)
    layer = next(iter(layers(model).values()))
    values = layer.sparse_values["default"]
    for _ in range(1000):
        with torch.no_grad():
            values += 1e-5
    layer.refresh()
    torch.testing.assert_close(values.detach(), torch.full_like(values, 1e-2), rtol=1e-3, atol=0)
    assert_used(model, base)
    assert changed(model, base)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-single-tensor": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "transformers-adafactor": lambda p: TransformersAdafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "mask",
    [{}, {"block_size": 4}, {"block_size": "row"}, {"block_size": "column"}, {"initial_mask": "dense"}],
    ids=["element", "tiles", "rows", "columns", "dense"],
)
def test_every_optimizer_moves_the_weight(make_llama, wrap, make_batches, name, mask):
    base = make_llama(num_hidden_layers=1)
    model = wrap(base, fill=0, **mask)
    optimizer = OPTIMIZERS[name](parameters(model))
    for batch in make_batches(2):
        before = {n: used_weight(layer) for n, layer in layers(model).items()}
        train(model, batch, optimizer, steps=1)
        assert_used(model, base)
        assert all(not torch.equal(before[n], used_weight(layer)) for n, layer in layers(model).items())


def test_optimizer_that_writes_to_data_behind_autograd_moves_the_weight(make_llama, wrap, make_batches):
    class Foreign(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.sub_(parameter.grad)

    base = make_llama()
    model = wrap(base, fill=0)
    train(model, make_batches(1)[0], Foreign(parameters(model)))
    assert_used(model, base)
    assert changed(model, base)


def test_changing_values_by_hand_moves_the_weight_at_the_next_forward(make_llama, wrap, make_batches):
    base, batch = make_llama(), make_batches(1)[0]
    model = wrap(base)
    before = model(**batch).logits
    with torch.no_grad():
        for parameter in parameters(model):
            parameter.mul_(3)
    after = model(**batch).logits
    assert not torch.equal(before, after)
    assert_used(model, base)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_of_values_moves_the_weight(make_llama, wrap, make_batches, assign):
    base, batch = make_llama(), make_batches(1)[0]
    first, second = wrap(base), wrap(base, fill=0.1)
    state = {name: tensor.clone() for name, tensor in second.state_dict().items() if "sparse_" in name}
    first.load_state_dict(state, strict=False, assign=assign)
    assert torch.equal(first(**batch).logits, second(**batch).logits)
    assert_used(first, base)


def test_a_whole_state_dict_goes_into_an_equal_model(make_llama, wrap, make_batches):
    base, batch = make_llama(), make_batches(1)[0]
    first, second = wrap(base), wrap(base, fill=0.1)
    first.load_state_dict({name: tensor.clone() for name, tensor in second.state_dict().items()})
    assert torch.equal(first(**batch).logits, second(**batch).logits)
    assert_used(first, base)


def test_base_weights_are_loaded_under_an_active_adapter_but_not_under_a_merged_one(make_llama, wrap):
    base, other = make_llama(), make_llama(seed=1)
    model, state = wrap(base), wrap(other).state_dict()
    weights = {name: tensor for name, tensor in state.items() if "sparse_" not in name}
    model.merge_adapter()
    with pytest.raises(SelectionError, match="unmerge_adapter"):
        model.load_state_dict(weights, strict=False)
    assert_used(model, base, merged=True)
    model.unmerge_adapter()
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    assert_used(model, other)


@every_dtype
@every_block
def test_disable_adapter_restores_the_base_model(make_llama, wrap, make_batches, dtype, block_size):
    base, batch = make_llama(dtype), make_batches(1)[0]
    model = wrap(base, block_size=block_size)
    changed_logits = model(**batch).logits
    with model.disable_adapter():
        assert_restored(model.base_model.model, base)
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    assert torch.equal(model(**batch).logits, changed_logits)
    assert_used(model, base)


@every_dtype
@every_block
def test_merge_and_unmerge_adapter(make_llama, wrap, make_batches, dtype, block_size):
    base, batch = make_llama(dtype), make_batches(1)[0]
    model = wrap(base, block_size=block_size)
    expected = model(**batch).logits
    model.merge_adapter()
    assert torch.equal(model(**batch).logits, expected)
    assert_used(model, base, merged=True)
    model.unmerge_adapter()
    assert torch.equal(model(**batch).logits, expected)
    model.base_model.set_adapter([])
    assert_restored(model.base_model.model, base)


@every_dtype
@every_block
def test_merge_and_unload_keeps_the_change_and_unload_drops_it(make_llama, wrap, make_batches, dtype, block_size):
    base, batch = make_llama(dtype), make_batches(1)[0]
    model = wrap(base, block_size=block_size)
    expected = {name: expected_weight(base, layer, ["default"]) for name, layer in layers(model).items()}
    twin = copy.deepcopy(model)
    logits = model(**batch).logits
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    assert torch.equal(merged(**batch).logits, logits)
    assert all(torch.equal(merged.get_submodule(name).weight, weight) for name, weight in expected.items())
    assert merged.state_dict().keys() == base.state_dict().keys()
    unloaded = twin.unload()
    assert_restored(unloaded, base)
    assert torch.equal(unloaded(**batch).logits, base(**batch).logits)


@every_dtype
@pytest.mark.parametrize("sides", [(1, 1), (4, 4), (1, 4), (4, 8), ("row", "row"), ("row", "column"), ("column", 4)])
def test_overlapping_adapters_switch_without_a_trace(make_llama, wrap, add_adapter, make_batches, dtype, sides):
    base, batch = make_llama(dtype), make_batches(1)[0]
    model = wrap(base, density=0.5, block_size=sides[0])
    add_adapter(model, "other", density=0.5, block_size=sides[1], seed=1)
    assert all(layer.delta("default").overlap(layer.delta("other")) for layer in layers(model).values())
    assert_used(model, base)
    logits = {}
    for names in (["other"], ["default", "other"], ["default"], ["other", "default"], ["other"]):
        model.base_model.set_adapter(names)
        assert_used(model, base, names)
        logits[tuple(names)] = model(**batch).logits
        with model.disable_adapter():
            assert_restored(model.base_model.model, base)
        assert_used(model, base, names)
    assert not torch.equal(logits["other",], logits["default",])
    model.set_adapter("default")
    model.delete_adapter("other")
    assert_used(model, base)
    model.delete_adapter("default")
    assert_restored(model.base_model.model, base)


@every_block
def test_merging_several_adapters_until_unmerged_or_switched(make_llama, wrap, add_adapter, block_size):
    base = make_llama(torch.bfloat16)
    model = wrap(base, block_size=block_size, density=0.5)
    add_adapter(model, "other", block_size=block_size, density=0.5, seed=1)
    model.merge_adapter(["default", "other"])
    assert_used(model, base, ["default", "other"], merged=True)
    model.unmerge_adapter()
    assert_used(model, base, ["default"])
    model.merge_adapter(["default", "other"])
    with pytest.warns(UserWarning, match="Unmerging"):  # PEFT's rule for every method
        model.set_adapter("other")
    assert_used(model, base, ["other"])


def test_merged_adapters_are_deleted_only_after_unmerging(make_llama, wrap, add_adapter):
    base = make_llama(torch.bfloat16)
    model = wrap(base, density=0.5)
    add_adapter(model, "other", density=0.5, seed=1)
    model.merge_adapter(["default", "other"])
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("other")
    assert_used(model, base, ["default", "other"], merged=True)
    model.unmerge_adapter()
    model.delete_adapter("other")
    model.delete_adapter("default")
    assert_restored(model.base_model.model, base)


def test_deleting_the_active_or_an_idle_adapter(make_llama, wrap, add_adapter, make_batches):
    base, batch = make_llama(torch.bfloat16), make_batches(1)[0]
    model = wrap(base, density=0.5)
    add_adapter(model, "idle", density=0.5, seed=1)
    logits = model(**batch).logits
    model.delete_adapter("idle")
    assert torch.equal(model(**batch).logits, logits)
    add_adapter(model, "other", density=0.5, seed=2)
    model.delete_adapter("default")
    names = model.active_adapters
    assert_used(model, base, names)


def test_safe_merge_refuses_values_that_are_not_finite(make_llama, wrap):
    base = make_llama()
    model = wrap(base)
    layer = list(layers(model).values())[2]
    with torch.no_grad():
        layer.sparse_values["default"][3] = float("nan")
    with pytest.raises(NonFiniteValue, match=layer.target_name):
        model.merge_and_unload(safe_merge=True)


def test_sum_of_many_active_adapters_is_rounded_once(make_llama, wrap, add_adapter):
    base = make_llama(torch.bfloat16)
    model = wrap(base, density=0.5, fill=1e-3)
    for i in range(4):
        add_adapter(model, f"a{i}", density=0.5, fill=1e-3, seed=i + 1)
    names = ["default", "a0", "a1", "a2", "a3"]
    model.base_model.set_adapter(names)
    assert_used(model, base, names)
    model.base_model.set_adapter([])
    assert_restored(model.base_model.model, base)


def test_negative_zero_survives(wrap):
    base = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        base[0].weight.fill_(-0.0)
    model = wrap(base, target_modules=["0"], density=1.0)
    assert_restored(model.unload(), base)


@every_block
def test_deepcopy_is_independent(make_llama, wrap, make_batches, block_size):
    base, batch = make_llama(), make_batches(1)[0]
    model = wrap(base, block_size=block_size)
    logits = model(**batch).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, logits)
    train(twin, batch, torch.optim.AdamW(parameters(twin), lr=1e-1))
    assert_used(twin, base)
    assert not torch.equal(twin(**batch).logits, logits)
    assert torch.equal(model(**batch).logits, logits)
    assert_used(model, base)
    with twin.disable_adapter():
        assert_restored(twin.base_model.model, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_block
def test_casting_the_model_casts_the_base_and_keeps_the_values(make_llama, wrap, make_batches, dtype, block_size):
    base = make_llama()
    model = wrap(base, block_size=block_size)
    values = {n: layer.sparse_values["default"].detach().clone() for n, layer in layers(model).items()}
    model.to(dtype)
    for name, layer in layers(model).items():
        assert layer.sparse_values["default"].dtype == torch.float32
        assert torch.equal(layer.sparse_values["default"], values[name])
        assert layer.get_base_layer().weight.dtype == dtype
    base.to(dtype)
    assert_used(model, base)
    train(model, make_batches(1)[0], torch.optim.AdamW(parameters(model), lr=1e-2))
    assert_used(model, base)
    with model.disable_adapter():
        assert_restored(model.base_model.model, base)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_casting_methods_keep_the_values(make_llama, wrap, cast):
    model = wrap(make_llama())
    getattr(model, cast)()
    assert all(layer.sparse_values["default"].dtype == torch.float32 for layer in layers(model).values())


def test_casting_a_model_to_float64_and_back_changes_nothing(make_llama, wrap):
    base = make_llama()
    model = wrap(base)
    model.double().float()
    assert_used(model, base)
    assert all(layer.sparse_values["default"].dtype == torch.float32 for layer in layers(model).values())


def test_forward_without_changes_leaves_the_weights_untouched(make_llama, wrap, make_batches):
    model, batch = wrap(make_llama()), make_batches(1)[0]
    model(**batch)
    versions = [layer.get_base_layer().weight._version for layer in layers(model).values()]
    model(**batch)
    assert versions == [layer.get_base_layer().weight._version for layer in layers(model).values()]


def test_wrapped_model_uses_the_weight_of_the_base_model_itself(make_llama):
    base = make_llama()
    weights = {name: p.data_ptr() for name, p in base.named_parameters()}
    model = get_peft_model(base, paper_config())
    for name, layer in layers(model).items():
        assert layer.get_base_layer().weight.data_ptr() == weights[f"{name}.weight"]
