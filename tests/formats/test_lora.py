"""A LoRA is read as what PEFT adds to the weights, or refused."""

import json

import pytest
import torch
from helpers.foreign import FIRST, QV, edit, refused, save_peft, tuner_layers
from helpers.tiny import logits, make_adapter, make_gpt2, make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from sparselet import merge
from sparselet.apply import apply_temporarily
from sparselet.errors import (
    BadConfig,
    BadDtype,
    BadShape,
    MissingTensor,
    NonFiniteValue,
    UnknownTensor,
    UnsafePath,
    UnsupportedExpert,
)
from sparselet.formats import LoraFile, open_expert
from sparselet.formats.lora.read import _READ_FIELDS, REFUSED

LORAS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha": {"lora_alpha": 3},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 5, "v_proj": 2},
        "alpha_pattern": {"proj": 99, r"model\.layers\.0\..*": 7, "q_proj": 1.5, "self_attn.v_proj": 40},
    },
    "patterns and rslora": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"q.*": 2, "^model.*v_proj": 5},
    },
    "all linear": {"target_modules": "all-linear"},
    "eva": {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
}


@pytest.mark.parametrize("fields", LORAS.values(), ids=LORAS)
def test_lora_is_what_peft_adds_to_the_weights(tmp_path, fields):
    config = LoraConfig(**{"r": 4, "target_modules": QV, "task_type": "CAUSAL_LM", **fields})
    model = save_peft(tmp_path / "lora", config)
    expert = open_expert(tmp_path / "lora")
    assert isinstance(expert, LoraFile)
    layers = tuner_layers(model)
    assert set(expert) == set(layers)
    for name, layer in layers.items():
        delta = expert[name]
        assert torch.equal(delta.to_dense(), layer.get_delta_weight("default")), name
        assert delta.shape == expert.shapes[name] == tuple(layer.weight.shape)
        assert delta.nnz == delta.size
    assert expert.nnz == sum(delta.nnz for delta in expert.values())
    assert expert.metadata.task_type == "CAUSAL_LM"
    expert.check_values()
    base = make_model()
    merged = model.merge_and_unload()
    with apply_temporarily(base, expert):
        for name, parameter in merged.named_parameters():
            torch.testing.assert_close(base.get_parameter(name), parameter, rtol=0, atol=1e-6)


