"""A steering vector in a checkpoint: where the block has a bias, else refused."""

import pytest
import torch
from helpers.tiny import IDS, make_adapter, make_gpt2, make_model, save_base
from transformers import AutoModelForCausalLM

from sparselet import SparseAdapter, SteeringVector, export, steered
from sparselet.apply import apply_temporarily
from sparselet.errors import ConfigError, ExportError

VECTOR = SteeringVector(torch.linspace(-2, 2, 16), 0, 0.5)


@torch.no_grad()
def steered_everywhere(model, expert):
    with apply_temporarily(model, expert), steered(model, VECTOR) as steering:
        steering.start = 0
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_checkpoint_answers_as_the_steered_model_with_and_without_an_expert(kind, tmp_path):
    model = make_gpt2() if kind == "gpt2" else make_model(mlp_bias=True)
    base = save_base(tmp_path / "base", model=model)
    path = str(VECTOR.save(tmp_path / "vector"))
    expert = make_adapter(model) if kind == "llama" else SparseAdapter({})
    export(expert, "checkpoint", tmp_path / "both", base=base, steer=path)
    export(path, "checkpoint", tmp_path / "alone", base=base)
    for name, added in (("both", expert), ("alone", SparseAdapter({}))):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(found(input_ids=IDS).logits, steered_everywhere(model, added), rtol=1e-4, atol=1e-5)


def test_without_a_bias_it_is_refused_and_nothing_is_written(base_dir, tmp_path, refused):
    path = str(VECTOR.save(tmp_path / "vector"))
    with pytest.raises(ExportError, match="block 0 of LlamaForCausalLM has no bias"):
        export(path, "checkpoint", tmp_path / "out", base=base_dir)
    attention = save_base(tmp_path / "attention", model=make_model(attention_bias=True))
    with pytest.raises(ExportError, match="no bias"):  # its biases do not move the block's output alone
        export(path, "checkpoint", tmp_path / "out", base=attention)
    with pytest.raises(ConfigError, match="steer goes with format checkpoint"):
        export(path, "lora", tmp_path / "out", base=base_dir)
    wrong = ("export", path, "--to", "checkpoint", "--model", base_dir, "--out", tmp_path / "out")
    assert "has no bias" in refused(*wrong)
    assert not (tmp_path / "out").exists()
