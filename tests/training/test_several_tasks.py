"""Runs on several tasks: every task counts alike in what is trained and in what is measured."""

import json

import pytest
import torch
from helpers.tiny import save_task
from helpers.training_runs import Look, StopAt
from peft import PeftModel

from sparselet.errors import ConfigError, TaskError
from sparselet.generation.prompts import prompt_format
from sparselet.models import load_tokenizer
from sparselet.tasks.task import load_task
from sparselet.training import train
from sparselet.training.collate import encode
from sparselet.training.run_directory import RUN_FILE

BASELINES = ("lora", "full", "full-qkv", "multitask")
QKV = ("q_proj", "k_proj", "v_proj")


@torch.no_grad()
def loss_on(model, settings, source):
    """The validation loss of one task: the mean over all its target tokens, row by row."""
    form = prompt_format(model, load_tokenizer(settings.model), settings.chat_template)
    rows = encode(load_task(source).rows("validation"), form, 2048, source)
    total = count = 0
    for row in rows:
        ids = torch.tensor([row["prompt"] + row["target"]])
        logits = model.eval()(input_ids=ids).logits[0, len(row["prompt"]) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row["target"]), reduction="sum"))
        count += len(row["target"])
    return total / count


@pytest.mark.parametrize("method", ["multitask", "sparse", "lora", "full-qkv"])
def test_in_the_validation_loss_of_several_tasks_each_counts_alike(settings_of, tmp_path, task_dir, other_task, method):
    wanted = settings_of(method, task=(task_dir, other_task), **({"score": "gm"} if method == "sparse" else {}))
    found = {}

    class Ask(Look):
        def on_evaluate(self, args, state, control, metrics, model, **kwargs):
            found.update(metrics)
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            self.own = [loss_on(base, wanted, source) for source in (task_dir, other_task)]

    look = Ask()
    train(wanted, tmp_path / "out", callbacks=[look])
    assert found["eval_backwards_loss"] == pytest.approx(look.own[0])
    assert found["eval_shorter_loss"] == pytest.approx(look.own[1])
    assert found["eval_loss"] == pytest.approx(sum(look.own) / 2)
    assert json.loads((tmp_path / "out" / RUN_FILE).read_text())["task"] == "backwards+shorter"
    assert len(look.steps) == 2 * 9  # 12 and 5 rows make an epoch of 17


def test_of_several_tasks_the_metadata_names_all_and_the_data_fingerprint_covers_all(
    settings_of, tmp_path, task_dir, other_task
):
    both = train(settings_of("full-qkv", task=[task_dir, other_task], epochs=1), tmp_path / "both")
    one = train(settings_of("full-qkv", epochs=1), tmp_path / "one")
    assert both.metadata.task == "backwards+shorter"
    assert one.metadata.data_fingerprint == load_task(task_dir, ("train", "validation")).fingerprint()
    changed = save_task(tmp_path / "shorter", train=6, validation=2)
    other = train(settings_of("full-qkv", task=[task_dir, changed], epochs=1), tmp_path / "other")
    prints = {adapter.metadata.data_fingerprint for adapter in (both, one, other)}
    assert len(prints) == 3


def test_limits_of_rows_are_for_each_task(settings_of, tmp_path):
    look = Look()
    train(settings_of("multitask", train_rows=4, validation_rows=1, epochs=1), tmp_path / "out", callbacks=[look])
    assert len(look.steps) == 4  # two tasks of four rows, two a batch


def test_training_stops_early_by_the_mean_of_the_tasks(settings_of, tmp_path):
    class Worse(Look):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(state.epoch)

    look = Worse()
    train(settings_of("multitask", epochs=6, patience=2), tmp_path / "out", callbacks=[look])
    assert look.steps[-1] == 27


def test_tasks_of_one_name_are_refused(settings_of, tmp_path, task_dir):
    again = save_task(tmp_path / "backwards")
    with pytest.raises(ConfigError, match=r"task: backwards is the name of 2 tasks"):
        train(settings_of("multitask", task=(task_dir, again)), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["backwards"]


def test_a_run_on_several_tasks_is_not_resumed_on_other_rows(settings_of, tmp_path, task_dir):
    other = save_task(tmp_path / "shorter", train=5)
    wanted = settings_of("multitask", task=(task_dir, other), save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(wanted, tmp_path / "out", callbacks=[StopAt(3)])
    save_task(tmp_path / "shorter", train=6)
    with pytest.raises(ConfigError, match=r"started with other rows in \[.*shorter"):
        train(wanted, tmp_path / "out", resume=True)


def test_a_task_that_is_not_there_is_named(settings_of, tmp_path, task_dir):
    with pytest.raises(TaskError, match="no built-in task is called 'nothing'"):
        train(settings_of("multitask", task=(task_dir, "builtin:nothing")), tmp_path / "out")
    assert not list(tmp_path.iterdir())
