"""A checkpoint that llama.cpp's converter takes: its names are gguf's, and its configuration says the same to old readers."""

import json

import gguf
import pytest
import torch
import transformers
from helpers.tiny import logits, make_adapter, make_model, make_t5, make_tokenizer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sparselet import SparseAdapter, SparseDelta
from sparselet.apply import apply_temporarily
from sparselet.errors import ExportError, OutputExists, WrongBase
from sparselet.formats.checkpoint.write import export_checkpoint
from sparselet.formats.gguf import ARCHITECTURES, export_gguf_checkpoint

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def read(directory, name):
    return json.loads((directory / name).read_text())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tensor_has_a_name_in_gguf_and_a_dtype_that_the_converter_takes(tmp_path, dtype):
    model, tokenizer = make_model(dtype), make_tokenizer(template=True)
    adapter = make_adapter(model)
    assert export_gguf_checkpoint(model, tokenizer, adapter, tmp_path / "out") == tmp_path / "out"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        found = {names.get_name(name, try_suffixes=(".weight", ".bias")): name for name in file.keys()}  # noqa: SIM118
        assert None not in found
        assert "blk.1.attn_q.weight" in found
        assert {file.get_slice(name).get_dtype() for name in found.values()} == {DTYPES[dtype]}
    with apply_temporarily(model, adapter):
        expected = logits(model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")), expected)


def test_the_files_that_the_converter_reads_are_there(tmp_path):
    tokenizer = make_tokenizer(template=True)
    export_gguf_checkpoint(make_model(), tokenizer, make_adapter(make_model()), tmp_path / "out")
    present = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= present
    config = read(tmp_path / "out", "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000
    assert "rope_scaling" not in config
    assert read(tmp_path / "out", "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    vocabulary = gguf.SpecialVocab(tmp_path / "out", n_vocab=258)
    assert vocabulary.special_token_ids["eos"] == 1
    assert vocabulary.chat_template == tokenizer.chat_template
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("an ant")["input_ids"] == tokenizer("an ant")["input_ids"]


def test_scaled_positions_are_spelt_for_old_and_new_readers(tmp_path):
    model = make_model(rope_parameters=LLAMA3, max_position_embeddings=64)
    adapter = make_adapter(model)
    export_gguf_checkpoint(model, make_tokenizer(), adapter, tmp_path / "out")
    config = read(tmp_path / "out", "config.json")
    assert config["rope_theta"] == 5000
    assert config["rope_scaling"] == config["rope_parameters"] == LLAMA3
    with apply_temporarily(model, adapter):
        expected = logits(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(logits(loaded), expected)
    assert not torch.allclose(expected, logits(make_model()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_names_of_every_architecture_in_the_table_are_gguf_s(name):
    """Of a skeleton of transformers' own class with two layers; what ties to the embeddings is not saved."""
    kind = getattr(transformers, name)
    config = kind.config_class()
    layers = next(field for field in ("num_hidden_layers", "n_layer", "n_layers") if hasattr(config, field))
    setattr(config, layers, 2)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        model = kind(config)
    architectures = {text: key for key, text in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(architectures[ARCHITECTURES[name]], 2)
    names = set(model.state_dict())
    if model.config.tie_word_embeddings:
        names -= {"lm_head.weight"}
    assert [n for n in names if table.get_name(n, try_suffixes=(".weight", ".bias")) is None] == []


def test_gpt2_and_its_tied_head(tmp_path):
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=16, n_layer=2, n_head=2, n_positions=32, **special)).eval()
    adapter = {"transformer.h.1.attn.c_attn": SparseDelta.from_dense(torch.randn(16, 48))}
    export_gguf_checkpoint(model, make_tokenizer(), adapter, tmp_path / "out")
    with apply_temporarily(model, adapter):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_a_sentencepiece_model_comes_along(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(b"pieces")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    export_gguf_checkpoint(make_model(), tokenizer, make_adapter(make_model()), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"


def tiny_gemma():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(vocab_size=258, num_key_value_heads=1, **sizes))


def small_vocabulary():
    model = make_model()
    model.config.vocab_size = 200
    return model


def quantized():
    model = make_model()
    model.config.quantization_config = {"quant_method": "gguf"}
    return model


def extra_tensor():
    model = make_model()
    model.model.layers[1].register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (make_t5, "not known to take a T5ForConditionalGeneration. It takes ArceeForCausalLM, .*LlamaForCausalLM"),
        (small_vocabulary, "the tokenizer has a token 257, but the model's vocabulary ends at 200"),
        (quantized, "the base model is quantized"),
        (tiny_gemma, r"GemmaForCausalLM from tokenizer\.model only"),
        (extra_tensor, r"gguf has no name for the tensor model\.layers\.1\.extra"),
    ],
)
def test_what_the_converter_would_not_take_is_refused_and_leaves_nothing(tmp_path, make, match):
    with pytest.raises(ExportError, match=match):
        export_gguf_checkpoint(make(), make_tokenizer(), {}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_wrong_base_or_an_output_that_exists_is_refused(tmp_path):
    with pytest.raises(WrongBase):
        export_gguf_checkpoint(make_model(seed=4), make_tokenizer(), make_adapter(make_model()), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputExists):
        export_gguf_checkpoint(make_model(), make_tokenizer(), {}, tmp_path / "out")


@pytest.mark.parametrize("block_size", [4, "row", "column"])
@pytest.mark.parametrize("export", [export_checkpoint, export_gguf_checkpoint])
def test_the_model_can_be_given_away(tmp_path, export, block_size):
    model, adapter = make_model(), make_adapter(make_model(), block_size)
    with apply_temporarily(model, adapter):
        expected = logits(model)
    export(model, make_tokenizer(), adapter, tmp_path / "out", keep_base=False)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


@pytest.mark.parametrize("export", [export_checkpoint, export_gguf_checkpoint])
def test_modules_trained_in_full_are_not_lost_silently(tmp_path, export):
    adapter = SparseAdapter(dict(make_adapter(make_model())), {"modules_to_save": ["score"]})
    with pytest.raises(ExportError, match="trained score in full"):
        export(make_model(), make_tokenizer(), adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())
