"""Tiny random models and batches for the tuner's tests."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.paper import paper_config
from peft import get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sparselet import freeze_masks
from sparselet.tuner import sparselet_layers

VOCABULARY = 64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """A Llama with two key-value heads for four query heads, so that its k and v projections are not square."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=VOCABULARY, **{**sizes, "num_key_value_heads": 2, "initializer_range": 0.1, **changes})
        return LlamaForCausalLM(config).to(dtype)

    return make


@pytest.fixture
def make_gpt2() -> Callable[..., GPT2LMHeadModel]:
    def make(dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
        return GPT2LMHeadModel(GPT2Config(initializer_range=0.1, **{**sizes, **dropout, **changes})).to(dtype)

    return make


@pytest.fixture
def make_batches() -> Callable[..., list[dict[str, Tensor]]]:
    def make(count: int, rows: int = 4, length: int = 12, seed: int = 1) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        tokens = [torch.randint(0, VOCABULARY, (rows, length), generator=generator) for _ in range(count)]
        return [{"input_ids": ids, "labels": ids} for ids in tokens]

    return make


@pytest.fixture
def wrap() -> Callable[..., nn.Module]:
    """A copy of a model, with an adapter whose random mask holds random values, or zeros."""

    def make(base: nn.Module, *, fill: float = 0.05, **config) -> nn.Module:
        config = {"initial_mask": "random", "reselect_every": 0, **config}
        model = get_peft_model(copy.deepcopy(base), paper_config(**config))
        for layer in sparselet_layers(model).values():
            with torch.no_grad():
                layer.sparse_values["default"].normal_(std=fill) if fill else layer.sparse_values["default"].zero_()
            layer.refresh()
        if config["initial_mask"] != "dense":
            freeze_masks(model)
        return model

    return make


@pytest.fixture
def add_adapter() -> Callable[..., None]:
    """Add one more adapter with a random mask and random values to a wrapped model."""

    def add(model: nn.Module, name: str, *, fill: float = 0.05, **config) -> None:
        model.add_adapter(name, paper_config(**{"initial_mask": "random", "reselect_every": 0, **config}))
        for layer in sparselet_layers(model).values():
            with torch.no_grad():
                layer.sparse_values[name].normal_(std=fill)
            layer.refresh()

    return add
