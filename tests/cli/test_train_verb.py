"""`sparselet train` with several tasks, methods and a second stage: what it reads, prints and names as the next command."""

import json
import shlex

import pytest
from helpers.tiny import make_adapter, make_model

from sparselet.cli import train as train_verb
from sparselet.errors import TaskError
from sparselet.training import TrainSettings
from sparselet.training_recipes import RECIPES


@pytest.fixture
def fast(base_dir):
    return ["--model", base_dir, "--epochs", 1, "--batch-size", 2, "--learning-rate", 1e-3]


@pytest.fixture
def seen(monkeypatch):
    """The settings that `train` is called with; it stops there."""
    found = []

    def stop(settings, out, **kwargs):
        found.append(settings)
        raise TaskError("stop")

    monkeypatch.setattr(train_verb, "train", stop)
    return found


@pytest.mark.parametrize(
    ("flags", "file", "task"),
    [
        (["--task", "a"], "", "a"),
        (["--task", "a", "b", "c"], "", ("a", "b", "c")),
        (["--task", "a", "--task", "b"], "", ("a", "b")),
        ([], 'task = "a"', "a"),
        ([], 'task = ["a"]', "a"),
        ([], 'task = ["a", "b"]', ("a", "b")),
        (["--task", "c"], 'task = ["a", "b"]', "c"),
    ],
)
def test_one_task_or_several_are_read_from_flags_and_from_a_file(cli, seen, tmp_path, flags, file, task):
    (tmp_path / "settings.toml").write_text(file)
    cli("train", "--config", tmp_path / "settings.toml", "--out", "x", *flags)
    assert seen == [TrainSettings(task=task)]


def test_a_recipe_gives_way_to_the_file_and_the_file_to_flags(cli, seen, tmp_path):
    (tmp_path / "settings.toml").write_text('task = "a"\ndensity = 0.3\nlearning_rate = 1e-3\n')
    cli("train", "--recipe", "paper", "--config", tmp_path / "settings.toml", "--density", "0.5", "--out", "x")
    cli("train", "--recipe", "paper", "--task", "a", "--out", "x")
    own = TrainSettings(task="a", when="paper", score="mcs", density=0.5, learning_rate=1e-3)
    assert seen == [own, TrainSettings(task="a", **RECIPES["paper"])]


def test_an_unknown_recipe_and_one_of_another_verb_are_refused(refused, tmp_path):
    assert "paper" in refused("train", "--recipe", "best", "--task", "a", "--out", tmp_path / "x")
    assert "recipe" in refused("eval", "--recipe", "paper", "--task", "a")


def test_method_second_stage_and_lora_are_read_from_flags_and_from_a_file(cli, seen, tmp_path):
    flags = "--method lora --lora-rank 8 --lora-alpha 4 --target-modules q_proj v_proj --layers 0 2"
    cli("train", "--task", "a", "--out", "x", *shlex.split(flags))
    (tmp_path / "settings.toml").write_text('task = ["a", "b"]\nmethod = "multitask"\ninit_from = "merged"\n')
    cli("train", "--config", tmp_path / "settings.toml", "--out", "x")
    first = TrainSettings(
        task="a", method="lora", lora_rank=8, lora_alpha=4.0, target_modules=("q_proj", "v_proj"), layers=(0, 2)
    )
    assert seen == [first, TrainSettings(task=("a", "b"), method="multitask", init_from="merged")]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--task a --method lora --density 0.2", 1, "density does not apply to method lora"),
        ("--task a --lora-rank 8", 1, "--lora-rank does not apply to method sparse"),
        ("--task a --method multitask", 1, "method multitask needs several tasks"),
        ("--task a --method lora --init-from there", 1, "--init-from does not go with method lora"),
        ("--task a --method dense", 2, "dense"),
        ("--task a --init-from ./there", 1, "there is not a directory"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(refused, tmp_path, task_dir, flags, code, message):
    flags = flags.replace("--task a", f"--task {task_dir}").split()
    assert message in refused("train", "--out", tmp_path / "x", *flags, code=code)
    assert not list(tmp_path.iterdir())


def next_commands(out):
    return [line.removeprefix("Next:").strip() for line in out.splitlines() if "sparselet " in line]


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("sparse", ["--no-chat-template"]),
        ("full-qkv", ["--no-chat-template"]),
        ("full", ["--no-chat-template"]),
        ("lora", ["--no-chat-template", "--lora-rank", 2]),
        ("multitask", []),
    ],
)
def test_the_command_named_next_measures_what_was_written(cli, fast, tmp_path, task_dir, other_task, method, flags):
    tasks = [task_dir, other_task] if method == "multitask" else [task_dir]
    code, out, err = cli("train", *fast, "--task", *tasks, "--method", method, "--out", tmp_path / "out", *flags)
    assert code == 0, err
    assert f"Written to {tmp_path / 'out'}" in out
    assert method in out
    measure, merge = next_commands(out)
    assert merge.startswith(f"sparselet merge {tmp_path / 'out'} OTHER-EXPERT")
    if method in ("full", "lora"):  # which do not record it
        assert measure.endswith("--no-chat-template")
    code, out, err = cli(*shlex.split(measure)[1:], "--rows", 1, "--max-new-tokens", 1, "--json")
    assert code == 0, err
    (found,) = json.loads(out).values()
    assert sorted(found) == sorted(["backwards", "shorter"] if method == "multitask" else ["backwards"])


@pytest.mark.parametrize(
    ("method", "kind"), [("sparse", "adapter"), ("full-qkv", "adapter"), ("lora", "adapter"), ("full", "checkpoint")]
)
def test_json_says_what_was_written(cli, fast, tmp_path, task_dir, method, kind):
    rank = ["--lora-rank", 2] if method == "lora" else []
    command = ("train", *fast, "--task", task_dir, "--method", method, *rank, "--out", tmp_path / "out", "--json")
    code, out, err = cli(*command)
    assert code == 0, err
    found = json.loads(out)
    assert found[kind] == str(tmp_path / "out")
    assert found["steps"] == 6
    assert found["validation_loss"] > 0


def test_a_second_stage_after_a_merge(cli, fast, tmp_path, task_dir, other_task):
    for seed in (1, 2):
        make_adapter(make_model(), seed=seed, task=f"t{seed}").save(tmp_path / f"e{seed}")
    assert cli("merge", tmp_path / "e1", tmp_path / "e2", "--out", tmp_path / "merged")[0] == 0
    flags = ("--init-from", tmp_path / "merged", "--out", tmp_path / "out")
    code, out, err = cli("train", *fast, "--task", task_dir, other_task, *flags)
    assert code == 0, err
    assert "backwards+shorter" in out
    assert "backwards+shorter: epoch 1, training loss" in err
    assert cli("inspect", tmp_path / "out")[0] == 0
