"""Killed at any moment, a verb leaves its outputs absent or whole; the same command then ends as if nothing had happened."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from helpers import kills
from helpers.tiny import make_adapter, make_model, save_base, save_task

from sparselet import SparseAdapter
from sparselet.cli.main import run as run_verb
from sparselet.merging import merge_with_counts
from sparselet.training.run_directory import RUN_FILE

TIMES = ("seconds", "started", "resumed", "history")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base model, a task and two experts, by name."""
    home = tmp_path_factory.mktemp("inputs")
    save_base(home / "base")
    save_task(home / "task", 4, 2, 2)
    for name, seed in (("one", 1), ("two", 2)):
        about = {"task": name, "base_model_name_or_path": str(home / "base"), "chat_template": False}
        make_adapter(make_model(), seed=seed, **about).save(home / name)
    merge_with_counts(home / "counted", [home / "one"])
    return home


TRAIN = "train --task {0}/task --model {0}/base --epochs 1 --batch-size 2 --no-chat-template --density 0.25 --save-steps 1"
MERGE = "merge {0}/one {0}/two"
VERBS = {
    "train": (TRAIN + " --out o", ["o"]),
    "train-lora": (TRAIN.replace("--density 0.25", "--method lora") + " --out o", ["o"]),
    "train-full": (TRAIN.replace("--density 0.25", "--method full") + " --out o", ["o"]),
    "merge": (MERGE + " --out deep/o", ["deep/o"]),
    "merge-counts": (MERGE + " --keep-counts --out o", ["o"]),
    "update": ("update {0}/counted --add {0}/two --out o", ["o"]),
    "split": ("split {0}/one {0}/two --out o", ["o"]),
    "export-lora": ("export {0}/one --to lora --out o", ["o"]),
    "export-shira": ("export {0}/one --to shira --out o", ["o"]),
    "export-supertuning": ("export {0}/one --to supertuning --out o", ["o"]),
    "export-checkpoint": ("export {0}/one --to checkpoint --model {0}/base --out o", ["o"]),
    "export-gguf": ("export {0}/one --to gguf --model {0}/base --out o", ["o"]),
    "import": ("import {0}/one --out o", ["o"]),
    "predictions": ("eval --task {0}/task --model {0}/base --max-new-tokens 2 --predictions o", ["o"]),
}


SAMPLE = ["train", "merge-counts", "update", "split", "export-checkpoint", "export-lora", "predictions"]


def timeless(found):
    """A tree without the times that a run records."""
    for name, content in found.items():
        if name.endswith(RUN_FILE) and content is not None:
            record = {key: value for key, value in json.loads(content).items() if key not in TIMES}
            found[name] = json.dumps(record, sort_keys=True).encode()
    return found


def assert_absent_or_whole(here, outputs, expected):
    for output in outputs:
        if (here / output).exists():
            found = timeless(kills.tree(here))
            own = [name for name in expected if name == output or name.startswith(f"{output}/")]
            assert {name: found.get(name) for name in own} == {name: expected[name] for name in own}


@pytest.mark.parametrize("verb", VERBS if kills.ALL else SAMPLE)
def test_a_verb_killed_at_any_moment_is_done_by_the_same_command(verb, inputs, tmp_path, monkeypatch):
    line, outputs = VERBS[verb]
    words = line.format(inputs).split()

    def in_(directory):
        directory.mkdir()
        monkeypatch.chdir(directory)

    in_(tmp_path / "whole")
    code, total = kills.run(lambda: run_verb(words))
    assert code == 0
    expected = timeless(kills.tree(tmp_path / "whole"))
    assert {name.split("/")[0] for name in expected} == {output.split("/")[0] for output in outputs}
    for moment in kills.moments(total, 2):
        here = tmp_path / str(moment)
        in_(here)
        assert kills.run(lambda: run_verb(words), moment)[0] == -signal.SIGKILL, moment
        assert_absent_or_whole(here, outputs, expected)
        whole = all((here / output).exists() for output in outputs)
        code, _ = kills.run(lambda: run_verb(words))
        if code and not whole:
            assert verb.startswith("train")
            code, _ = kills.run(lambda: run_verb([*words, "--resume"]))
        assert code == 0 or whole, moment
        assert timeless(kills.tree(here)) == expected, moment
        shutil.rmtree(here)


@pytest.mark.parametrize(
    ("verb", "number"),
    [("split", signal.SIGTERM), ("export-checkpoint", signal.SIGINT), ("train", signal.SIGINT)],
    ids=["split-terminated", "export-interrupted", "train-interrupted"],
)
def test_a_verb_that_is_stopped_leaves_nothing_half_written(verb, number, inputs, tmp_path, monkeypatch):
    line, outputs = VERBS[verb]
    words = line.format(inputs).split()
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    _, total = kills.run(lambda: run_verb(words))
    expected = timeless(kills.tree(tmp_path / "whole"))
    for moment in kills.moments(total, 2):
        here = tmp_path / str(moment)
        here.mkdir()
        monkeypatch.chdir(here)
        code, _ = kills.run(lambda: run_verb(words), moment, number)
        assert code in (128 + number, 0), moment
        assert_absent_or_whole(here, outputs, expected)
        assert {path.name for path in here.iterdir()} <= {*outputs, *(f"{output}.partial" for output in outputs)}, moment


@pytest.mark.parametrize("exchanging", [True, False], ids=["exchange", "two renames"])
def test_an_adapter_saved_over_another_is_wholly_one_of_them(exchanging, inputs, tmp_path, monkeypatch):
    if not exchanging:
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    adapters = [SparseAdapter.load(inputs / name) for name in ("one", "two")]
    whole = [kills.tree(adapter.save(tmp_path / str(i))) for i, adapter in enumerate(adapters)]
    others = {"README.md": b"mine", "sub": None, "sub/x": b"x"}

    def prepared(name):
        path = adapters[0].save(tmp_path / name)
        (path / "sub").mkdir()
        (path / "README.md").write_text("mine")
        (path / "sub" / "x").write_text("x")
        return path

    _, total = kills.run(lambda: adapters[1].save(prepared("count")))
    _, before = kills.run(lambda: prepared("count-before"))
    for moment in kills.moments(total - before, 6):
        path = prepared(f"over{moment}")
        status, _ = kills.run(lambda path=path: adapters[1].save(path), moment)
        assert status == -signal.SIGKILL, moment
        if exchanging or path.exists():
            assert kills.tree(path) in [{**tree, **others} for tree in whole], moment
        adapters[1].save(path)
        assert kills.tree(path) == {**whole[1], **others}, moment
    assert not [name for name in Path(tmp_path).iterdir() if name.name.startswith(".")]
