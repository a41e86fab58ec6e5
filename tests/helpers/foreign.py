"""Experts of other kinds: made by the libraries they come from, spoilt, and refused."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import make_model
from peft import ShiraConfig, SupertuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sparselet.formats import open_expert

FIRST = "model.layers.0.self_attn.q_proj"
QV = ["q_proj", "v_proj"]


def save_peft(directory, config, model=None, seed=1):
    """A PEFT adapter with random values for a fresh base model, saved by PEFT: the wrapped model."""
    torch.manual_seed(seed)
    model = get_peft_model(model or make_model(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "shira_" in name or "supertuning_" in name:
                parameter.normal_()
    model.save_pretrained(directory)
    return model


def tuner_layers(model):
    """The tuner's layers by target name."""
    layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "get_delta_weight")}
    assert layers
    return layers


def edit(directory, tensors=None, **fields):
    """Change an adapter's configuration, and its tensors through a function."""
    file = Path(directory) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    if tensors is not None:
        weights = Path(directory) / "adapter_model.safetensors"
        found = load_file(weights)
        tensors(found)
        save_file({name: tensor.clone().contiguous() for name, tensor in found.items()}, weights, {"format": "pt"})
    return directory


def refused(error, match, path, base=None):
    with pytest.raises(error, match=match):
        open_expert(path, base)


def indexed(kind, directory, model=None):
    config = {
        "shira": lambda: ShiraConfig(r=2, target_modules=QV, random_seed=3, task_type="CAUSAL_LM"),
        "super": lambda: SupertuningConfig(sparsity=0.7, target_modules=QV, task_type="CAUSAL_LM"),
    }[kind]()
    return save_peft(directory, config, model)


def tuned(model, names, seed=7):
    """Random changes to the parameters of these names, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            parameter += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3
    return model


SOME = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
]
