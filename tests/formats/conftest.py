import shutil
from pathlib import Path

import pytest
from helpers.foreign import QV, SOME, save_peft, tuned
from helpers.tiny import make_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session")
def lora_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lora")
    save_peft(directory, LoraConfig(r=4, target_modules=QV, task_type="CAUSAL_LM"))
    return directory


@pytest.fixture
def lora(lora_dir, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(lora_dir, tmp_path / "adapter"))


@pytest.fixture
def checkpoint(tmp_path):
    """A tuned checkpoint and its base, to spoil."""
    make_model().save_pretrained(tmp_path / "base")
    tuned(make_model(), SOME).save_pretrained(tmp_path / "tuned")

    def respell(directory, change):
        file = tmp_path / directory / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt"})
        return tmp_path / "tuned", tmp_path / "base"

    return respell
