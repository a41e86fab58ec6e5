"""The command line: what it prints, how it exits, and what it leaves behind."""

import dataclasses
import inspect
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import torch
from helpers.tiny import make_adapter, make_model, save_base, save_task, write_rows
from transformers import AutoModelForCausalLM

import sparselet
from sparselet import SparseAdapter
from sparselet.apply import apply_temporarily
from sparselet.cli import demo, terminal
from sparselet.cli import train as train_verb
from sparselet.cli.eval import eval_
from sparselet.cli.export import export_
from sparselet.cli.graft import graft_
from sparselet.cli.import_ import import_
from sparselet.cli.inspect import inspect_
from sparselet.cli.isolate import isolate_
from sparselet.cli.locate import locate_
from sparselet.cli.main import VERBS, run
from sparselet.cli.merge import merge_
from sparselet.cli.probe import probe_
from sparselet.cli.profile import profile_
from sparselet.cli.pull import pull_
from sparselet.cli.push import push_
from sparselet.cli.search import search_
from sparselet.cli.serve import serve_
from sparselet.cli.split import split_
from sparselet.cli.steer import steer_
from sparselet.cli.study import study_
from sparselet.cli.update import update_
from sparselet.errors import TaskError
from sparselet.training import TrainSettings

FUNCTIONS = {"train": train_verb.train_, "merge": merge_, "eval": eval_, "inspect": inspect_, "demo": demo.demo_}
FUNCTIONS |= {"profile": profile_, "push": push_, "pull": pull_, "import": import_, "export": export_, "study": study_}
FUNCTIONS |= {
    "update": update_,
    "search": search_,
    "split": split_,
    "locate": locate_,
    "graft": graft_,
    "probe": probe_,
    "serve": serve_,
    "isolate": isolate_,
    "steer": steer_,
}
FAST = ["--epochs", "2", "--batch-size", "2", "--learning-rate", "1e-2", "--score", "gm"]

pytestmark = pytest.mark.usefixtures("loud_again")


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


# Help and usage


def flags(function):
    """Every option of a verb as it is written on the command line."""
    hints = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        group = next((kind for kind in typing.get_args(hints[name]) if dataclasses.is_dataclass(kind)), None)
        names = [field.name for field in dataclasses.fields(group)] if group else [name]
        if parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
            yield from ("--" + one.strip("_").replace("_", "-") for one in names)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_names_and_explains_every_flag(cli, verb):
    code, out, err = cli(verb, "--help")
    assert code == 0
    assert not err
    for flag in [*flags(FUNCTIONS[verb]), "--config", "--debug"]:
        lines = [line for line in out.splitlines() if line.startswith("│") and f" {flag} " in line]
        assert lines, flag
        assert len(lines[0].split(flag, 1)[1].strip(" │")) > 12, f"{flag} is not explained"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_starts_with_what_it_does_and_keeps_its_examples_on_lines_of_their_own(cli, verb):
    _, out, _ = cli(verb, "--help")
    text = inspect.cleandoc(FUNCTIONS[verb].__doc__)
    assert text.splitlines()[0] in out
    for example in [line for line in text.splitlines() if line.startswith("    sparselet ")]:
        assert f"\n{example}\n" in out
    assert "------" not in out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=" ".join)
def test_help_lists_the_verbs_with_a_line_each(cli, arguments):
    code, out, err = cli(*arguments)
    assert code == 0
    assert not err
    shown = [line.strip("│ ") for line in out.splitlines() if line.startswith("│")]
    assert [line.split()[0] for line in shown if line.split()[0] in VERBS] == list(VERBS)
    for verb, description in VERBS.items():
        assert any(line.startswith(verb) and line.endswith(description) for line in shown)


