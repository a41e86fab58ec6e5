"""The default targets: what text reaches of a model's query, key and value projections, in tiny models of transformers."""

import inspect

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from sparselet import SparseletConfig
from sparselet.errors import ConfigError, NoTargets
from sparselet.tuner import sparselet_layers

IDS = torch.tensor([[5, 9, 20, 31, 7, 8]])
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LOW_RANK = {**SIZES, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
TEXT = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
MLA = ["kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj"]
QKV = ["k_proj", "q_proj", "v_proj"]

# Model class, sizes, the names that the targets end in, how many there are.
CASES = {
    "deberta": ("DebertaForMaskedLM", SIZES, ["in_proj"], 2),
    "deberta, relative": ("DebertaForMaskedLM", {**SIZES, "relative_attention": True, "pos_att_type": ["c2p"]}, ["in_proj"], 2),
    "deberta-v2": ("DebertaV2ForMaskedLM", SIZES, ["key_proj", "query_proj", "value_proj"], 6),
    "deepseek": ("DeepseekV3ForCausalLM", {**LOW_RANK, **EXPERTS, "first_k_dense_replace": 1}, MLA, 8),
    "deepseek-lite": (
        "DeepseekV2ForCausalLM",
        {**LOW_RANK, **EXPERTS, "q_lora_rank": None, "first_k_dense_replace": 2},
        ["kv_a_proj_with_mqa", "kv_b_proj", "q_proj"],
        6,
    ),
    "minicpm3": ("MiniCPM3ForCausalLM", LOW_RANK, MLA, 8),
    "jamba": (
        "JambaForCausalLM",
        {**TEXT, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        QKV,
        3,
    ),
    "xlnet": ("XLNetLMHeadModel", {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4}, ["layer_1", "layer_2"], 4),
    "bart": ("BartForConditionalGeneration", {**BART, **HEADS}, QKV, 18),
    "bart's decoder": ("BartForCausalLM", {**BART, **HEADS}, QKV, 6),  # nothing reaches its cross-attention
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": TEXT, "vision_config": {**VISION, "patch_size": 4}, "mm_tokens_per_image": 4},
        QKV,
        6,
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        {
            "text_config": {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]},
            "vision_config": {**VISION, "patch_size": 4, "vision_output_dim": 32, "supported_aspect_ratios": [[1, 1]]},
        },
        QKV,
        6,
    ),
    "qwen2 audio": (
        "Qwen2AudioForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "audio_config": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16},
        },
        QKV,
        6,
    ),
}


def make(case):
    model_class, sizes, _, _ = CASES[case]
    cls = getattr(transformers, model_class)
    torch.manual_seed(0)
    return cls(cls.config_class(**sizes)).eval()


@pytest.mark.parametrize("case", CASES)
def test_default_targets_are_what_text_reaches(case):
    model = get_peft_model(make(case), SparseletConfig())
    layers = sparselet_layers(model)
    assert sorted({name.rpartition(".")[2] for name in layers}) == CASES[case][2]
    assert len(layers) == CASES[case][3]
    reached = set()
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *args, name=name: reached.add(name))
    decoder = {"decoder_input_ids": IDS} if "decoder_input_ids" in inspect.signature(make(case).forward).parameters else {}
    model(input_ids=IDS, **decoder)
    assert reached == set(layers)


def test_default_targets_of_chosen_layers_of_a_language_model_beside_a_tower():
    model = get_peft_model(make("gemma3"), SparseletConfig(layers_to_transform=[1]))
    assert {name.rpartition(".")[0] for name in sparselet_layers(model)} == {"model.language_model.layers.1.self_attn"}


@pytest.mark.parametrize(
    ("preset", "endings"),
    [
        ("qkv", ["k_proj", "q_proj", "v_proj"]),
        ("attention", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("mlp", ["down_proj", "gate_proj", "up_proj"]),
        ("all", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    ],
)
def test_a_preset_chooses_layers_by_what_they_do(make_llama, preset, endings):
    layers = sparselet_layers(get_peft_model(make_llama(), SparseletConfig(target_modules=preset)))
    assert sorted({name.rpartition(".")[2] for name in layers}) == endings
    assert len(layers) == 2 * len(endings)
    first = sparselet_layers(get_peft_model(make_llama(), SparseletConfig(target_modules=preset, layers_to_transform=[1])))
    assert set(first) == {name for name in layers if ".1." in name}


def test_presets_of_fused_layers_and_of_models_beside_a_tower(make_gpt2):
    layers = sparselet_layers(get_peft_model(make_gpt2(), SparseletConfig(target_modules="attention")))
    assert {name.split(".", 3)[3] for name in layers} == {"attn.c_attn", "attn.c_proj"}
    layers = sparselet_layers(get_peft_model(make("gemma3"), SparseletConfig(target_modules="mlp")))
    assert {name.rpartition(".")[2] for name in layers} == {"gate_proj", "up_proj", "down_proj"}
    assert all(name.startswith("model.language_model.") for name in layers)


def test_models_without_projections_are_refused_by_their_layers():
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1)
    with pytest.raises(NoTargets, match="in_proj"):
        get_peft_model(transformers.MambaForCausalLM(config), SparseletConfig())


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|up)_proj", ["q_proj", "down_proj"]])
def test_a_second_adapter_has_the_targets_that_lora_gives_it(make_llama, targets):
    def adapted(config_class, first):
        model = get_peft_model(make_llama(), config_class(target_modules=first))
        model.add_adapter("second", config_class(target_modules=targets))
        return model

    for first in (["q_proj"], "all-linear"):
        lora = adapted(LoraConfig, first)
        wanted = {
            name.removesuffix(".lora_A.second") for name, _ in lora.base_model.model.named_modules() if "A.second" in name
        }
        assert set(sparselet_layers(adapted(SparseletConfig, first), "second")) == wanted


def test_layers_are_chosen_by_number_with_names_or_all_linear_but_not_with_a_pattern(make_llama):
    model = get_peft_model(make_llama(), SparseletConfig(target_modules="all-linear", layers_to_transform=[1]))
    assert len(sparselet_layers(model)) == 7
    assert all(name.startswith("model.layers.1.") for name in sparselet_layers(model))
    for wrong in ({"layers_to_transform": 0}, {"layers_pattern": "layers"}):
        with pytest.raises(ConfigError, match="full names"):
            SparseletConfig(target_modules=".*q_proj", **wrong)
    with pytest.raises(ConfigError, match="layers_to_transform"):
        SparseletConfig(target_modules=["q_proj"], layers_pattern="layers")
