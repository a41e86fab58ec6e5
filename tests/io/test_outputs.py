"""Outputs are judged before the work, written whole or not at all under any name, and what killed processes left is removed."""

import errno
import os
import subprocess
import time
from pathlib import Path

import pytest
from helpers.tiny import make_adapter, make_model

from sparselet import SparseAdapter
from sparselet.errors import OutputExists, WriteFailed
from sparselet.io.atomic import atomic_directory, atomic_write, replaced_directory
from sparselet.io.json_files import read_object, write_json
from sparselet.io.paths import check_output
from sparselet.io.temporaries import held, scratch_directory, temporary_directory, temporary_file
from sparselet.io.write_errors import convert_write_errors
from sparselet.merging import MergeRecipe, merge_per_expert, read_recipe, recipe_text
from sparselet.training.run_directory import work_directory

ODD = os.fsdecode(b"not \xff UTF-8")
LONG = "n" * 255


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# Judged before the work


def prepare(kind, here):
    """An output of some kind that cannot be written."""
    (here / "full" / "x").mkdir(parents=True)
    (here / "file").write_text("mine")
    (here / "dangling").symlink_to(here / "nowhere")
    (here / "to-full").symlink_to(here / "full")
    (here / "to-file").symlink_to(here / "file")
    (here / "round").symlink_to(here / "round")
    return {
        "root": Path("/"),
        "here": Path("."),
        "above": Path(".."),
        "a full directory": here / "full",
        "a file": here / "file",
        "a dangling link": here / "dangling",
        "a link to a full directory": here / "to-full",
        "a link to a file": here / "to-file",
        "a link to itself": here / "round",
        "in a file": here / "file" / "x" / "y",
        "a long name": here / (LONG + "n"),
        "below a long name": here / "new" / (LONG + "n") / "x",
        "a long path": here.joinpath(*["d" * 200] * 25),
        "in a place of the system": Path("/proc/nothing"),
        "a device": Path("/dev/null"),
        "a name that is no text": here / "\ud800",
        "a name with a zero": here / "a\0b",
    }[kind]