def test_help_needs_neither_transformers_nor_peft():
    code = """
import sys
from sparselet.cli.main import run
try:
    run(["--help"])
except SystemExit:
    pass
heavy = {"transformers", "peft", "datasets", "matplotlib", "accelerate"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, stdout=subprocess.DEVNULL)


def test_version(cli):
    assert cli("--version") == (0, f"{sparselet.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["trian"], "trian"),
        (["train", "--out", "x", "--densty", "1"], "densty"),
        (["train", "--task", "x"], "--out"),
        (["train", "--task", "x", "--out", "y", "--density", "much"], "much"),
        (["train", "--task", "x", "--out", "y", "--scope", "everything"], "everything"),
        (["train", "--task", "x", "--out", "y", "--dtype", "int8"], "int8"),
        (["merge", "a", "--out", "x", "--add", "b"], "sparselet update MERGED"),
        (["export", "a", "--out", "x", "--to", "picture"], "picture"),
        (["eval"], "--task"),
        (["inspect"], "ADAPTER"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_usage_names_the_word_and_exits_with_2(refused, arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named.lower() in refused(*arguments, code=2).lower()
    assert not list(tmp_path.iterdir())


# Settings from a file


@pytest.fixture
def toml(tmp_path):
    def write(text):
        (tmp_path / "settings.toml").write_text(text)
        return tmp_path / "settings.toml"

    return write


@pytest.fixture
def seen(monkeypatch):
    """The settings that `train` is called with; it stops there."""
    found = []

    def stop(settings, *, out, **kwargs):
        found.append((settings, out, kwargs))
        raise TaskError("stop")

    monkeypatch.setattr(train_verb, "train", stop)
    return found


def test_settings_come_from_a_toml_file_with_underscores(refused, toml, seen):
    file = toml(
        'task = "some/where"\nblock_size = 4\nlearning_rate = 1e-3\nlayers = [0, 2]\ninitial_mask = "gradient"\n'
        'when = "paper"\ntarget_modules = ["q_proj"]\nchat_template = false\nsave_steps = 7\nout = "there"\nresume = true\n'
    )
    refused("train", "--config", file)
    ((settings, out, kwargs),) = seen
    expected = TrainSettings(
        task="some/where",
        block_size=4,
        learning_rate=1e-3,
        layers=(0, 2),
        when="paper",
        initial_mask="gradient",
        target_modules=("q_proj",),
        chat_template=False,
        save_steps=7,
    )
    assert settings == expected
    assert out == Path("there")
    assert kwargs["resume"] is True


def test_flags_win_over_the_file(refused, toml, seen):
    file = toml('task = "a"\ndensity = 0.5\nblock_size = 4\nlayers = [0, 2]\nlayer_drop = true\n')
    refused(*f"train --config {file} --out x --density 0.25 --layers 1 --no-layer-drop".split())
    settings = seen[0][0]
    assert (settings.density, settings.block_size, settings.layers, settings.layer_drop) == (0.25, 4, (1,), False)


@pytest.mark.parametrize(("given", "expected"), [("row", "row"), ("column", "column"), ("16", 16)])
def test_a_block_size_is_a_number_or_a_name(refused, toml, seen, given, expected):
    refused("train", "--task", "a", "--out", "x", "--block-size", given)
    value = given if given == "16" else f'"{given}"'
    refused("train", "--config", toml(f'task = "a"\nblock_size = {value}\n'), "--out", "x")
    assert [settings.block_size for settings, _, _ in seen] == [expected, expected]
    line = refused("train", "--task", "a", "--out", "x", "--block-size", "rows", code=2)
    assert "block-size" in line
    assert "row" in line


def test_a_file_counts_for_one_run_only(refused, toml, seen):
    refused("train", "--config", toml('task = "a"\ndensity = 0.5\n'), "--out", "x")
    refused("train", "--task", "a", "--out", "x")
    assert [settings.density for settings, _, _ in seen] == [0.5, TrainSettings(task="a").density]


@pytest.mark.parametrize(
    ("text", "named", "code"),
    [
        ("densty = 0.1", "densty", 2),
        ("density = 0.1\nscore_batch = 2", "score_batch", 2),
        ("[train]\ndensity = 0.1", "'train'", 1),
        ("[other]\ndensity = 0.1", "other", 2),
        ('density = "much"', "much", 2),
        ("density = 2", "density must be in (0, 1]", 1),
        ("layers = 'all'", "all", 2),
        ("density = ", "settings.toml is not TOML", 1),
        ("density = 0.1\ndensity = 0.2", "settings.toml is not TOML", 1),
    ],
)
def test_a_wrong_settings_file_is_refused_by_key(refused, toml, seen, text, named, code):
    assert named in refused("train", "--task", "a", "--out", "x", "--config", toml(text), code=code)
    assert not seen


def test_a_settings_file_that_cannot_be_read_is_named(refused, tmp_path, seen):
    assert "nothing.toml: No such file" in refused("train", "--config", tmp_path / "nothing.toml", "--out", "x")
    assert f"cannot read {tmp_path}" in refused("train", "--config", tmp_path, "--out", "x")
    (tmp_path / "latin.toml").write_bytes(b'task = "caf\xe9"')
    assert "latin.toml is not TOML" in refused("train", "--config", tmp_path / "latin.toml", "--out", "x")


def test_lists_in_a_file_serve_the_other_verbs(cli, toml, base_dir, task_dir, experts):
    text = f"task = ['{task_dir}']\nadapter = {experts}\nrows = 1\nmax_new_tokens = 2\nbase = true\nmodel = '{base_dir}'"
    code, out, _ = cli("eval", "--config", toml(text), "--json")
    assert code == 0
    assert list(json.loads(out)) == sorted([base_dir, *experts])


# What is refused


@pytest.mark.parametrize(("density", "shown"), [("0", "0"), ("2", "2"), ("-0.1", "-0.1"), ("nan", "nan")])
def test_density_out_of_range(refused, tmp_path, density, shown):
    line = refused("train", "--task", "builtin:table_order", "--out", tmp_path / "x", f"--density={density}")
    assert f"density must be in (0, 1], got {shown}" in line
    assert not list(tmp_path.iterdir())


def test_block_size_that_does_not_divide_names_target_and_shape(refused, tmp_path, base_dir, task_dir):
    line = refused("train", "--model", base_dir, "--task", task_dir, "--out", tmp_path / "x", "--block-size", "5")
    assert "--block-size 5 does not divide the sides of model.layers.0.self_attn.q_proj [16, 16]" in line
    assert not list(tmp_path.iterdir())


def test_a_missing_task_a_missing_split_and_a_bad_row_are_named(refused, tmp_path, base_dir):
    train = ("train", "--model", base_dir, "--out", tmp_path / "x", "--task")
    assert "task is missing" in refused(*train[:-1])
    assert "./nothing is not a directory" in refused(*train, "./nothing").replace("error: nothing", "error: ./nothing")
    assert "no built-in task is called 'nothing'" in refused(*train, "builtin:nothing")
    task = Path(save_task(tmp_path / "task"))
    write_rows(task / "train.jsonl", [{"input": "a", "target": "b"}, {"input": "c", "target": " "}])
    line = refused(*train, task)
    assert f"{task}/train.jsonl, line 2" in line
    assert "'target' is empty" in line
    (task / "test.jsonl").unlink()
    assert "no split 'test'" in refused("eval", "--model", base_dir, "--task", task)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["task"]


def test_an_output_that_exists_is_not_touched(refused, tmp_path, base_dir, task_dir, experts):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / "answers.jsonl").write_text("mine")
    there = ("--out", tmp_path / "mine")
    for arguments in (
        ("train", "--model", base_dir, "--task", task_dir, *there),
        ("merge", *experts, *there),
        ("export", experts[0], "--to", "checkpoint", "--model", base_dir, *there),
        ("eval", "--model", base_dir, "--task", task_dir, "--predictions", tmp_path / "answers.jsonl"),
    ):
        assert "exists already" in refused(*arguments)
    assert "is not a demo" in refused("demo", *there)
    assert contents(tmp_path) == {Path("mine/file"): b"mine", Path("answers.jsonl"): b"mine"}


def test_a_missing_or_foreign_adapter_is_named(refused, tmp_path, base_dir, task_dir):
    (tmp_path / "ia3").mkdir()
    (tmp_path / "ia3" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    for path, reason in ((tmp_path / "nothing", "is not a directory"), (tmp_path / "ia3", "peft_type is 'IA3'")):
        for arguments in (
            ("inspect", path),
            ("merge", path, "--out", tmp_path / "x"),
            ("eval", "--model", base_dir, "--task", task_dir, "--adapter", path),
        ):
            line = refused(*arguments)
            assert str(path) in line
            assert reason in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ia3"]


def test_an_adapter_of_another_model_is_refused(refused, tmp_path, task_dir, experts):
    other = save_base(tmp_path / "other", seed=1)
    wider = save_base(tmp_path / "wider", hidden_size=32)
    shorter = save_base(tmp_path / "shorter", num_hidden_layers=1)
    make_adapter(AutoModelForCausalLM.from_pretrained(other)).save(tmp_path / "foreign")
    for model, reason in (
        (other, "the base weights differ in 6 of 6 targets"),
        (wider, "k_proj: expected a weight of shape [8, 16]"),
        (shorter, "no target model.layers.1.self_attn"),
    ):
        assert reason in refused("eval", "--model", model, "--task", task_dir, "--adapter", experts[0])
        line = refused("export", experts[0], "--to", "checkpoint", "--model", model, "--out", tmp_path / "x")
        assert reason in line
    assert "the base weights differ" in refused("merge", experts[0], tmp_path / "foreign", "--out", tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign", "other", "shorter", "wider"]


@pytest.mark.parametrize("flag", ["--rows", "--max-new-tokens", "--batch-size", "--max-input-length"])
def test_eval_refuses_sizes_below_one(refused, base_dir, task_dir, flag):
    line = refused("eval", "--model", base_dir, "--task", task_dir, flag, "0")
    assert f"{flag} must be at least 1, got 0" in line


def test_eval_refuses_to_guess_how_to_ask(refused, tmp_path, base_dir, task_dir, experts):
    make_adapter(make_model(), chat_template=True).save(tmp_path / "chat")
    arguments = ("eval", "--model", base_dir, "--task", task_dir, "--adapter", experts[0], tmp_path / "chat")
    assert "Set --chat-template or --no-chat-template" in refused(*arguments)


@pytest.mark.parametrize("arguments", [["eval", "--task"], ["train", "--out", "x", "--task"]], ids=["eval", "train"])
def test_a_base_model_that_is_an_adapter_or_nothing_is_refused(refused, tmp_path, monkeypatch, arguments, task_dir, experts):
    monkeypatch.chdir(tmp_path)
    assert "It is an adapter; name its base model" in refused(*arguments, task_dir, "--model", experts[0])
    assert "does not exist" in refused(*arguments, task_dir, "--model", "./nothing")
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(TaskError, match="no built-in task"):
        run(["train", "--task", "builtin:nothing", "--out", "x", "--debug"])
    code = "from sparselet.cli.main import run; run(['inspect', 'nothing', '--debug'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "MissingFile" in done.stderr.splitlines()[-1]
    assert not done.stdout


def test_an_unforeseen_error_is_one_line_too(refused, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise RuntimeError("the moon is\nfull")

    monkeypatch.setattr(train_verb, "train", fail)
    line = refused("train", "--task", "x", "--out", tmp_path / "x")
    assert "unexpected RuntimeError: the moon is" in line


# From rows to a merged model


def test_train_eval_merge_and_inspect_follow_one_another(cli, tmp_path, base_dir, task_dir):
    model = ("--model", base_dir)
    for seed in (0, 1):
        arguments = ("train", *model, "--task", task_dir, "--out", tmp_path / f"e{seed}", "--seed", seed, *FAST)
        code, out, err = cli(*arguments)
        assert code == 0, err
        assert f"Written to {tmp_path / f'e{seed}'}" in out
        assert "backwards: epoch 2, training loss" in err
    assert "sparselet eval --task" in out
    assert "validation loss" in out
    experts = (tmp_path / "e0", tmp_path / "e1")

    code, out, _ = cli("inspect", experts[0])
    assert code == 0
    for fact in ("backwards", base_dir, "104 in 6 targets", "single entries", "Entries (density)", "q_proj"):
        assert fact in out

    code, out, _ = cli("merge", *experts, "--out", tmp_path / "merged")
    assert code == 0
    merged = SparseAdapter.load(tmp_path / "merged")
    expected = sparselet.merge([SparseAdapter.load(path) for path in experts])
    assert all(torch.equal(merged[name].to_dense(), expected[name].to_dense()) for name in expected)
    assert f"{merged.nnz:,}" in out

    checkpoint = tmp_path / "checkpoint"
    code, out, _ = cli("export", tmp_path / "merged", "--out", checkpoint, "--to", "checkpoint", *model)
    assert code == 0
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    with apply_temporarily(base, merged):
        for name, parameter in AutoModelForCausalLM.from_pretrained(checkpoint).named_parameters():
            assert torch.equal(parameter, base.get_parameter(name)), name

    answers = tmp_path / "answers.jsonl"
    measured = ("--rows", 3, "--max-new-tokens", 6, "--json")
    code, out, err = cli(
        "eval", *model, "--task", task_dir, "--adapter", *experts, tmp_path / "merged", "--base", "--predictions", answers,
        *measured,
    )  # fmt: skip
    assert code == 0, err
    results = json.loads(out)
    assert set(results) == {base_dir, *map(str, experts), str(tmp_path / "merged")}
    assert all(set(found["backwards"]) == {"rougeL", "exact_match", "rows"} for found in results.values())
    assert {found["backwards"]["rows"] for found in results.values()} == {3}
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(lines) == 12
    assert {line["model"] for line in lines} == set(results)
    code, out, _ = cli("eval", "--model", checkpoint, "--task", task_dir, "--predictions", tmp_path / "again", *measured)
    again = [json.loads(line) for line in (tmp_path / "again").read_text().splitlines()]
    assert [a["answer"] for a in again] == [line["answer"] for line in lines if line["model"] == str(tmp_path / "merged")]
    assert json.loads(out)[str(checkpoint)] == results[str(tmp_path / "merged")]


def test_eval_prints_a_table_and_where_the_answers_went(cli, tmp_path, base_dir, task_dir, experts):
    answers = tmp_path / "deep" / "answers.jsonl"
    code, out, err = cli(
        *("eval", "--model", base_dir, "--task", task_dir, "--adapter", *experts, "--max-new-tokens", 2, "--rows", 2),
        *("--predictions", answers),
    )
    assert code == 0
    assert "2 test rows" in out
    assert "backwards" in out
    assert f"Answers written to {answers}" in out
    assert "Asking without the chat template" in err
    assert base_dir not in out
    assert len(answers.read_text().splitlines()) == 4


def test_eval_reads_other_column_names(cli, tmp_path, base_dir):
    (tmp_path / "task").mkdir()
    write_rows(tmp_path / "task" / "test.jsonl", [{"question": "ant?", "answer": "tna"}])
    columns = ("--input-column", "question", "--target-column", "answer")
    code, out, _ = cli("eval", "--model", base_dir, "--task", tmp_path / "task", "--max-new-tokens", 2, "--json", *columns)
    assert code == 0
    assert json.loads(out)[base_dir]["task"]["rows"] == 1


def test_json_is_all_that_is_printed(cli, tmp_path, base_dir, task_dir, experts):
    model = ("--model", base_dir)
    outputs = {
        "train": ("train", *model, "--task", task_dir, "--out", tmp_path / "a", *FAST),
        "merge": ("merge", *experts, "--out", tmp_path / "b", "--weights", 1, 0.5, "--method", "uniform"),
        "checkpoint": ("export", experts[0], "--out", tmp_path / "c", "--to", "checkpoint", *model),
        "inspect": ("inspect", experts[1]),
        "eval": ("eval", *model, "--task", task_dir, "--rows", 1, "--max-new-tokens", 1),
    }
    found = {}
    for name, arguments in outputs.items():
        code, out, err = cli(*arguments, "--json")
        assert code == 0, err
        found[name] = json.loads(out)
    assert found["train"]["adapter"] == str(tmp_path / "a")
    assert found["train"]["entries"] == SparseAdapter.load(tmp_path / "a").nnz
    assert found["train"]["steps"] == 12
    assert found["merge"]["method"] == "uniform"
    assert found["merge"]["entries"] == SparseAdapter.load(tmp_path / "b").nnz
    assert found["merge"]["experts_per_entry"] >= 1
    assert found["checkpoint"]["output"] == str(tmp_path / "c")
    assert found["inspect"]["targets"]["model.layers.0.self_attn.q_proj"] == {
        "shape": [16, 16],
        "entries": 64,
        "block": [4, 4],
    }
    assert found["eval"][base_dir]["backwards"]["rows"] == 1


def test_facts_are_shown_without_an_empty_header(cli, experts):
    _, out, _ = cli("inspect", experts[0])
    first = [line for line in out.splitlines() if line and line[0] in "┏┌┡├└│┃"]
    assert first[0].startswith("┌")
    assert "task" in first[1]


# Stopped


def test_ctrl_c_in_training_exits_with_130_and_keeps_whole_checkpoints(cli, tmp_path, base_dir, task_dir, monkeypatch):
    arguments = ("train", "--model", base_dir, "--task", task_dir, *FAST, "--save-steps", 2)
    assert cli(*arguments, "--out", tmp_path / "whole")[0] == 0

    def interrupt(bar, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(terminal.TrainingProgress, "on_step_end", interrupt)
        code, out, err = cli(*arguments, "--out", tmp_path / "x")
    assert code == 130
    assert not out
    assert "error: interrupted" in err
    assert f"Checkpoints are kept in {tmp_path / 'x'}.partial" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole", "x.partial"]
    assert all((p / "complete").is_file() for p in (tmp_path / "x.partial").glob("checkpoint-*"))

    code, _, err = cli(*arguments, "--out", tmp_path / "x")
    assert code == 1
    assert "Set --resume to continue it" in err
    assert cli(*arguments, "--out", tmp_path / "x", "--resume")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole", "x"]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_ctrl_c_before_the_first_checkpoint_leaves_nothing(cli, tmp_path, base_dir, task_dir, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal.TrainingProgress, "on_step_end", interrupt)
    code, out, err = cli("train", "--model", base_dir, "--task", task_dir, "--out", tmp_path / "x", *FAST)
    assert code == 130
    assert not out
    assert "Checkpoints are kept" not in err
    assert not list(tmp_path.iterdir())


def run_it(arguments):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests run in the background
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    run(arguments)


def test_an_interrupt_signal_stops_training_in_an_orderly_way(tmp_path, base_dir, task_dir):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparselet.cli.train", __name__])
    command = f"train --model {base_dir} --task {task_dir} --out {tmp_path}/x --epochs 500 --batch-size 2 --save-steps 1"
    process = context.Process(target=run_it, args=(command.split(),))
    process.start()
    deadline = time.time() + 60
    while not list(tmp_path.glob("x.partial/checkpoint-*/complete")) and time.time() < deadline:
        time.sleep(0.02)
    for _ in range(5):  # Python drops an interrupt that comes in the middle of a finalizer
        os.kill(process.pid, signal.SIGINT)
        process.join(10)
        if process.exitcode is not None:
            break
    assert process.exitcode == 130
    assert [p.name for p in tmp_path.iterdir()] == ["x.partial"]
    kept = list(tmp_path.glob("x.partial/checkpoint-*"))
    assert kept
    assert all((path / "complete").is_file() for path in kept)


# A full disk


@pytest.mark.parametrize("kibibytes", [4, 64, 100, 150, 180])
def test_a_full_disk_in_training_is_named_and_resuming_on_more_room_completes(
    refused, cli, tmp_path, base_dir, task_dir, small_disk, kibibytes
):
    arguments = ("train", "--model", base_dir, "--task", task_dir, *FAST, "--density", 0.5, "--save-steps", 2)
    disk = small_disk(kibibytes)
    code, out, err = cli(*arguments, "--out", disk / "x")
    assert code == 1, err
    line = next(line for line in err.splitlines() if line.startswith("error: "))
    assert f"cannot write {disk}/x" in line
    assert "No space left on device" in line
    assert "Traceback" not in err
    assert not out
    left = list(disk.iterdir())
    assert [p.name for p in left] in ([], ["x.partial"])
    if left:
        kept = list(left[0].glob("checkpoint-*"))
        assert kept
        assert all((path / "complete").is_file() for path in kept)
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    assert cli(*arguments, "--out", disk / "x", "--resume")[0] == 0
    assert SparseAdapter.load(disk / "x").density == pytest.approx(0.5, abs=0.01)
    assert [p.name for p in disk.iterdir()] == ["x"]


def test_a_full_disk_under_the_answers_is_named(cli, tmp_path, base_dir, task_dir, small_disk):
    disk = small_disk(4)
    (disk / "filler").write_bytes(b"x" * 4096)
    arguments = ("eval", "--model", base_dir, "--task", task_dir, "--max-new-tokens", 2)
    code, _, err = cli(*arguments, "--predictions", disk / "answers")
    assert code == 1
    assert f"cannot write {disk}/answers: No space left on device" in err
    assert [p.name for p in disk.iterdir()] == ["filler"]


def test_a_directory_that_may_not_be_written_is_named(refused, tmp_path, base_dir, task_dir, experts):
    (tmp_path / "file").write_text("no directory")
    for arguments in (("train", "--model", base_dir, "--task", task_dir), ("merge", *experts)):
        assert f"cannot write {tmp_path}/file/x" in refused(*arguments, "--out", tmp_path / "file" / "x")
    assert contents(tmp_path) == {Path("file"): b"no directory"}