def test_lora_of_gpt2_lies_as_conv1d_stores_its_weight(tmp_path):
    model = save_peft(
        tmp_path, LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM"), make_gpt2()
    )
    expert = open_expert(tmp_path)
    assert {shape for name, shape in expert.shapes.items() if name.endswith("c_attn")} == {(16, 48)}
    for name, layer in tuner_layers(model).items():
        assert torch.equal(expert[name].to_dense(), layer.get_delta_weight("default"))
    expected = logits(model)
    base = make_gpt2()
    with apply_temporarily(base, expert):
        torch.testing.assert_close(logits(base), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_lora_in_another_dtype_is_multiplied_in_float32(tmp_path, dtype):
    save_peft(tmp_path, LoraConfig(r=4, target_modules=QV))

    def cast(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    edit(tmp_path, cast)
    expert = open_expert(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{FIRST}.lora_{side}.weight"].float() for side in "AB")
    assert torch.equal(expert[FIRST].to_dense(), (b @ a) * 2)
    assert expert[FIRST].values.dtype == torch.float32


UNSUPPORTED = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "target_parameters": ["experts.up"],
    "alora_invocation_tokens": [3],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "monteclora_config": {"num_samples": 8},
    "kasa_config": {"l2": 1},
    "layer_replication": [[0, 2], [1, 2]],
    "megatron_config": {"size": 1},
    "ensure_weight_tying": True,
    "enable_lora": [True, False],
    "use_something_new": True,
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_a_lora_that_is_more_than_b_a_is_refused_by_field(lora, field):
    refused(UnsupportedExpert, rf"adapter_config\.json: {field} is ", edit(lora, **{field: UNSUPPORTED[field]}))


def test_every_field_of_a_lora_that_peft_knows_is_used_refused_or_harmless(lora):
    """A field that a later PEFT adds is refused when it is set, so this list must be looked at then."""
    known = json.loads((lora / "adapter_config.json").read_text()).keys()
    unset = {"peft_type", "use_something_new", "enable_lora"}
    assert known - set(_READ_FIELDS.split()) - set(REFUSED) == set()
    assert set(UNSUPPORTED) - unset <= known


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new", ["pissa"]])
def test_starts_that_change_the_base_model_are_refused(lora, start):
    edit(lora, init_lora_weights=start)
    refused(UnsupportedExpert, "init_lora_weights is .*: such a start changes the base model", lora)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_model_alone_are_read(lora, start):
    assert len(open_expert(edit(lora, init_lora_weights=start))) == 4


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_peft_changes_the_base_model_for_what_is_refused(start):
    base, model = make_model(), make_model()
    get_peft_model(model, LoraConfig(r=4, target_modules=QV, init_lora_weights=start))
    weight = model.get_submodule(FIRST).base_layer.weight
    assert not torch.allclose(weight, base.get_submodule(FIRST).weight, atol=1e-3)


A, B = f"base_model.model.{FIRST}.lora_A.weight", f"base_model.model.{FIRST}.lora_B.weight"


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (lambda t: t.pop(A), MissingTensor, r"lora_A\.weight is missing"),
        (lambda t: t.pop(B), MissingTensor, r"lora_B\.weight is missing"),
        (lambda t: t.update({B: t[B][:, :3]}), BadShape, "A has rank 4, B has rank 3"),
        (lambda t: t.update({A: t[A][:3], B: t[B][:, :3]}), BadShape, r"rank 3, but adapter_config\.json says 4"),
        (lambda t: t.update({A: t[A][..., None, None]}), UnsupportedExpert, "convolutions are not read"),
        (lambda t: t.update({A: t[A].flatten()}), BadShape, "expected two positive sides"),
        (lambda t: t.update({A: t[A].to(torch.int32)}), BadDtype, "is I32; expected one of F64"),
        (lambda t: t.update({f"base_model.model.{FIRST}.lora_B.bias": torch.zeros(16)}), UnsupportedExpert, "biases"),
        (lambda t: t.update({f"base_model.model.{FIRST}.lora_magnitude_vector": torch.ones(16)}), UnsupportedExpert, "DoRA"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": t[A]}), UnsupportedExpert, "embeddings"),
        (lambda t: t.update({"base_model.model.lm_head.weight": t[A]}), UnknownTensor, "weights saved beside LoRA's own"),
        (lambda t: t.update({"x.lora_A.weight": t[A]}), UnknownTensor, r"x\.lora_A\.weight is not base_model"),
        (lambda t: t.update({"base_model.model.../x.lora_A.weight": t[A]}), UnsafePath, "is not a module name"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_wrong_tensors_of_a_lora_are_named(lora, spoil, error, match):
    refused(error, match, edit(lora, spoil))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern: .* is not a regular expression"),
        ({"rank_pattern": {"(.|..)+$[x-z]": 3}}, "rank_pattern: .* takes too long to match"),
        ({"alpha_pattern": {"(a|aa)+": 10**400}}, "alpha_pattern is .*expected an object of numbers"),
        ({"lora_alpha": 10**400}, "lora_alpha is .*expected a number"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern is .*expected an object of numbers"),
        ({"alpha_pattern": [1]}, "alpha_pattern is .*expected an object of numbers"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; expected a number"),
        ({"r": True}, "r is True; expected a number"),
    ],
)
def test_wrong_numbers_of_a_lora_are_named(lora, fields, match):
    refused(BadConfig, match, edit(lora, **fields))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_lora_is_found_before_work_starts_and_when_read(lora, value):
    def spoil(tensors):
        tensors[A][1, 2] = value

    expert = open_expert(edit(lora, spoil))
    with pytest.raises(NonFiniteValue, match=r"adapter_model\.safetensors: .*q_proj\.lora_A\.weight: 1 of 64 values"):
        expert.check_values()
    with pytest.raises(NonFiniteValue, match=r"layers\.0\.self_attn\.q_proj"):
        expert[FIRST]
    assert FIRST in expert  # which reads nothing


def test_a_product_that_overflows_is_found_when_read(lora):
    def spoil(tensors):
        tensors[A].fill_(1e38)
        tensors[B].fill_(1e38)

    expert = open_expert(edit(lora, spoil))
    expert.check_values()  # the sum of the stored values is infinite, but each of them is not
    with pytest.raises(NonFiniteValue):
        expert[FIRST]


def test_a_lora_on_a_tied_output_layer_is_refused_where_the_base_model_is_known(tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    make_model().save_pretrained(tmp_path / "untied")
    model = save_peft(tmp_path / "lora", LoraConfig(r=2, target_modules=["lm_head"]))
    refused(UnknownTensor, "lm_head.base_layer.weight is not .*save_embedding_layers=False", tmp_path / "lora")
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    assert list(open_expert(tmp_path / "lora", tmp_path / "untied")) == ["lm_head"]
    refused(UnsupportedExpert, "lm_head shares its weight with model.embed_tokens", tmp_path / "lora", tmp_path / "tied")


def test_loras_merge_with_other_experts(lora, tmp_path):
    sparse = make_adapter(make_model())
    sparse.save(tmp_path / "sparse")
    merged = merge([str(lora), str(tmp_path / "sparse")], "uniform")
    expert = open_expert(lora)
    for name in expert:
        expected = (expert[name].to_dense() + sparse[name].to_dense()) / 2
        torch.testing.assert_close(merged[name].to_dense(), expected)