KINDS = [
    "root",
    "here",
    "above",
    "a full directory",
    "a file",
    "a dangling link",
    "a link to a full directory",
    "a link to a file",
    "a link to itself",
    "in a file",
    "a long name",
    "below a long name",
    "a long path",
    "in a place of the system",
    "a device",
    "a name that is no text",
    "a name with a zero",
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_that_cannot_be_is_refused_and_nothing_changes(kind, tmp_path, monkeypatch):
    path = prepare(kind, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for directory in (True, False):
        with pytest.raises((OutputExists, WriteFailed)):
            check_output(path, directory)
    with pytest.raises((OutputExists, WriteFailed)), atomic_directory(path):
        pytest.fail("it is refused before the work")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_working_directory_and_mount_points_are_refused_though_they_are_empty(tmp_path, monkeypatch, small_disk):
    disk, bound = small_disk(64), tmp_path / "bound"
    bound.mkdir()
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to(disk)
    subprocess.run(["mount", "--bind", str(tmp_path / "source"), str(bound)], check=True)
    try:
        for place in (disk, bound, tmp_path / "link"):
            with pytest.raises(WriteFailed, match="is a mount point, which cannot be replaced"):
                check_output(place)
            check_output(place / "in")
        adapter = make_adapter(make_model())
        adapter.save(bound)  # there is none yet, so it is not replaced
        with pytest.raises(WriteFailed, match="is a mount point"):
            adapter.save(bound)
        outer = make_adapter(make_model()).save(tmp_path / "outer")
        (outer / "disk").mkdir()
        subprocess.run(["mount", "--bind", str(tmp_path / "source"), str(outer / "disk")], check=True)
        try:
            with pytest.raises(WriteFailed, match="a file system is mounted in it"):
                adapter.save(outer)
        finally:
            subprocess.run(["umount", str(outer / "disk")], check=True)
    finally:
        subprocess.run(["umount", str(bound)], check=True)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for place in (".", tmp_path / "empty"):
        with pytest.raises(WriteFailed, match="is the working directory"):
            check_output(place)


VERBS = {
    "train": "train --task nothing-here --model ./no-model --out",
    "merge": "merge ./no-expert --out",
    "update": "update ./no-merge --add ./no-expert --out",
    "export": "export ./no-expert --to lora --out",
    "import": "import ./no-expert --out",
    "pull": "pull no/such --out",
    "eval": "eval --task nothing-here --model ./no-model --predictions",
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_judge_their_output_before_their_inputs(verb, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for place in ("file/x", LONG + "n", "file"):
        line = refused(*VERBS[verb].split(), place)
        assert "cannot write" in line or "exists already" in line
        assert place in line
    assert names(tmp_path) == ["file"]


# Any path that the system allows


@pytest.mark.parametrize("name", [LONG, "n" * 250, ODD, "[red]\x1b\n", "é" * 127, "to-empty", "deep/er/down"])
def test_directories_and_files_are_written_under_any_name(name, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "to-empty").symlink_to(tmp_path / "empty")
    with atomic_directory(tmp_path / name) as directory:
        str(directory).encode()  # as safetensors and tokenizers need it
        write_json(directory / ("f" * 250), {"path": name})
    assert read_object(tmp_path / name / ("f" * 250)) == {"path": name}
    assert (tmp_path / "to-empty").is_symlink()
    assert names((tmp_path / name).resolve().parent) == sorted(
        {Path(name).name, "empty", "to-empty"} - ({"empty", "to-empty"} if "/" in name else set())
    )
    with atomic_write(tmp_path / "files" / Path(name).name) as file:
        file.write(b"x")
    assert names(tmp_path / "files") == [Path(name).name]


@pytest.mark.parametrize("name", [LONG, "n" * 248, "é" * 127])
def test_a_work_directory_fits_beside_a_long_output(name, tmp_path):
    work = work_directory(tmp_path / name)
    work.mkdir()
    assert work.name.startswith(name[:100])
    assert work.name.endswith(".partial")
    assert work != work_directory(tmp_path / (name[:-1] + "x"))


@pytest.mark.parametrize(
    "line",
    [
        "merge {one} {two} --out",
        "export {one} --to checkpoint --model {base} --out",
        "export {one} --to gguf --model {base} --out",
    ],
)
def test_verbs_write_where_names_are_not_utf8(line, cli, experts, base_dir, tmp_path):
    place = tmp_path / ODD / ODD
    words = line.format(one=experts[0], two=experts[1], base=base_dir).split()
    code, _, err = cli(*words, place)
    assert code == 0, err
    assert names(tmp_path / ODD) == [ODD]


def test_a_run_trains_where_names_are_not_utf8(cli, base_dir, task_dir, tmp_path):
    line = f"train --model {base_dir} --task {task_dir} --epochs 1 --batch-size 4 --no-chat-template --density 0.25 --out"
    assert cli(*line.split(), tmp_path / ODD / "expert")[0] == 0
    assert SparseAdapter.load(tmp_path / ODD / "expert").nnz
    assert names(tmp_path / ODD) == ["expert"]


def test_a_recipe_names_experts_whose_paths_are_not_utf8(tmp_path):
    for name in (ODD, "plain", "a\nb"):
        make_adapter(make_model()).save(tmp_path / name)
    paths = tuple(str(tmp_path / name) for name in (ODD, "plain", "a\nb"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.toml").write_text(recipe_text(MergeRecipe(paths), tmp_path / "out"), encoding="utf-8")
    assert read_recipe(tmp_path / "out" / "recipe.toml").experts == paths


@pytest.mark.parametrize("task", ["n" * 300, "a/../b", "a\0b", "..", "\x1b[2J", "é" * 200])
def test_adapters_of_one_expert_each_are_called_by_names_that_can_be(task, tmp_path):
    experts = [make_adapter(make_model(), seed=seed, task=task) for seed in (1, 2)]
    parts = merge_per_expert(tmp_path / "parts", experts, "emr")
    assert len(set(parts)) == 2
    assert sorted(part.name for part in parts) == names(tmp_path / "parts")


# Nothing is left


def test_directories_above_an_output_go_again_when_it_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "a" / "b" / "c"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a" / "b" / "c"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_what_killed_processes_left_is_removed_and_what_running_ones_write_is_not(tmp_path, caplog):
    caplog.set_level("INFO", "sparselet")
    left = tmp_path / ".out.0123456789abcdef.tmp"
    (left / "deep").mkdir(parents=True)
    (tmp_path / ".out.fedcba9876543210.tmp").write_text("half")
    foreign = [".out.tmp", ".out2.0123456789abcdef.tmp", ".out.0123456789abcdef.tmp.bak", "out.0123456789abcdef.tmp"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    with temporary_directory(tmp_path / "out") as running, temporary_file(tmp_path / "out") as file:
        check_output(tmp_path / "out")
        assert names(tmp_path) == sorted([running.name, file.name, *foreign])
    assert names(tmp_path) == sorted(foreign)
    assert f"removed {left}, which a killed process left" in caplog.text


def test_a_child_that_is_killed_loses_its_lock(tmp_path):
    child = os.fork()
    if not child:
        with temporary_directory(tmp_path / "out") as directory:
            (directory / "half").write_text("x")
            (tmp_path / "made").write_text("")
            time.sleep(60)
    while not (tmp_path / "made").exists():
        time.sleep(0.01)
    (left,) = [path for path in tmp_path.iterdir() if path.name != "made"]
    with held(left) as mine:
        assert not mine
    check_output(tmp_path / "out")
    assert left.exists()
    os.kill(child, 9)
    os.waitpid(child, 0)
    check_output(tmp_path / "out")
    assert names(tmp_path) == ["made"]


def test_scratch_directories_of_killed_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_directory("mine") as first:
        kept = first.name
    (tmp_path / kept / "x").mkdir(parents=True)
    with scratch_directory("mine") as second:
        assert names(tmp_path) == [second.name]
    assert names(tmp_path) == []


def test_a_directory_is_replaced_with_what_else_it_holds(tmp_path):
    place = tmp_path / "place"
    (place / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        (place / name).write_text(name)
    (place / "link").symlink_to("a")
    before = os.stat(place / "b")
    with replaced_directory(place) as new:
        write_json(new / "a", {})
        assert (place / "a").read_text() == "a"
    assert (place / "a").read_text() == "{}\n"
    assert os.path.samestat(os.stat(place / "b"), before)
    assert (names(place), (place / "sub" / "c").read_text()) == (["a", "b", "link", "sub"], "sub/c")
    with pytest.raises(WriteFailed), replaced_directory(place) as new:
        (new / "b").replace(new / "nowhere" / "b")
    assert names(place) == ["a", "b", "link", "sub"]
    assert names(tmp_path) == ["place"]


def test_an_adapter_is_saved_over_one_behind_a_link(tmp_path):
    one, two = (make_adapter(make_model(), seed=seed, task=str(seed)) for seed in (1, 2))
    one.save(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    two.save(tmp_path / "link")
    assert SparseAdapter.load(tmp_path / "real").metadata.task == "2"
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "real"]


# Failures to write


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "quota exceeded"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "File too large"),
        (Exception("No space left on device (os error 28)"), "No space left on device"),  # tokenizers
        (Exception("File too large (os error 27)"), "File too large"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
            "takes no more",
        ),
    ],
    ids=str,
)
def test_failures_to_write_are_named_whoever_finds_them(error, reason, tmp_path):
    with pytest.raises(WriteFailed, match=f"cannot write .*out: .*{reason}") as caught, convert_write_errors(tmp_path / "out"):
        raise error
    assert ("disk" in str(caught.value)) == ("No space" in reason or "quota" in reason)


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), KeyError("x")], ids=str)
def test_other_errors_are_not_taken_for_failures_to_write(error, tmp_path):
    with pytest.raises(type(error)), convert_write_errors(tmp_path / "out"):
        raise error


@pytest.mark.parametrize("kibibytes", [8, 40, 64, 80])
@pytest.mark.parametrize("to", ["lora", "shira", "checkpoint", "gguf"])
def test_a_full_disk_in_an_export_is_named_and_leaves_nothing(to, kibibytes, cli, experts, base_dir, small_disk):
    disk = small_disk(kibibytes)
    code, _, err = cli("export", experts[0], "--to", to, "--model", base_dir, "--out", disk / "deep" / "out")
    if code:
        assert f"cannot write {disk}/deep/out" in err
        assert "disk" in err
        assert names(disk) == []
    else:
        assert names(disk / "deep") == ["out"]
