"""A full checkpoint less its base is the tuned model, or refused."""

import json

import pytest
import torch
from helpers.foreign import FIRST, SOME, refused, tuned
from helpers.tiny import IDS, logits, make_gpt2, make_model, make_t5
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from sparselet import SparseDelta
from sparselet.apply import apply_in_place, apply_temporarily
from sparselet.errors import (
    BadConfig,
    BadContainer,
    ConfigError,
    MissingFile,
    MissingTensor,
    NonFiniteValue,
    ShapeMismatch,
    UnknownTensor,
    UnsafePath,
    UnsupportedExpert,
    WrongBase,
)
from sparselet.fingerprint import fingerprint_weight
from sparselet.formats import CheckpointFile, open_expert


@pytest.mark.parametrize("shard", ["5GB", "6KB"], ids=["single", "shards"])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_less_its_base_is_the_tuned_model(tmp_path, shard, tie):
    base, model = make_model(tie_word_embeddings=tie), make_model(tie_word_embeddings=tie)
    tuned(model, SOME[: -1 if tie else None])
    base.save_pretrained(tmp_path / "base", max_shard_size=shard)
    model.save_pretrained(tmp_path / "tuned", max_shard_size=shard)
    expert = open_expert(tmp_path / "tuned", tmp_path / "base")
    assert isinstance(expert, CheckpointFile)
    changed = {name for name in expert if expert[name].nnz}
    assert changed == {name.removesuffix(".weight") for name in SOME[: -1 if tie else None]}
    assert expert.shapes["model.norm"] == (1, 16)
    for name in changed:
        delta = expert[name]
        assert delta.nnz == delta.size
        expected = model.get_parameter(f"{name}.weight") - base.get_parameter(f"{name}.weight")
        assert torch.equal(delta.to_dense().reshape(expected.shape), expected)
    assert expert.nnz == sum(delta.nnz for delta in expert.values())
    assert expert.fingerprints == {n: fingerprint_weight(base.get_parameter(f"{n}.weight")) for n in expert}
    expert.check_values()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(loaded)
    with apply_temporarily(loaded, expert):
        torch.testing.assert_close(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")))
    assert torch.equal(logits(loaded), before)
    apply_in_place(loaded, expert)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_a_base_in_another_dtype_is_subtracted_in_float32(tmp_path):
    base = make_model(torch.bfloat16)
    model = tuned(make_model(torch.bfloat16).float(), [f"{FIRST}.weight"])
    model.config.dtype = torch.float32
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    expert = open_expert(tmp_path / "tuned", tmp_path / "base")
    expected = model.get_submodule(FIRST).weight - base.get_submodule(FIRST).weight.float()
    assert torch.equal(expert[FIRST].to_dense(), expected)
    assert [name for name in expert if expert[name].nnz] == [FIRST]


def test_a_checkpoint_that_spells_out_its_tied_output_layer_is_the_same(tmp_path):
    base, model = make_model(tie_word_embeddings=True), tuned(make_model(tie_word_embeddings=True), SOME[:2])
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    for directory in ("tuned", "base"):
        file = tmp_path / directory / "model.safetensors"
        tensors = load_file(file)
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, file, {"format": "pt"})
        expert = open_expert(tmp_path / "tuned", tmp_path / "base")
        assert "lm_head" not in expert
    with apply_temporarily(make_model(tie_word_embeddings=True), expert) as changed:
        torch.testing.assert_close(logits(changed), logits(model))
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    refused(UnsupportedExpert, "lm_head.weight is not model.embed_tokens.weight", tmp_path / "tuned", tmp_path / "base")


