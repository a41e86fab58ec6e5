"""Which kind an expert is, and any kind as a sparse adapter."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.foreign import FIRST, indexed, refused
from helpers.tiny import logits, make_adapter, make_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from sparselet import SparseAdapter
from sparselet.adapter import AdapterFile
from sparselet.errors import BadConfig, BadContainer, MissingFile, NonFiniteValue, OutputExists, UnsafePath, UnsupportedExpert
from sparselet.formats import LoraFile, open_expert, save_expert
from sparselet.tuner import SparseletConfig


def test_a_sparse_adapter_is_opened_as_one(tmp_path):
    make_adapter(make_model(), 4).save(tmp_path)
    expert = open_expert(tmp_path)
    assert isinstance(expert, AdapterFile)
    expert.check_values()


def test_nan_in_a_sparse_adapter_is_found_before_work_starts(tmp_path):
    make_adapter(make_model()).save(tmp_path)
    name = f"base_model.model.{FIRST}.sparse_values"
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[name][0] = float("inf")
    save_file(tensors, weights)
    with pytest.raises(NonFiniteValue, match=rf"adapter_model\.safetensors: {FIRST}"):
        open_expert(tmp_path).check_values()
    tensors[name][:] = 3e38  # finite, though their sum is not
    save_file(tensors, weights)
    open_expert(tmp_path).check_values()


def test_what_is_no_expert_is_refused_with_what_can_be_read(tmp_path):
    listed = "What can be read: sparse adapters .*LORA, SHIRA and SUPERTUNING, and full checkpoints"
    refused(MissingFile, f"neither adapter_config.json nor config.json. {listed}", tmp_path)
    refused(MissingFile, f"is not a directory.*{listed}", tmp_path / "nothing")
    refused(MissingFile, "./a/b is not a directory", "./a/b")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    refused(UnsupportedExpert, f"peft_type is 'LOHA'. {listed}", tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    refused(BadConfig, "expected an object, got list", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    refused(BadConfig, "is not JSON", tmp_path)


def test_a_pickled_or_truncated_adapter_is_refused(lora):
    weights = lora / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    refused(BadContainer, "not a whole safetensors file", lora)
    weights.unlink()
    (lora / "adapter_model.bin").write_bytes(b"")
    refused(MissingFile, "adapter_model.bin is pickled, which is never read", lora)
    (lora.parent / "elsewhere").write_bytes(whole)
    weights.symlink_to(lora.parent / "elsewhere")
    refused(UnsafePath, "symbolic link", lora)


def test_a_hub_name_is_fetched(lora, monkeypatch, tmp_path, base_dir):
    asked = []

    def fetch(name):
        asked.append(name)
        return lora if "name" in name else Path(base_dir)

    monkeypatch.setattr("sparselet.hub.sources.fetch", fetch)
    read, here = PreTrainedConfig.get_config_dict, {"org/base": base_dir}
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda name, **k: read(here.get(name, name), **k))
    assert isinstance(open_expert("org/name@v1.0", "org/base"), LoraFile)
    assert asked == ["org/name@v1.0"]  # of the base model the weights are fetched where they are needed only
    assert open_expert("org/tuned", "org/base").metadata.base_model_name_or_path == "org/base"
    assert asked == ["org/name@v1.0", "org/tuned", "org/base"]
    monkeypatch.chdir(lora.parent)
    (lora.parent / "org").mkdir()
    shutil.copytree(lora, lora.parent / "org" / "name")
    open_expert("org/name")
    assert len(asked) == 3  # what is here is not looked for elsewhere


# Conversion


def test_any_expert_becomes_a_sparse_adapter(tmp_path, lora, base_dir, checkpoint):
    indexed("shira", tmp_path / "shira")
    indexed("super", tmp_path / "super")
    make_adapter(make_model(), 4, density=0.5, task="one").save(tmp_path / "sparse")
    paths = [lora, tmp_path / "shira", tmp_path / "super", tmp_path / "sparse", tmp_path / "tuned"]
    checkpoint("tuned", lambda t: None)
    for i, path in enumerate(paths):
        expert, seen = open_expert(path, tmp_path / "base"), []
        save_expert(expert, tmp_path / f"out{i}", seen.append)
        adapter = SparseAdapter.load(tmp_path / f"out{i}")
        assert seen == list(adapter) == list(expert)
        for name, delta in expert.items():
            assert torch.equal(adapter[name].to_dense(), delta.to_dense())
            assert torch.equal(adapter[name].indices, delta.indices)
        assert adapter.metadata.density == adapter.density
        assert adapter.fingerprints == expert.fingerprints
        assert adapter.metadata.task_type == expert.metadata.task_type
    assert adapter.metadata.base_model_name_or_path == str(tmp_path / "base")
    assert SparseAdapter.load(tmp_path / "out3").metadata.block_size == 4
    with pytest.raises(OutputExists):
        save_expert(expert, tmp_path / "out0")


def test_modules_trained_in_full_are_not_lost_silently(tmp_path):
    adapter = SparseAdapter(dict(make_adapter(make_model())), {"modules_to_save": ["score"]})
    with pytest.raises(UnsupportedExpert, match="score in full"):
        save_expert(adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_converted_lora_loads_through_peft(tmp_path, lora):
    save_expert(open_expert(lora), tmp_path / "out")
    model = PeftModel.from_pretrained(make_model(), tmp_path / "out")
    assert isinstance(model.peft_config["default"], SparseletConfig)
    expected = PeftModel.from_pretrained(make_model(), lora)
    torch.testing.assert_close(logits(model), logits(expected))
