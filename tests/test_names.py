"""The names of other sources mean the parameters that PEFT and transformers take them for."""

import pytest
import torch
from helpers.tiny import make_gpt2, make_model, make_t5
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config, Qwen3MoeConfig

from sparselet.errors import UnknownTarget, UnsupportedExpert
from sparselet.names import Names, as_rows, refuse_shared, unwrapped

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "name",
    [Q, Q.removeprefix("model."), f"_orig_mod.{Q}", f"module.{Q}", f"module._orig_mod.{Q}", Q.replace("0.", "0._orig_mod.")],
)
def test_a_target_is_the_same_whatever_wraps_the_model(name):
    assert Names(make_model()).find([name]) == {name: Q}


def test_a_model_in_a_wrapper_has_the_names_of_the_model():
    for wrapped in (torch.compile(make_model()), torch.nn.Sequential()):
        wrapped.add_module("module", make_model()) if not len(wrapped._modules) else None
        assert Names(wrapped).layers.keys() == Names(make_model()).layers.keys()
    model = make_model()
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert Names(model).layers.keys() == Names(make_model()).layers.keys()


def test_a_model_without_its_head_lacks_the_first_part():
    assert Names(make_model().model).find([Q]) == {Q: Q.removeprefix("model.")}
    assert Names(make_gpt2().transformer).find(["transformer.h.0.attn.c_attn"]) == {
        "transformer.h.0.attn.c_attn": "h.0.attn.c_attn"
    }


@pytest.mark.parametrize("name", ["model.layers.9.self_attn.q_proj", "q_proj", "lm_head.weight", "model", "model.layers.0"])
def test_what_is_no_target_is_refused(name):
    with pytest.raises(UnknownTarget, match=f"no target {name}, which"):
        Names(make_model()).find([name])


def test_two_names_of_one_target_are_refused():
    with pytest.raises(UnknownTarget, match=rf"{Q} and _orig_mod\.{Q} are both {Q}"):
        Names(make_model()).find([Q, f"_orig_mod.{Q}"])


def composite():
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = Gemma3Config(
        text_config={**text, "num_key_value_heads": 1, "vocab_size": 64}, vision_config={**vision, "patch_size": 14}
    )
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def test_composite_models_have_had_other_names():
    names = Names(composite())
    now = "model.language_model.layers.0.self_attn.q_proj"
    assert names.find(["language_model.model.layers.0.self_attn.q_proj"]) == {
        "language_model.model.layers.0.self_attn.q_proj": now
    }
    assert names.place([f"language_model.{Q}.weight"])[f"language_model.{Q}.weight"] == (f"{now}.weight", None)


def test_experts_of_a_mixture_become_one_parameter():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    config = Qwen3MoeConfig(**sizes, moe_intermediate_size=12, num_experts=4, head_dim=8)
    with torch.device("meta"):
        names = Names(AutoModelForCausalLM.from_config(config))
    tensor = "model.layers.0.mlp.experts.3.up_proj.weight"
    placed, pattern = names.place([tensor])[tensor]
    assert placed == "model.layers.0.mlp.experts.gate_up_proj"
    assert pattern is not None
    with pytest.raises(UnknownTarget):  # a single expert is no target
        names.find([tensor.removesuffix(".weight")])
    assert as_rows(names.layers[placed].parameter).shape == (4 * 24, 16)


def test_unwrapped_keeps_what_only_looks_like_a_wrapper():
    assert unwrapped("encoder.module.weight") == "encoder.module.weight"
    assert unwrapped("my_orig_mod.weight") == "my_orig_mod.weight"


def test_a_weight_that_layers_share_is_no_single_layers():
    tied = Names(make_model(tie_word_embeddings=True))
    refuse_shared(tied, ["model.embed_tokens", Q])
    with pytest.raises(UnsupportedExpert, match=r"lm_head shares its weight with model\.embed_tokens"):
        refuse_shared(tied, ["lm_head"])
    t5 = Names(make_t5())
    refuse_shared(t5, ["shared"])
    for name in ("encoder.embed_tokens", "decoder.embed_tokens"):
        with pytest.raises(UnsupportedExpert, match=f"{name} shares its weight with shared"):
            refuse_shared(t5, [name])
    linear = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    linear[1].weight = linear[0].weight
    for name in ("0", "1"):
        with pytest.raises(UnsupportedExpert, match="shares its weight"):
            refuse_shared(Names(linear), [name])
