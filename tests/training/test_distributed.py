"""Two processes and one: the same masks, and the same adapter up to rounding, with the same rows a step."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.paper import paper_config
from helpers.process_runs import CASES, REFUSED, RUNS, prepared
from helpers.tiny import make_model
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import TrainingArguments

import sparselet
from sparselet import MaskSchedule
from sparselet.errors import ConfigError, SelectionError
from sparselet.training import TrainSettings, train
from sparselet.training.processes import refuse_sharding

TESTS = Path(__file__).parents[1]


def start(module, *arguments):
    """Run a module in a process of its own."""
    paths = [str(Path(sparselet.__file__).parents[1]), str(TESTS)]
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The directory that two processes wrote all runs into."""
    directory = tmp_path_factory.mktemp("two")
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", TESTS / "helpers/process_runs.py"]
    done = start(*launch, directory)
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


def of_both(directory, name):
    return [load_file(directory / f"{name}.{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_end_with_the_same_bytes(two, name):
    first, second = of_both(two, name)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_does_on_the_same_rows(two, name, tmp_path):
    found, expected = of_both(two, name)[0], RUNS[name](tmp_path)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
        else:
            assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", CASES)
def test_the_runs_move_their_masks_and_train(two, name):
    """Or the comparisons above would say little."""
    found = of_both(two, name)[0]
    steps = [found[f"step.{i}"] for i in range(1, 9) if f"step.{i}" in found]
    moved = sum(not torch.equal(a, b) for a, b in itertools.pairwise(steps))
    assert moved >= 2
    values = torch.cat([tensor.flatten() for key, tensor in found.items() if key.endswith(".values")])
    assert values.abs().max() > 1e-3


def test_layer_drop_leaves_targets_without_entries(two):
    found = of_both(two, "layer-drop")[0]
    sizes = [tensor.numel() for key, tensor in found.items() if key.endswith(".values")]
    assert 0 in sizes
    assert any(sizes)


# What is refused


MESSAGES = {
    "fsdp": "SelectionError: sparse adapters cannot be trained with FSDP",
    "sharded_selection": "SelectionError: the weights are DTensors, of which each process holds a part",
    "own_group": "SelectionError: the model's DistributedDataParallel has a process group of its own",
    "static_graph": "SelectionError: the model's DistributedDataParallel has static_graph",
    "communication_hook": "SelectionError: the model's DistributedDataParallel has a communication hook",
    "no_wrapper": "SelectionError: there are 2 processes, but no DistributedDataParallel",
    "fewer_rows_than_processes": "SelectionError: 1 training rows cannot be shared by 2 processes",
    "unused_target": "SelectionError: model.layers.0.self_attn.k_proj got no gradient from the scoring batches",
    "batch_not_divided": "ConfigError: batch_size 6, the rows of an optimizer step, cannot be divided over 2 processes with 2",
    "output_exists": "OutputExists: ",
    "task_of_one_process": "TaskError: ",
    "other_settings": "ConfigError: the processes of a run differ in seed: the first has 0, this one 1",
}


@pytest.mark.parametrize("name", [refused.__name__ for refused in REFUSED])
def test_what_cannot_be_right_is_refused_on_both_ranks(two, name):
    for rank in (0, 1):
        messages = json.loads((two / f"messages.{rank}.json").read_text())
        assert MESSAGES[name] in messages.get(name, "nothing was raised")


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"fsdp": [True]}, "FSDP"), ({"deepspeed": {"zero": 2}}, "DeepSpeed"), ({"n_gpu": 2}, "DataParallel over 2 devices")],
)
def test_sharded_training_is_refused_before_it_begins(changes, named, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    refuse_sharding(arguments, make_model())
    if "n_gpu" in changes:
        arguments._n_gpu = changes["n_gpu"]
    else:
        for key, value in changes.items():
            object.__setattr__(arguments, key, value)
    model = get_peft_model(make_model(), paper_config())
    for event in (MaskSchedule().on_init_end, MaskSchedule().on_train_begin):
        with pytest.raises(SelectionError, match=f"cannot be trained with {named}.*DistributedDataParallel"):
            event(arguments, None, None, model=model)


@pytest.mark.parametrize("method", ["sparse", "lora", "full"])
def test_train_refuses_several_devices(tmp_path, monkeypatch, method):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"on one device a process, but 2 are visible.*CUDA_VISIBLE_DEVICES=0.*torchrun"):
        train(TrainSettings(model="none", task="none", method=method), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("ACCELERATE_USE_FSDP", "true", "not by FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "not by DeepSpeed"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision is bf16"),
    ],
)
def test_train_refuses_what_accelerate_is_configured_for_beside_it(tmp_path, monkeypatch, variable, value, named):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=named):
        train(TrainSettings(model="none", task="none"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# The command


def test_a_run_that_one_process_ends_says_why_once_and_is_gone_on_with(tmp_path):
    """By one process, to the same adapter: a step has the same rows, whatever the number of processes."""
    settings = prepared(tmp_path, score="mcs_neg", save_steps=2)
    command = ["train", "--model", settings.model, "--task", settings.task, "--out", tmp_path / "out", "--epochs", 2]
    command += [
        "--batch-size",
        4,
        "--learning-rate",
        5e-3,
        "--when",
        "paper",
        "--score",
        "mcs_neg",
        "--no-chat-template",
        "--save-steps",
        2,
    ]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "helpers.process_failure"]
    failed = start(*launch, *command)
    assert failed.returncode
    assert [line for line in failed.stderr.splitlines() if line.startswith("error: ")] == ["error: no more"]
    assert failed.stderr.count("masks are frozen") == 1
    assert "Written to" not in failed.stdout
    assert sorted(path.name for path in (tmp_path / "out.partial").iterdir()) == ["checkpoint-2", "checkpoint-4", "run.json"]
    resumed, expected = train(settings, tmp_path / "out", resume=True), train(settings, tmp_path / "one")
    for name, delta in resumed.items():
        assert torch.equal(delta.indices, expected[name].indices)
        torch.testing.assert_close(delta.values, expected[name].values, atol=1e-5, rtol=0)
