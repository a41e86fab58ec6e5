"""An adapter in a model's weights for a while, and the base model back to the last bit."""

import pytest
import torch
from helpers.tiny import make_adapter, make_model

from sparselet import SparseAdapter, SparseDelta
from sparselet.adapter_metadata import AdapterMetadata
from sparselet.apply import apply_temporarily
from sparselet.errors import ShapeMismatch, UnknownTarget, UnsupportedExpert, WrongBase

INTEGER = {2: torch.int16, 4: torch.int32}
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
every_block = pytest.mark.parametrize("block_size", [1, 4, "row", "column"], ids=["element", "tiles", "rows", "columns"])
FIRST = "model.layers.0.self_attn.q_proj"


def bits(model):
    """All of a model's parameters as integers, so that −0 differs from 0."""
    return {name: p.detach().clone().view(INTEGER[p.element_size()]) for name, p in model.named_parameters()}


def assert_bits(model, expected):
    found = bits(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def odd(model):
    """Some weights that adding and subtracting would not bring back."""
    weight = model.get_submodule(FIRST).weight
    with torch.no_grad():
        weight.view(-1)[:4] = torch.tensor([-0.0, 0.0, 1e-7, 3.0], dtype=weight.dtype)
    return model


@every_dtype
@every_block
def test_weights_are_the_sum_rounded_once_and_then_the_base_bit_for_bit(dtype, block_size):
    model = odd(make_model(dtype))
    adapter = make_adapter(model, block_size, density=0.5)
    before, base = bits(model), {name: model.get_submodule(name).weight.detach().clone() for name in adapter}
    with apply_temporarily(model, adapter) as inside:
        assert inside is model
        for name, delta in adapter.items():
            weight = model.get_submodule(name).weight
            total = (base[name].double() + delta.to_dense().double()).float().to(dtype)
            assert torch.equal(weight, torch.where(delta.mask(), total, base[name])), name
        untouched = {name for name in before if name.removesuffix(".weight") not in adapter}
        assert all(torch.equal(bits(model)[name], before[name]) for name in untouched)
    assert_bits(model, before)


@every_dtype
def test_a_hundred_turns_do_not_wear_the_base(dtype):
    model = odd(make_model(dtype))
    adapters = [make_adapter(model, block, seed=seed) for seed, block in ((1, 1), (2, 4), (3, 8))]
    before = bits(model)
    for turn in range(100):
        with apply_temporarily(model, adapters[turn % 3]):
            pass
    assert_bits(model, before)


def test_blocks_inside_blocks_unwind_in_order():
    model = make_model()
    outer, inner = make_adapter(model), make_adapter(model, 4, seed=2)
    inner.fingerprints = dict.fromkeys(inner)  # made for the base, applied upon another adapter
    before = bits(model)
    with apply_temporarily(model, outer):
        middle = bits(model)
        with apply_temporarily(model, inner):
            pass
        assert_bits(model, middle)
    assert_bits(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_base_comes_back_after_an_error_in_the_block(error):
    model = make_model()
    before = bits(model)
    with pytest.raises(error), apply_temporarily(model, make_adapter(model)):
        raise error
    assert_bits(model, before)


def test_an_empty_adapter_or_an_empty_target_changes_nothing():
    model = make_model()
    before = bits(model)
    for adapter in ({}, {FIRST: SparseDelta.empty((16, 16))}):
        with apply_temporarily(model, adapter):
            assert_bits(model, before)


def test_weights_that_require_gradients_can_be_changed():
    model = make_model()
    assert model.get_submodule(FIRST).weight.requires_grad
    with apply_temporarily(model, make_adapter(model)):
        assert model.get_submodule(FIRST).weight.is_leaf
    assert model.get_submodule(FIRST).weight.requires_grad


def test_answers_differ_inside_and_agree_after():
    model = make_model()
    ids = torch.arange(8)[None]
    before = model(input_ids=ids).logits
    with apply_temporarily(model, make_adapter(model)):
        assert not torch.allclose(model(input_ids=ids).logits, before)
    assert torch.equal(model(input_ids=ids).logits, before)


# Refused before anything is changed


def refused(model, adapter, error, match):
    before = bits(model)
    with pytest.raises(error, match=match), apply_temporarily(model, adapter):
        pytest.fail("the block was entered")
    assert_bits(model, before)


def test_an_adapter_of_another_base_is_refused():
    refused(make_model(seed=1), make_adapter(make_model()), WrongBase, "the base weights differ in 6 of 6 targets")


def test_one_differing_target_is_enough():
    model = make_model()
    adapter = make_adapter(model)
    last = list(adapter)[-1]
    with torch.no_grad():
        model.get_submodule(last).weight[0, 0] += 1
    refused(model, adapter, WrongBase, f"1 of 6 targets, first in {last}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_in_another_dtype_is_the_same_base(dtype):
    adapter = make_adapter(make_model())
    model = make_model(dtype)
    before = bits(model)
    with apply_temporarily(model, adapter):
        pass
    assert_bits(model, before)


def test_an_adapter_whose_last_target_the_model_lacks_changes_nothing():
    model = make_model(num_hidden_layers=1)
    refused(model, make_adapter(make_model()), UnknownTarget, r"no target model\.layers\.1\.self_attn")


def test_a_target_of_another_shape_changes_nothing():
    model = make_model()
    adapter = make_adapter(model)
    last = list(adapter)[-1]
    deltas = {**adapter, last: SparseDelta.empty((4, 4))}
    refused(model, SparseAdapter(deltas), ShapeMismatch, r"has shape \[4, 4\], the model \[8, 16\]")


@pytest.mark.parametrize("name", ["model.layers", "model.nothing", "lm_head.weight"])
def test_a_target_without_a_weight_is_refused(name):
    model = make_model()
    refused(model, {FIRST: make_adapter(model)[FIRST], name: SparseDelta.empty((16, 16))}, UnknownTarget, name)


def test_an_adapter_that_trained_modules_in_full_is_refused():
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapter = make_adapter(model)
    trained = {"metadata": AdapterMetadata(modules_to_save=["lm_head"]), "modules": {"lm_head.weight": torch.ones(2)}}
    for field, value in trained.items():
        refused = SparseAdapter(adapter, {}, adapter.fingerprints)
        setattr(refused, field, value)
        with pytest.raises(UnsupportedExpert, match="also trained lm_head"), apply_temporarily(model, refused):
            pass
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
