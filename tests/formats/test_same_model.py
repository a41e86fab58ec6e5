"""Two configurations mean one model when transformers makes one of them, however they are spelled."""

import json

import pytest
import torch
from helpers.foreign import refused, tuned
from helpers.tiny import logits, make_gpt2, make_model, make_t5
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from sparselet.apply import apply_temporarily
from sparselet.errors import AbsurdShape, ModelError, UnsupportedExpert, WrongBase
from sparselet.formats import open_expert
from sparselet.formats.base_model import BaseModel

NORM = "model.norm.weight"


@pytest.fixture
def pair(tmp_path):
    """A base and a tuned checkpoint, of which fields of config.json can be set; a null takes a field away."""
    make_model().save_pretrained(tmp_path / "base")
    tuned(make_model(), [NORM]).save_pretrained(tmp_path / "tuned")

    def configure(directory, **fields):
        file = tmp_path / directory / "config.json"
        content = {**json.loads(file.read_text()), **fields}
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return tmp_path / "tuned", tmp_path / "base"

    return configure


LINEAR = {"factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("base", "other"),
    [
        ({"rope_parameters": None}, {"rope_parameters": None, "rope_theta": 10000}),
        ({"rope_parameters": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ({"rope_parameters": {**LINEAR, "rope_type": "linear"}}, {"rope_parameters": {**LINEAR, "type": "linear"}}),
        (
            {"rope_parameters": {**LINEAR, "rope_type": "linear"}},
            {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
        ),
        ({"head_dim": None}, {"head_dim": 8}),
        ({}, {"torch_dtype": "bfloat16", "use_cache": False, "eos_token_id": [1, 2], "pad_token_id": 3, "architectures": None}),
        ({}, {"max_position_embeddings": 64, "attention_dropout": 0.5, "initializer_range": 1.0, "a_note": "of somebody"}),
    ],
)
def test_a_difference_of_spelling_or_without_effect_is_none(pair, base, other):
    pair("base", **base)
    assert open_expert(*pair("tuned", **other)).nnz


@pytest.mark.parametrize(
    ("base", "other", "field"),
    [
        ({}, {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope_parameters"),
        ({"rope_parameters": None}, {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_param"),
        ({}, {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({}, {"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_act": None}, {"hidden_act": "gelu"}, "hidden_act"),
        ({}, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({}, {"num_attention_heads": 4, "head_dim": 8}, "num_attention_heads"),
        ({}, {"model_type": "mistral"}, "model_type"),
        (
            {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}},
            {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}, "max_position_embeddings": 64},
            "max_position_embeddings",
        ),
    ],
)
def test_a_field_that_changes_the_model_is_named(pair, base, other, field):
    pair("base", **base)
    refused(WrongBase, f"tuned/config.json: {field}", *pair("tuned", **other))


def test_what_a_class_has_beside_a_llama_is_compared_too(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    for directory, fields in {"base": {}, "cap": {"final_logit_softcapping": 1.0}, "window": {"sliding_window": 7}}.items():
        config = Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8, **fields)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / directory)
    refused(WrongBase, "final_logit_softcapping is 1.0", tmp_path / "cap", tmp_path / "base")
    refused(WrongBase, "sliding_window is 7", tmp_path / "window", tmp_path / "base")


def test_what_cannot_be_resolved_is_named(pair):
    refused(ModelError, "cannot read the configuration of .*tuned", *pair("tuned", model_type="of_nobody"))
    with pytest.raises(AbsurdShape, match=r"num_hidden_layers is .* in config"):
        _ = BaseModel(pair("base", num_hidden_layers=10**6)[1]).config


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "mxfp4", "compressed-tensors", "of_nobody"])
def test_quantised_checkpoints_are_refused_by_name(pair, method):
    refused(UnsupportedExpert, f"tuned: .*quantised by {method}", *pair("tuned", quantization_config={"quant_method": method}))
    pair("tuned", quantization_config=None)
    refused(UnsupportedExpert, f"base: .*quantised by {method}", *pair("base", quantization_config={"quant_method": method}))


# The change of a tuned checkpoint gives the tuned model


def mixture(kind):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 258}
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes, intermediate_size=12, num_local_experts=4)).eval()
    experts = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, intermediate_size=24, **experts)).eval()


def qwen2():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 258}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=1)).eval()


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: mixture("qwen3"), ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate.weight"]),
        (lambda: mixture("qwen3"), ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]),
        (lambda: mixture("mixtral"), ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.self_attn.v_proj.weight"]),
        (qwen2, ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.k_proj.weight", NORM]),
        (make_gpt2, ["transformer.h.1.attn.c_attn.bias", "transformer.ln_f.bias", "transformer.wte.weight"]),
        (lambda: make_model(tie_word_embeddings=True), ["model.embed_tokens.weight"]),
    ],
    ids=["mixture", "experts", "mixtral", "biases", "gpt2", "tied"],
)
def test_a_tuned_checkpoint_is_the_tuned_model(tmp_path, make, names):
    make().save_pretrained(tmp_path / "base")
    model = tuned(make(), names)
    model.save_pretrained(tmp_path / "tuned")
    expert = open_expert(tmp_path / "tuned", tmp_path / "base")
    assert {name for name in expert if expert[name].nnz} == {name.removesuffix(".weight") for name in names}
    expert.check_values()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with apply_temporarily(loaded, expert):
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_a_model_without_its_head_is_tuned_against_one_with_it(tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = tuned(make_model(tie_word_embeddings=True), [NORM])
    model.model.save_pretrained(tmp_path / "tuned")
    expert = open_expert(tmp_path / "tuned", tmp_path / "base")
    with apply_temporarily(make_model(tie_word_embeddings=True), expert) as changed:
        torch.testing.assert_close(logits(changed), logits(model))


def test_an_encoder_decoder_has_one_shared_embedding(tmp_path):
    make_t5().save_pretrained(tmp_path / "base")
    tuned(make_t5(), ["shared.weight"]).save_pretrained(tmp_path / "tuned")
    assert [name for name, delta in open_expert(tmp_path / "tuned", tmp_path / "base").items() if delta.nnz] == ["shared"]
