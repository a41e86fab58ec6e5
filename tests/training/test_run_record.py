"""What a run computes and records does not depend on how it was cut: into batches, into accumulation steps, by a stop."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.paper import PAPER
from helpers.tiny import WORDS, make_model, make_tokenizer, save_base, write_rows
from helpers.training_runs import StopAt, bytes_of
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM, TrainerCallback

from sparselet import SparseAdapter
from sparselet.evaluation import evaluate
from sparselet.models import load_model
from sparselet.tasks.task import load_task
from sparselet.training import TrainSettings, train
from sparselet.training.run_directory import RUN_FILE

TIMES = ("started", "seconds", "resumed")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Rows whose targets have very unlike lengths."""
    directory = tmp_path_factory.mktemp("tasks") / "uneven"
    directory.mkdir()
    for split, count in (("train", 14), ("validation", 7)):
        rows = [
            {"input": f"q{i}", "target": "yes" if i % 3 else "a long answer of many words " * (1 + i % 2)} for i in range(count)
        ]
        write_rows(directory / f"{split}.jsonl", rows)
    return str(directory)


@pytest.fixture(scope="module")
def settings(base_dir, uneven):
    return TrainSettings(model=base_dir, task=uneven, epochs=2, batch_size=4, learning_rate=1e-2, warmup=0)


def record(output):
    """All that a run records, but for times."""

    def timeless(entry):
        return {k: v for k, v in entry.items() if not k.startswith("train_") or k == "train_loss"}

    run = json.loads((output / RUN_FILE).read_text())
    return {k: [timeless(entry) for entry in v] if k == "history" else v for k, v in run.items() if k not in TIMES}


@pytest.mark.parametrize(
    "changes",
    [PAPER | {"selection_epochs": 1, "reselect_every": 2}, PAPER | {"initial_mask": "gradient"}, {"method": "full-qkv"}],
)
def test_accumulation_changes_neither_masks_nor_values(settings, tmp_path, changes):
    trained = [train(replace(settings, gradient_accumulation=steps, **changes), tmp_path / str(steps)) for steps in (1, 2, 4)]
    runs = [record(tmp_path / str(steps)) for steps in (1, 2, 4)]
    for adapter, run in zip(trained[1:], runs[1:], strict=True):
        assert isinstance(adapter, SparseAdapter)
        for name in adapter:
            torch.testing.assert_close(adapter[name].indices, trained[0][name].indices)
            torch.testing.assert_close(adapter[name].values, trained[0][name].values, rtol=1e-3, atol=1e-4)
        assert run["metrics"]["validation_loss"] == pytest.approx(runs[0]["metrics"]["validation_loss"], rel=1e-4)
        for entry, other in zip(run["history"], runs[0]["history"], strict=True):
            assert entry["step"] == other["step"]
            assert entry.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-4)


def test_the_validation_loss_is_the_same_in_any_batch(settings, task_dir, tmp_path):
    losses = {}
    for size in (1, 4, 7):
        train(
            replace(settings, task=(settings.task, task_dir), batch_size=size, learning_rate=1e-12, epochs=1),
            tmp_path / str(size),
        )
        (entry,) = (entry for entry in record(tmp_path / str(size))["history"] if "eval_loss" in entry)
        losses[size] = [entry[key] for key in ("eval_uneven_loss", "eval_backwards_loss", "eval_loss")]
    assert losses[4] == pytest.approx(losses[1], rel=1e-6)
    assert losses[7] == pytest.approx(losses[1], rel=1e-6)
    assert losses[1][2] == pytest.approx((losses[1][0] + losses[1][1]) / 2)


class StopAtTheEnd(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


class Worse(TrainerCallback):
    """Validation losses that rise from the second epoch on."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = abs(state.epoch - 2.0)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    train(replace(settings, save_steps=1, **PAPER), output)
    return output


@pytest.mark.parametrize("stop", [StopAtTheEnd(), StopAt(3), StopAt(6)], ids=["end", "within-an-epoch", "in-the-next"])
def test_a_resumed_run_records_what_an_undisturbed_one_does(settings, whole, tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        train(replace(settings, save_steps=1, **PAPER), tmp_path / "stopped", callbacks=[stop])
    train(replace(settings, save_steps=1, **PAPER), tmp_path / "stopped", resume=True)
    assert record(tmp_path / "stopped") == record(whole)
    assert bytes_of(tmp_path / "stopped") == bytes_of(whole)


def test_a_run_that_patience_stopped_does_not_go_on_when_resumed(settings, tmp_path):
    changed = replace(settings, epochs=9, patience=2)
    train(changed, tmp_path / "whole", callbacks=[Worse()])
    with pytest.raises(KeyboardInterrupt):
        train(changed, tmp_path / "stopped", callbacks=[Worse(), StopAtTheEnd()])
    train(changed, tmp_path / "stopped", resume=True, callbacks=[Worse()])
    assert record(tmp_path / "whole")["metrics"]["steps"] == 4 * 4
    assert record(tmp_path / "stopped") == record(tmp_path / "whole")
    assert bytes_of(tmp_path / "stopped") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("steps", [1, 2])
def test_a_routers_loss_is_not_trained_on(settings, tmp_path, steps):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 258}
    special = {"pad_token_id": 0, "eos_token_id": 1, "output_router_logits": True, "router_aux_loss_coef": 1.0}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **special, num_key_value_heads=1, num_local_experts=4))
    base = save_base(tmp_path / "base", model=model)
    train(replace(settings, model=base, epochs=1, learning_rate=1e-12, gradient_accumulation=steps), tmp_path / "out")
    history = record(tmp_path / "out")["history"]
    trained, measured = (next(entry[key] for entry in history if key in entry) for key in ("loss", "eval_loss"))
    assert trained < 6.5  # of 258 tokens alone 5.6; the router's loss is at least 2 more
    assert measured < 6.5


@pytest.mark.parametrize(("own", "ends"), [(7, [1, 7]), ([7, 1], [7, 1]), (None, [1])])
def test_a_full_checkpoint_ends_its_answers_where_they_were_taught_to_end(settings, tmp_path, own, ends):
    model, tokenizer = make_model(), make_tokenizer()
    model.generation_config.eos_token_id = own
    train(replace(settings, method="full", epochs=1), tmp_path / "out", base=(model, tokenizer))
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == ends
    assert model.generation_config.eos_token_id == own


def test_what_was_learned_is_what_is_measured_whatever_ends_the_models_answers(tmp_path):
    words = [{"input": f"q{i}", "target": word} for i, word in enumerate(WORDS[:4])]
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"{split}.jsonl", words)
    model, tokenizer = make_model(hidden_size=64, intermediate_size=96), make_tokenizer()
    model.generation_config.update(eos_token_id=7, min_length=40)
    chosen = TrainSettings(task=str(tmp_path), method="full", epochs=60, batch_size=4, learning_rate=5e-3)
    train(chosen, tmp_path / "out", base=(model, tokenizer))
    (result,) = evaluate(load_model(str(tmp_path / "out")), tokenizer, [load_task(tmp_path, ("test",))])
    assert [answer for _, answer in result.predictions] == list(WORDS[:4])
