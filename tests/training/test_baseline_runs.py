"""A run of any baseline gives the base model back, is gone on from when it was stopped, and keeps its best epoch."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_base
from helpers.training_runs import Look, StopAt, bytes_of, killed_run

from sparselet.errors import SparseletError
from sparselet.models import load_model, load_tokenizer
from sparselet.training import train
from sparselet.training.run_directory import COMPLETE, RUN_FILE, work_directory

BASELINES = ("lora", "full", "full-qkv", "multitask")
QKV = ("q_proj", "k_proj", "v_proj")


# The base model that was handed in


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("lora", "float32"), ("full", "float32"), ("full", "bfloat16"), ("full-qkv", "bfloat16"), ("multitask", "float32")],
)
def test_a_base_model_is_given_back_as_it_was(settings_of, tmp_path, base_dir, method, dtype):
    model, tokenizer = load_model(base_dir, dtype), load_tokenizer(base_dir)
    model.model.norm.weight.requires_grad_(False)
    reference, config = load_model(base_dir, dtype), model.config.to_dict()
    wanted = settings_of(method, dtype=dtype, epochs=1, gradient_checkpointing=True)
    train(wanted, tmp_path / "out", base=(model, tokenizer))
    with pytest.raises(KeyboardInterrupt):
        train(wanted, tmp_path / "stopped", base=(model, tokenizer), callbacks=[StopAt(2)])
    found = dict(model.named_parameters())
    assert set(found) == {name for name, _ in reference.named_parameters()}
    for name, parameter in reference.named_parameters():
        assert found[name].dtype == parameter.dtype
        assert torch.equal(found[name], parameter), name
        assert found[name].requires_grad is (name != "model.norm.weight")
        assert found[name].grad is None
    assert model.config.to_dict() == config
    assert not model.training
    assert not model.is_activation_checkpointing
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("method", ["lora", "full", "full-qkv"])
def test_a_base_model_that_was_handed_in_trains_as_one_that_was_loaded(settings_of, tmp_path, base_dir, method):
    wanted = settings_of(method, epochs=1)
    train(wanted, tmp_path / "own")
    train(wanted, tmp_path / "handed", base=(load_model(base_dir), load_tokenizer(base_dir)))
    assert bytes_of(tmp_path / "handed") == bytes_of(tmp_path / "own")


@pytest.mark.parametrize("method", ["full", "full-qkv", "lora"])
def test_gradient_checkpointing_changes_nothing_but_rounding(settings_of, tmp_path, method):
    plain, saving = Look(), Look()
    train(settings_of(method, epochs=1), tmp_path / "plain", callbacks=[plain])
    train(settings_of(method, epochs=1, gradient_checkpointing=True), tmp_path / "saving", callbacks=[saving])
    torch.testing.assert_close(plain.logits, saving.logits)


# Killed and resumed


@pytest.mark.parametrize("method", BASELINES)
def test_a_run_killed_at_a_step_goes_on_byte_for_byte(settings_of, tmp_path, method):
    wanted = settings_of(method, save_steps=2)
    train(wanted, tmp_path / "whole")
    killed_run(wanted, tmp_path / "killed", 9)
    assert not (tmp_path / "killed").exists()
    assert (work_directory(tmp_path / "killed") / "checkpoint-8" / COMPLETE).is_file()
    look = Look()
    train(wanted, tmp_path / "killed", resume=True, callbacks=[look])
    assert look.steps[0] == 9
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
    assert not work_directory(tmp_path / "killed").exists()


@pytest.mark.parametrize("method", ["full", "full-qkv"])
def test_an_interrupted_run_over_a_bfloat16_base_goes_on_byte_for_byte(settings_of, tmp_path, method):
    wanted = settings_of(method, save_steps=2, dtype="bfloat16")
    train(wanted, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(wanted, tmp_path / "stopped", callbacks=[StopAt(5)])
    train(wanted, tmp_path / "stopped", resume=True)
    assert bytes_of(tmp_path / "stopped") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("method", BASELINES)
def test_the_epoch_with_the_best_validation_loss_is_kept(settings_of, tmp_path, method):
    class Worse(Look):
        def on_evaluate(self, args, state, control, metrics, model, **kwargs):
            metrics["eval_loss"] = float(state.epoch)
            if state.epoch == 1:
                self.best = {name: p.detach().clone() for name, p in model.named_parameters()}

    look = Worse()
    train(settings_of(method), tmp_path / "out", callbacks=[look])
    assert all(torch.equal(weight, look.best[name]) for name, weight in look.weights.items())
    assert json.loads((tmp_path / "out" / RUN_FILE).read_text())["metrics"]["validation_loss"] == 1.0


def test_checkpoints_hold_no_more_than_what_is_trained(settings_of, tmp_path):
    from safetensors import safe_open

    with pytest.raises(KeyboardInterrupt):
        train(settings_of("full-qkv", save_steps=1), tmp_path / "out", callbacks=[StopAt(3)])
    with safe_open(work_directory(tmp_path / "out") / "checkpoint-2" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(f"model.layers.{i}.self_attn.{part}.weight" for i in (0, 1) for part in QKV)


def test_a_checkpoint_of_another_model_is_not_gone_on_from(settings_of, tmp_path):
    base = Path(save_base(tmp_path / "base"))
    with pytest.raises(KeyboardInterrupt):
        train(settings_of("full", model=str(base), save_steps=1), tmp_path / "out", callbacks=[StopAt(3)])
    shutil.rmtree(base)
    save_base(base, num_hidden_layers=3)
    with pytest.raises(SparseletError, match=r"does not fit the model: model\.layers\.2\."):
        train(settings_of("full", model=str(base), save_steps=1), tmp_path / "out", resume=True)
