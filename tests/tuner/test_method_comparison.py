"""The experiment for PEFT's comparison of methods: its configuration, in a loop as that harness has it."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from sparselet import SparseletConfig
from sparselet.masks import blocks_to_keep
from sparselet.selection_settings import selection_values
from sparselet.training.learning_rate import default_learning_rate
from sparselet.training.methods import find_targets

EXPERIMENT = next(Path(__file__).parents[2].glob("examples/method_comparison/experiments/sparselet/*"))
SHAPE = {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8}  # Llama-3.2-3B


def config():
    return PeftConfig.from_pretrained(str(EXPERIMENT))


def test_it_is_the_default_recipe_within_the_budget_and_at_the_rate_of_the_rule():
    own, default = config(), SparseletConfig()
    assert {**selection_values(own), "density": 0, "seed": 0} == {**selection_values(default), "density": 0, "seed": 0}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, intermediate_size=8192, **SHAPE))
    sizes = [model.get_submodule(name).weight.numel() for name in find_targets(model, own)]
    assert 9.0e6 < sum(blocks_to_keep(own.density, size) for size in sizes) <= 9.2e6
    rate = json.loads((EXPERIMENT / "training_params.json").read_text())["optimizer_kwargs"]["lr"]
    assert rate == pytest.approx(default_learning_rate("sparse", LlamaConfig(**SHAPE)), rel=0.01)


def test_the_harness_trains_it_without_a_callback(tmp_path, make_llama, make_batches):
    model = get_peft_model(make_llama(torch.bfloat16), config(), autocast_adapter_dtype=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 2, 20)
    (batch,), losses = make_batches(1), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(make_llama(torch.bfloat16), tmp_path / "adapter").eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)
