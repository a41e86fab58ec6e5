"""`sparselet import` and `sparselet export`: what they write, say and refuse."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import logits, make_adapter, make_model, save_base
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sparselet import SparseAdapter
from sparselet.apply import apply_temporarily
from sparselet.formats import open_expert

QV = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def expert(tmp_path_factory, base_dir):
    """A sparse expert of the base model."""
    about = {"task": "one", "base_model_name_or_path": base_dir, "task_type": "CAUSAL_LM"}
    return make_adapter(make_model(), 4, **about).save(tmp_path_factory.mktemp("experts") / "one")


def expected(path, base=None):
    model = make_model()
    with apply_temporarily(model, open_expert(path, base)):
        return logits(model)


@pytest.mark.parametrize("to", ["shira", "supertuning", "lora"])
def test_an_adapter_for_peft(cli, tmp_path, expert, to):
    code, out, err = cli("export", expert, "--to", to, "--out", tmp_path / "out")
    assert code == 0, err
    assert "6 targets, 256 entries" in out
    assert f"Written to {tmp_path / 'out'}" in out
    assert f"PeftModel.from_pretrained(base_model, '{tmp_path / 'out'}')" in out
    model = PeftModel.from_pretrained(make_model(), tmp_path / "out")
    torch.testing.assert_close(logits(model), expected(expert), rtol=1e-4, atol=1e-4)


def test_a_lora_shows_the_error_of_each_target_worst_first(cli, tmp_path, expert):
    code, out, err = cli("export", expert, "--to", "lora", "--rank", 3, "--max-error", 1, "--out", tmp_path / "out")
    assert code == 0, err
    rows = [line.split("│") for line in out.splitlines() if "self_attn" in line]
    errors = [float(row[2]) for row in rows]
    assert len(rows) == 6
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[0] < 1
    code, out, _ = cli("export", expert, "--to", "lora", "--rank", 3, "--max-error", 1, "--out", tmp_path / "j", "--json")
    found = json.loads(out)
    assert (found["format"], found["entries"], found["targets"]) == ("lora", 256, 6)
    assert sorted(found["errors"].values(), reverse=True) == pytest.approx(errors, rel=0.01)
    code, out, err = cli("export", expert, "--to", "lora", "--rank", 1, "--out", tmp_path / "no")
    assert code == 1
    assert "targets lose more than the relative error 0.01 allowed" in err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("to", ["checkpoint", "gguf"])
def test_a_checkpoint(cli, tmp_path, expert, base_dir, to, dtype):
    arguments = ("--to", to, "--model", base_dir, "--dtype", dtype, "--out", tmp_path / "out")
    code, out, err = cli("export", expert, *arguments)
    assert code == 0, err
    assert ("convert_hf_to_gguf.py" if to == "gguf" else "sparselet eval --task TASK --model") in out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(loaded.dtype) == f"torch.{dtype}"
    if dtype == "float32":
        assert torch.equal(logits(loaded), expected(expert))


def test_what_an_export_needs(cli, tmp_path, expert, base_dir):
    out = ("--out", tmp_path / "out")
    code, _, err = cli("export", expert, "--to", "gguf", *out)
    assert code == 1
    assert f"gguf needs the base model; set --model {base_dir}" in err
    assert cli("export", expert, "--to", "zip", *out)[0] == 2
    code, _, err = cli("export", expert, "--to", "shira", "--model", "./nothing", *out)
    assert code == 1
    assert "./nothing does not exist" in err
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for verb in (("export", expert, "--to", "shira"), ("import", expert)):
        code, _, err = cli(*verb, *out)
        assert code == 1
        assert "exists already" in err


def test_the_base_model_tells_what_is_linear(cli, tmp_path, base_dir):
    tuned = make_model()
    with torch.no_grad():
        tuned.model.norm.weight += 1
    tuned.save_pretrained(tmp_path / "tuned")
    for model in ((), ("--model", base_dir)):
        code, _, err = cli("import", tmp_path / "tuned", *model, "--out", tmp_path / "expert")
    assert code == 0, err
    code, _, err = cli("export", tmp_path / "expert", "--to", "lora", "--out", tmp_path / "lora")
    assert "does not say whether model.norm [1, 16] is a linear layer; set --model to the base model" in err
    code, _, err = cli("export", tmp_path / "expert", "--to", "lora", "--model", base_dir, "--out", tmp_path / "lora")
    assert "model.norm is a LlamaRMSNorm; this format changes linear layers only" in err
    code, _, err = cli("export", tmp_path / "expert", "--to", "checkpoint", "--model", base_dir, "--out", tmp_path / "again")
    assert code == 0, err
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(tuned))


def test_experts_of_every_kind_become_sparse_adapters(cli, tmp_path, base_dir):
    get_peft_model(make_model(), LoraConfig(r=2, target_modules=QV, init_lora_weights=False)).save_pretrained(tmp_path / "lora")
    get_peft_model(make_model(), ShiraConfig(r=2, target_modules=QV, init_weights=False)).save_pretrained(tmp_path / "shira")
    tuned = make_model()
    with torch.no_grad():
        tuned.lm_head.weight += 1
    tuned.save_pretrained(tmp_path / "tuned")
    for kind in ("lora", "shira", "tuned"):
        out = tmp_path / f"from {kind}"
        code, text, err = cli("import", tmp_path / kind, "--model", base_dir, "--out", out)
        assert code == 0, err
        assert f"Written to {out}" in text
        assert torch.equal(expected(out), expected(tmp_path / kind, base_dir))
    assert f"{258 * 16:,}" in text
    code, text, _ = cli("import", tmp_path / "shira", "--model", base_dir, "--out", tmp_path / "j", "--json")
    adapter = SparseAdapter.load(tmp_path / "j")
    result = {"output": str(tmp_path / "j"), "base_model": None, "targets": 4, "entries": 224, "density": adapter.density}
    found = json.loads(text)
    assert found == {**result, "base_model": found["base_model"]}
    for path, reason in ((tmp_path / "tuned", "is an expert only against its base model"), (Path("x"), "is not a directory")):
        code, _, err = cli("import", path, "--out", tmp_path / "no")
        assert code == 1
        assert reason in err
    assert not (tmp_path / "no").exists()


def test_targets_are_left_out_of_an_export(cli, tmp_path, base_dir):
    save_base(tmp_path / "tied", tie_word_embeddings=True)
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(make_model(tie_word_embeddings=True), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    arguments = ("export", tmp_path / "lora", "--model", tmp_path / "tied")
    for to in ("lora", "checkpoint"):
        code, _, err = cli(*arguments, "--to", to, "--out", tmp_path / f"as-{to}")
        assert code == 1
        assert "lm_head shares its weight with model.embed_tokens" in err
        code, out, err = cli(*arguments, "--to", to, "--out", tmp_path / f"as-{to}", "--without", "*lm_head")
        assert code == 0, err
        assert "Left out: lm_head" in out
    assert len(open_expert(tmp_path / "lora", without=["lm_head"])) == 2
    code, out, _ = cli(*arguments, "--to", "lora", "--out", tmp_path / "j", "--without", "lm_head", "*0*q_proj", "--json")
    assert json.loads(out)["left_out"] == ["lm_head", "model.layers.0.self_attn.q_proj"]
    code, _, err = cli(*arguments, "--to", "lora", "--out", tmp_path / "no", "--without", "*.k_proj")
    assert code == 1
    assert "no target matches '*.k_proj'" in err
    code, _, err = cli(*arguments, "--to", "lora", "--out", tmp_path / "no", "--without", "*")
    assert "all 3 targets would be left out" in err