def test_an_encoder_decoder_with_shared_embeddings(tmp_path):
    base, model = make_t5(), tuned(make_t5(), ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"])
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()  # as older versions wrote it
    save_file(tensors, file, {"format": "pt"})
    expert = open_expert(tmp_path / "tuned", tmp_path / "base")
    assert "encoder.embed_tokens" not in expert
    assert expert.metadata.task_type == "SEQ_2_SEQ_LM"
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()
    with apply_temporarily(loaded, expert), torch.inference_mode():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_a_gpt2_checkpoint_with_biases(tmp_path):
    base = make_gpt2()
    model = tuned(make_gpt2(), ["transformer.h.0.attn.c_attn.weight", "transformer.wpe.weight", "transformer.ln_f.weight"])
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    expert = open_expert(tmp_path / "tuned", tmp_path / "base")
    with apply_temporarily(make_gpt2(), expert) as changed:
        torch.testing.assert_close(logits(changed), logits(model))
    tuned(model, ["transformer.h.1.attn.c_attn.bias"]).save_pretrained(tmp_path / "tuned")
    expert = open_expert(tmp_path / "tuned", tmp_path / "base")
    assert expert.shapes["transformer.h.1.attn.c_attn.bias"] == (1, 48)
    with apply_temporarily(make_gpt2(), expert) as changed:
        torch.testing.assert_close(logits(changed), logits(model))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("directory", "change", "error", "match"),
    [
        ("tuned", lambda t: t.pop(NORM), MissingTensor, rf"{NORM} is missing, which the base model"),
        ("base", lambda t: t.pop(NORM), UnknownTensor, rf"{NORM} is not in the base model"),
        ("tuned", lambda t: t.update({NORM: torch.ones(8)}), ShapeMismatch, r"norm.weight has shape \[8\], .* \[16\]"),
        ("tuned", lambda t: t.update({NORM: torch.ones(16).int()}), UnsupportedExpert, "norm.weight differs"),
        ("tuned", lambda t: t.update({f"x.{name}": t.pop(name) for name in list(t)}), MissingTensor, "No name is in both"),
    ],
    ids=["missing", "unknown", "shape", "dtype", "prefix"],
)
def test_checkpoints_of_other_tensors_are_refused_by_name(checkpoint, directory, change, error, match):
    refused(error, match, *checkpoint(directory, change))


def test_a_tensor_that_is_no_target_must_be_equal(checkpoint):
    def add(tensors):
        tensors["model.extra"] = torch.zeros(3)
        tensors["model.conv.weight"] = torch.zeros(2, 2, 2)
        tensors["model.count"] = torch.zeros((), dtype=torch.int64)

    checkpoint("base", add)
    path = checkpoint("tuned", add)
    assert not {"model.extra", "model.conv", "model.count"} & set(open_expert(*path))
    for name, value in {"model.extra": 1.0, "model.conv.weight": 1.0, "model.count": 1}.items():
        path = checkpoint("tuned", lambda t, n=name, v=value: t[n].add_(v))
        refused(UnsupportedExpert, f"{name} differs from the base model's", *path)
        checkpoint("tuned", lambda t, n=name, v=value: t[n].sub_(v))


def test_a_checkpoint_needs_its_base_and_the_same_architecture(checkpoint, tmp_path):
    path, base = checkpoint("tuned", lambda t: None)
    refused(ConfigError, "full checkpoint.*set `base` to that", path)
    for field, value in {"model_type": "mistral", "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 5.0}}.items():
        config = json.loads((base / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, field: value}))
        refused(WrongBase, f"config.json: {field} is ", path, base)


def test_nan_in_a_checkpoint_is_named(checkpoint):
    def spoil(tensors):
        tensors[NORM][2] = float("nan")

    expert = open_expert(*checkpoint("tuned", spoil))
    with pytest.raises(NonFiniteValue, match=r"tuned/model\.safetensors: model\.norm\.weight"):
        expert.check_values()
    with pytest.raises(NonFiniteValue, match=r"model\.norm\.weight"):
        expert["model.norm"]


def test_pickled_missing_and_broken_checkpoints_are_named(checkpoint, tmp_path):
    path, base = checkpoint("tuned", lambda t: None)
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    refused(BadContainer, "not a whole safetensors file", path, base)
    weights.unlink()
    refused(MissingFile, "model.safetensors is missing", path, base)
    (path / "pytorch_model.bin").write_bytes(b"")
    refused(UnsupportedExpert, "pickled weights", path, base)
    index = path / "model.safetensors.index.json"
    for weight_map, error, match in (
        ({"a": "../x.safetensors"}, UnsafePath, "not a plain file name"),
        ({"a": "x.safetensors"}, MissingFile, "x.safetensors is missing"),
        ({"a": 3}, BadConfig, "expected an object of file names"),
        ([], BadConfig, "expected an object of file names"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(error, match, path, base)
    (path / "x.safetensors").write_bytes(whole)
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    refused(MissingTensor, "does not hold a", path, base)
    index.write_text(json.dumps({"weight_map": {NORM: "x.safetensors"}}))
    assert open_expert(path, base).nnz


# Weights that are shared


def test_targets_that_are_one_weight_are_refused(tmp_path):
    model = make_model(tie_word_embeddings=True)
    delta = SparseDelta.from_dense(torch.ones(258, 16))
    for adapter in ({"model.embed_tokens": delta, "lm_head": delta}, {"lm_head": delta}):
        with (
            pytest.raises(UnsupportedExpert, match=r"lm_head shares its weight with model\.embed_tokens"),
            apply_temporarily(model, adapter),
        ):
            pytest.fail("the block was entered")
