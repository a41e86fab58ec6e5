"""Fetching, pulling and pushing, through huggingface_hub's own client against a hub in a thread."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from helpers.made_profiles import profile_for
from helpers.stand_in_hub import StandInHub
from helpers.strategies import few
from helpers.tiny import make_adapter, make_model, save_base
from huggingface_hub import ModelCard, constants, get_token
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparselet import SparseAdapter, merge
from sparselet.adapter import CONFIG_FILE, WEIGHTS_FILE
from sparselet.apply import apply_temporarily
from sparselet.errors import (
    AbsurdShape,
    BadConfig,
    BadContainer,
    MissingExtra,
    MissingFile,
    ModelError,
    NonFiniteValue,
    OutputExists,
    UnsafePath,
    WriteFailed,
)
from sparselet.hub.card import model_card, peft_card
from sparselet.hub.contents import check_directory
from sparselet.hub.publish import prepare, push
from sparselet.hub.sources import CachedCopyWarning, fetch, parse_name, pull
from sparselet.profiles.file import PROFILE_FILE

NAME = "lab/expert"
ABOUT = {"task": "backwards", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", "score": "mcs"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of its own for each test, which the client believes to be the hub; caches are empty."""
    stand_in = StandInHub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    point_to(monkeypatch, stand_in.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield stand_in
    stand_in.close()


def point_to(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def expert(tmp_path) -> Path:
    return make_adapter(make_model(), **ABOUT).save(tmp_path / "expert")


@pytest.fixture(scope="module")
def lora(tmp_path_factory, base_dir) -> Path:
    torch.manual_seed(0)
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = base_dir
    directory = tmp_path_factory.mktemp("lora") / "lora"
    model.save_pretrained(directory)
    (directory / "README.md").unlink()
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


def damaged(files: dict[str, bytes], name: str = WEIGHTS_FILE) -> dict[str, bytes]:
    return {**files, name: files[name][:-7]}


# Push and pull


def test_what_was_pushed_is_pulled_byte_for_byte(hub, expert, tmp_path):
    before = contents(expert)
    address = push(expert, NAME)
    assert address == f"{hub.url}/{NAME}/commit/{hub.repositories[NAME].branches['main']}"
    assert pull(NAME, tmp_path / "pulled") == tmp_path / "pulled"
    pulled = contents(tmp_path / "pulled")
    assert {name: pulled[name] for name in before} == before
    assert pulled.keys() == before.keys() | {"README.md"}
    assert contents(expert) == before


def test_a_profile_goes_along_both_ways_and_is_checked(hub, tmp_path, lora):
    adapter = make_adapter(make_model(), **ABOUT)
    adapter.profile = profile_for(adapter)
    directory = adapter.save(tmp_path / "profiled")
    push(directory, NAME)
    assert (pull(NAME, tmp_path / "pulled") / PROFILE_FILE).read_bytes() == (directory / PROFILE_FILE).read_bytes()
    other = tmp_path / "lora"
    shutil.copytree(lora, other)
    shutil.copy(directory / PROFILE_FILE, other)
    assert check_directory(other) == "LORA adapter"
    for damaged in (directory, other):
        (damaged / PROFILE_FILE).write_bytes((damaged / PROFILE_FILE).read_bytes()[:-4])
        with pytest.raises(BadContainer, match=PROFILE_FILE):
            push(damaged, NAME)


def test_a_push_is_one_commit_of_the_adapters_own_files(hub, expert):
    for name in ("optimizer.pt", "secret.txt", "README.bak", "model.bin"):
        (expert / name).write_bytes(b"mine")
    (expert / "run.json").write_text("{}")
    (expert / "checkpoint-3").mkdir()
    push(expert, NAME, message="as agreed")
    repository = hub.repositories[NAME]
    assert repository.messages == ["", "as agreed"]
    assert repository.head().keys() == {".gitattributes", CONFIG_FILE, WEIGHTS_FILE, "run.json", "README.md"}


def test_a_readme_of_its_own_is_the_card(hub, expert):
    (expert / "README.md").write_text("# Mine\n")
    push(expert, NAME)
    assert hub.repositories[NAME].head()["README.md"] == b"# Mine\n"
    assert prepare(expert, NAME).card is None


def test_files_that_the_new_adapter_lacks_are_deleted_and_others_kept(hub, expert):
    (expert / "merge_counts.safetensors").write_bytes((expert / WEIGHTS_FILE).read_bytes())
    (expert / "run.json").write_text("{}")
    push(expert, NAME)
    hub.add(NAME, {**hub.repositories[NAME].head(), "notes.txt": b"by hand"})
    (expert / "merge_counts.safetensors").unlink()
    (expert / "run.json").unlink()
    push(expert, NAME)
    assert hub.repositories[NAME].head().keys() == {".gitattributes", CONFIG_FILE, WEIGHTS_FILE, "README.md", "notes.txt"}


def test_pushing_again_without_a_change_makes_no_commit(hub, expert):
    first = push(expert, NAME)
    assert push(expert, NAME) == first
    assert len(hub.repositories[NAME].messages) == 2


def test_a_repository_is_private_where_asked(hub, expert):
    push(expert, "lab/open")
    push(expert, "lab/closed", private=True)
    assert [hub.repositories[name].private for name in ("lab/open", "lab/closed")] == [False, True]
    push(expert, "lab/closed", private=True)


def test_private_is_not_granted_by_a_public_repository(hub, expert):
    hub.add(NAME, {"notes.txt": b""})
    with pytest.raises(ModelError, match="lab/expert is there and public; make it private"):
        push(expert, NAME, private=True, revision="new")
    assert hub.repositories[NAME].head() == {"notes.txt": b""}
    assert hub.repositories[NAME].branches.keys() == {"main"}
    assert not hub.large


@pytest.mark.parametrize("branch", ["v1", "try/this"])
def test_a_branch_is_made_pushed_to_and_pulled_from(hub, expert, tmp_path, branch):
    push(expert, NAME, revision=branch)
    assert hub.repositories[NAME].head().keys() == {".gitattributes"}
    pull(f"{NAME}@{branch}", tmp_path / "pulled")
    assert (tmp_path / "pulled" / WEIGHTS_FILE).read_bytes() == (expert / WEIGHTS_FILE).read_bytes()
    push(expert, f"{NAME}@{branch}")
    with pytest.raises(ModelError, match="is not a revision"):
        push(expert, f"{NAME}@{branch}", revision="main")


def spoil_values(directory):
    adapter = SparseAdapter.load(directory)
    delta = next(iter(adapter.values()))
    data = bytearray((directory / WEIGHTS_FILE).read_bytes())
    place = data.index(delta.values.numpy().tobytes())
    data[place : place + 4] = torch.tensor([float("nan")]).numpy().tobytes()
    (directory / WEIGHTS_FILE).write_bytes(data)


def cut_weights(directory):
    (directory / WEIGHTS_FILE).write_bytes((directory / WEIGHTS_FILE).read_bytes()[:-7])


def grow_config(directory):
    with open(directory / CONFIG_FILE, "r+b") as file:
        file.truncate(2**26 + 1)


def link_readme(directory):
    (directory / "README.md").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (spoil_values, NonFiniteValue),
        (cut_weights, BadContainer),
        (lambda d: (d / CONFIG_FILE).write_text("{"), BadConfig),
        (lambda d: (d / CONFIG_FILE).unlink(), MissingFile),
        (lambda d: (d / WEIGHTS_FILE).unlink(), MissingFile),
        (grow_config, AbsurdShape),
        (link_readme, UnsafePath),
    ],
    ids=["nan", "truncated", "not-json", "no-config", "no-weights", "huge", "link"],
)
def test_nothing_is_sent_when_the_check_fails(hub, expert, spoil, error):
    spoil(expert)
    with pytest.raises(error):
        push(expert, NAME)
    assert not hub.requests


def test_modules_trained_in_full_are_checked_too(hub, expert):
    adapter = SparseAdapter.load(expert)
    modules = {"score.weight": torch.tensor([[1.0, float("inf")]])}
    SparseAdapter(adapter, adapter.metadata.with_fields({"modules_to_save": ["score"]}), adapter.fingerprints, modules).save(
        expert
    )
    with pytest.raises(NonFiniteValue, match=r"score\.weight"):
        push(expert, NAME)
    assert not hub.requests


def test_a_checkpoint_is_not_pushed(hub, base_dir):
    with pytest.raises(MissingFile, match="is a checkpoint; only adapters are pushed"):
        push(base_dir, NAME)
    assert not hub.requests


def test_a_card_that_the_hub_refuses_stops_the_push(hub, expert):
    (expert / "README.md").write_text("---\n[1, 2]\n---\n")
    with pytest.raises(ModelError, match=r"cannot push to lab/expert: ValueError: Invalid metadata in README"):
        push(expert, NAME)
    assert hub.repositories[NAME].head().keys() == {".gitattributes"}


def test_a_push_needs_a_token_that_may_write(hub, expert, monkeypatch):
    hub.token = "secret"
    with pytest.raises(ModelError, match=r"cannot push to lab/expert: access is refused \(401\); log in with `hf auth login`"):
        push(expert, NAME)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert get_token() == "secret"
    push(expert, NAME)


def test_a_lora_adapter_is_pushed_and_loads_where_it_was_pulled(hub, lora, tmp_path, base_dir):
    push(lora, NAME)
    assert hub.repositories[NAME].messages[-1] == "Upload LORA adapter"
    pull(NAME, tmp_path / "pulled")
    assert check_directory(tmp_path / "pulled") == "LORA adapter"
    inputs = torch.tensor([[5, 9, 33]])
    logits = [PeftModel.from_pretrained(make_model(), str(path))(inputs).logits for path in (lora, tmp_path / "pulled")]
    assert torch.equal(*logits)
    card = ModelCard.load(tmp_path / "pulled" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.tags == ["lora"]
    assert f"{Path(base_dir).name}, a local directory" in card.text
    assert base_dir not in card.text


def test_a_lora_adapter_is_checked(hub, lora, tmp_path):
    bad = Path(shutil.copytree(lora, tmp_path / "bad"))
    weights = load_file(bad / WEIGHTS_FILE)
    weights[min(weights)][0, 0] = float("nan")
    save_file(weights, bad / WEIGHTS_FILE)
    with pytest.raises(NonFiniteValue, match=re.escape(min(weights))):
        push(bad, NAME)
    cut_weights(bad)
    with pytest.raises(BadContainer):
        push(bad, NAME)
    assert not hub.requests


def test_a_merged_adapter_is_pushed_with_its_recipe(hub, tmp_path):
    about = {**ABOUT, "base_model_name_or_path": "/home/me/llama"}
    experts = [make_adapter(make_model(), seed=seed, **{**about, "task": f"task{seed}"}) for seed in (1, 2)]
    push(merge([merge(experts), experts[1]], weights=[1.0, 0.5]).save(tmp_path / "merged"), NAME)
    text = hub.repositories[NAME].head()["README.md"].decode()
    assert ModelCard(text).data.tags == ["sparselet", "sparse-adapter", "merge", "peft"]
    assert "| method | tsv |" in text
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if re.match(r"\| (expert|\d+) \|", line)]
    columns = dict(zip(rows[0], zip(*rows[1:], strict=True), strict=True))
    assert columns["expert"] == ("1", "2")
    assert columns["weight"] == ("1", "0.5")
    assert columns["task"] == ("", "task2")
    assert columns["merge"] == ("tsv of 2", "")
    assert columns["base model"] == ("llama, a local directory",) * 2
    assert "/home/me" not in text


# Fetch


def test_the_same_commit_is_downloaded_once(hub, expert):
    push(expert, NAME)
    first = fetch(NAME)
    assert hub.downloads().count(WEIGHTS_FILE) == 1
    hub.requests.clear()
    assert fetch(NAME) == first
    assert fetch(f"{NAME}@main") == first
    assert not hub.downloads()
    hub.requests.clear()
    assert fetch(f"{NAME}@{first.name}") == first
    assert not hub.requests


def test_a_branch_that_moved_is_fetched_anew_and_the_old_commit_stays(hub, expert):
    push(expert, NAME)
    old = fetch(NAME)
    before = contents(old)
    other = make_adapter(make_model(), seed=9).save(expert)
    push(other, NAME)
    new = fetch(NAME)
    assert new != old
    assert (new / WEIGHTS_FILE).read_bytes() == (other / WEIGHTS_FILE).read_bytes() != before[WEIGHTS_FILE]
    assert contents(old) == before


def test_what_is_fetched_is_a_snapshot_of_the_hubs_cache_that_the_reader_accepts(hub, expert):
    push(expert, NAME)
    directory = fetch(NAME)
    assert huggingface_hub.try_to_load_from_cache(NAME, WEIGHTS_FILE) == str(directory / WEIGHTS_FILE)
    assert contents(directory).keys() == {CONFIG_FILE, WEIGHTS_FILE, "README.md"}
    assert all(path.is_symlink() for path in directory.iterdir())
    loaded, original = SparseAdapter.load(directory), SparseAdapter.load(expert)
    assert all(torch.equal(loaded[name].values, original[name].values) for name in original)


def test_only_files_that_cannot_run_code_are_fetched(hub, expert):
    evil = {"pytorch_model.bin": b"pickle", "modeling.py": b"import os", "training_args.bin": b"", "x.pt": b"", "a/b.json": b""}
    files = contents(expert)
    hub.add(NAME, {**files, **evil, "tokenizer.json": b"{}"})
    assert contents(fetch(NAME)) == files


def test_a_checkpoint_is_fetched_and_loads(hub, tmp_path, base_dir):
    evil = {"pytorch_model.bin": b"pickle", "modeling.py": b"import os", "onnx/model.safetensors": b""}
    files = contents(Path(base_dir))
    files["adapter[1].safetensors"] = files["model.safetensors"]  # no pattern
    hub.add("lab/model", {**files, **evil})
    assert contents(pull("lab/model", tmp_path / "pulled")) == files
    assert check_directory(tmp_path / "pulled") == "checkpoint"
    inputs = torch.tensor([[5, 9, 33]])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "pulled")(inputs).logits, make_model()(inputs).logits)


def test_a_checkpoint_in_parts_needs_them_all(hub, tmp_path):
    save_base(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "parts", max_shard_size="8KB")
    files = contents(tmp_path / "parts")
    parts = sorted(name for name in files if name.endswith(".safetensors"))
    assert len(parts) > 1
    hub.add("lab/model", files)
    assert contents(fetch("lab/model")) == files
    hub.add("lab/model", {name: data for name, data in files.items() if name != parts[1]})
    with pytest.raises(MissingFile, match=f"lab/model is damaged, on the hub or in its cache: .*{parts[1]} is missing"):
        fetch("lab/model")


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ({"notes.txt": b""}, "config.json"),
        ({CONFIG_FILE: b"{}", "adapter_model.bin": b""}, WEIGHTS_FILE),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, re.escape("*.safetensors")),
        ({"sub/" + CONFIG_FILE: b"{}", "sub/" + WEIGHTS_FILE: b"{}"}, "config.json"),
    ],
    ids=["nothing", "pickled-adapter", "pickled-checkpoint", "subdirectory"],
)
def test_a_repository_without_safetensors_is_refused(hub, files, missing):
    hub.add(NAME, files)
    with pytest.raises(ModelError, match=f"lab/expert has no {missing}, so it is neither an adapter"):
        fetch(NAME)
    assert not hub.downloads()


def test_a_damaged_file_on_the_hub_leaves_nothing_behind(hub, expert, tmp_path):
    hub.add(NAME, damaged(contents(expert)))
    for _ in range(2):
        with pytest.raises(BadContainer, match="lab/expert is damaged, on the hub or in its cache"):
            pull(NAME, tmp_path / "here" / "pulled")
        assert not (tmp_path / "here").exists()
    hub.add(NAME, contents(expert))
    pull(NAME, tmp_path / "here" / "pulled")


def test_a_copy_damaged_in_the_cache_is_not_pulled(hub, expert, tmp_path):
    push(expert, NAME)
    cut_weights(fetch(NAME))
    with pytest.raises(BadContainer, match="damaged, on the hub or in its cache"):
        pull(NAME, tmp_path / "pulled")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "expert"]
    hub.status = 503
    with pytest.raises(BadContainer, match="lab/expert is in the hub's cache, but not whole"):
        fetch(NAME)


def test_a_pull_never_overwrites(hub, expert, tmp_path):
    push(expert, NAME)
    hub.requests.clear()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").touch()
    with pytest.raises(OutputExists):
        pull(NAME, tmp_path / "mine")
    assert not hub.requests


def test_an_interrupted_fetch_goes_on_when_called_again(hub, expert):
    hub.add(NAME, contents(expert))
    hub.refused.add(WEIGHTS_FILE)
    with pytest.raises(ModelError, match=r"cannot fetch lab/expert whole: access is refused \(403\).* Run again to go on\."):
        fetch(NAME)
    hub.refused.clear()
    assert contents(fetch(NAME)) == contents(expert)
    assert hub.downloads().count(CONFIG_FILE) == 1


def test_losing_the_hub_halfway_is_not_taken_for_a_whole_adapter(hub, expert, tmp_path):
    commit = hub.add(NAME, contents(expert))
    hub.refused.add("/tree/")
    with pytest.raises(ModelError, match=r"cannot fetch lab/expert whole: access is refused \(403\).* Run again to go on"):
        fetch(NAME)
    partial = tmp_path / "cache" / "models--lab--expert" / "snapshots" / commit
    partial.mkdir(parents=True)
    (partial / CONFIG_FILE).write_bytes((expert / CONFIG_FILE).read_bytes())  # the client is content with what it finds here
    with pytest.raises(ModelError, match=r"cannot fetch lab/expert whole: adapter_model.safetensors did not come\. Run again"):
        fetch(NAME)
    hub.refused.clear()
    assert contents(fetch(NAME)) == contents(expert)


def test_two_at_once_download_once(hub, expert):
    push(expert, NAME)
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(NAME))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert hub.downloads().count(WEIGHTS_FILE) == 1


def test_a_disk_that_refuses_is_named(hub, expert, tmp_path, monkeypatch):
    push(expert, NAME)
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(WriteFailed, match=r"cannot write .*/file: Not a directory"):
        fetch(NAME)


def test_a_disk_that_fills_up_is_named(hub, expert, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    push(expert, NAME)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(WriteFailed, match=r"cannot write .*/cache: No space left on device"):
        fetch(NAME)


# What others fetched


@pytest.fixture
def cached(hub, monkeypatch, tmp_path):
    """Put a directory into the hub's cache as the client does, and work offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(name, source, commit="a" * 40):
        home = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        for part in ("blobs", "refs", f"snapshots/{commit}"):
            (home / part).mkdir(parents=True)
        (home / "refs" / "main").write_text(commit)
        for file in Path(source).iterdir():
            shutil.copy(file, home / "blobs" / file.name)
            (home / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{file.name}")
        return home / "snapshots" / commit

    return put


def test_what_others_fetched_is_there_by_name_commit_and_path(cached, hub, expert, lora, base_dir, tmp_path):
    for name, source, kind in (
        (NAME, expert, "sparse adapter"),
        ("lab/lora", lora, "LORA adapter"),
        ("gpt9", base_dir, "checkpoint"),
    ):
        directory = cached(name, source)
        assert fetch(name) == fetch(f"{name}@{'a' * 40}") == directory
        assert check_directory(directory) == kind
        assert contents(pull(name, tmp_path / "pulled" / name)) == contents(source)
    loaded, original = SparseAdapter.load(cached("lab/again", expert)), SparseAdapter.load(expert)
    assert all(torch.equal(loaded[name].values, original[name].values) for name in original)
    assert not hub.requests


def test_only_what_belongs_to_it_is_pulled_from_the_cache(cached, lora, tmp_path):
    directory = cached("lab/lora", lora)
    (directory / "modeling.py").write_text("import os")
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    (directory / "sub").mkdir()
    assert contents(pull("lab/lora", tmp_path / "pulled")) == contents(lora)


def test_what_others_fetched_in_part_is_refused_offline_and_fetched_whole_online(cached, hub, base_dir, monkeypatch, tmp_path):
    commit = hub.add("lab/model", contents(Path(base_dir)))
    directory = cached("lab/model", base_dir, commit)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lab/model has no \*\.safetensors"):
        fetch("lab/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert fetch(f"lab/model@{commit}") == directory
    assert contents(directory) == contents(Path(base_dir))


def test_the_command_line_finds_what_others_fetched(cached, cli, expert, lora, base_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    cached(NAME, expert)
    snapshot = cached("lab/lora", lora)
    tuned = tmp_path / "tuned"
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    model.model.layers[0].self_attn.q_proj.weight.data += 0.1
    model.save_pretrained(tuned)
    cached("lab/base", base_dir)
    cached("lab/tuned", tuned)
    commit = "a" * 40
    for line in (
        ["inspect", NAME],
        ["merge", NAME, "lab/lora", "--out", tmp_path / "m1"],
        ["merge", snapshot, f"lab/lora@{commit}", "--out", tmp_path / "m2"],
        ["merge", "lab/tuned", "--model", "lab/base", "--out", tmp_path / "m3"],
        ["merge", "lab/tuned", "--model", f"lab/base@{commit}", "--out", tmp_path / "m4"],
        ["export", "lab/lora", "--to", "checkpoint", "--model", f"lab/base@{commit}", "--out", tmp_path / "e1"],
        ["import", snapshot, "--out", tmp_path / "i1"],
    ):
        code, _, err = cli(*line)
        assert (code, err.strip()) == (0, ""), line
    ours, theirs = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("m3", "m4"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_links_out_of_the_repository_are_refused_wherever_they_lie(cached, expert, tmp_path):
    directory, weights = cached(NAME, expert), (expert / WEIGHTS_FILE).read_bytes()
    other = cached("lab/other", expert)
    place = directory / WEIGHTS_FILE
    (tmp_path / "secret").write_bytes(weights)
    for target in (
        tmp_path / "secret",
        other.parent.parent / "blobs" / WEIGHTS_FILE,
        directory.parent.parent / "refs" / "main",
        "nowhere",
    ):
        place.unlink()
        place.symlink_to(target)
        with pytest.raises(UnsafePath, match="is a symbolic link that leaves its directory or leads nowhere"):
            SparseAdapter.load(directory)
    blobs = directory.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePath):
        SparseAdapter.load(directory)
    plain = tmp_path / "plain" / "snapshots" / "main"  # no repository of the cache
    plain.mkdir(parents=True)
    (plain.parent.parent / "blobs").mkdir()
    (plain.parent.parent / "blobs" / "config").write_bytes((expert / CONFIG_FILE).read_bytes())
    (plain / CONFIG_FILE).symlink_to("../../blobs/config")
    with pytest.raises(UnsafePath):
        SparseAdapter.load(plain)


# The hub does not answer, or says no


def test_offline_takes_what_is_there(hub, expert, monkeypatch):
    push(expert, NAME)
    there = fetch(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fetch(NAME) == there
    for other in ("lab/other", f"{NAME}@v2", f"{NAME}@{'0' * 40}"):
        with pytest.raises(ModelError, match=f"cannot fetch {other}, and it was not fetched before: HF_HUB_OFFLINE is set"):
            fetch(other)


@pytest.mark.parametrize("trouble", ["gone", 503, 429])
def test_a_hub_that_does_not_answer_is_said(hub, expert, monkeypatch, trouble):
    push(expert, NAME)
    there = fetch(NAME)
    if trouble == "gone":
        point_to(monkeypatch, "http://127.0.0.1:9")
    else:
        hub.status = trouble
    with pytest.warns(CachedCopyWarning, match=f"the hub does not answer .* as fetched before, commit {there.name}") as caught:
        assert fetch(NAME) == there
    assert caught[0].filename == __file__
    with pytest.raises(ModelError, match="cannot fetch lab/other, and it was not fetched before: "):
        fetch("lab/other")


def test_a_hub_that_says_no_is_not_answered_from_the_cache(hub, expert):
    push(expert, NAME)
    fetch(NAME)
    hub.repositories[NAME].gated = True
    with pytest.raises(ModelError, match="cannot fetch lab/expert: access is granted on request; ask on its page"):
        fetch(NAME)
    with pytest.raises(ModelError, match="cannot fetch lab/expert@v2: access is granted on request"):
        fetch(f"{NAME}@v2")
    hub.repositories[NAME].gated = False
    with pytest.raises(ModelError, match="cannot fetch lab/expert@v2: it has no such revision"):
        fetch(f"{NAME}@v2")
    del hub.repositories[NAME]
    with pytest.raises(ModelError, match="cannot fetch lab/expert: there is no such repository, or you may not see it"):
        fetch(NAME)


EVIL = [
    "",
    "/",
    "lab/",
    "/expert",
    "../expert",
    "lab/..",
    "lab/../../x",
    "lab/a..b",
    "lab/a--b",
    "/etc/passwd",
    "lab/x/y",
    "lab\\x/y",
    "lab/x\n",
    "lab/é",
    f"lab/{'x' * 97}",
    "lab/x@",
    "lab/x@..",
    "lab/x@a/../b",
    "lab/x@/a",
    "lab/x@-a",
    "lab/x@a b",
    "lab/x@a@b",
    "lab/x@a\0",
    f"lab/x@{'a' * 201}",
]


@pytest.mark.parametrize("name", EVIL)
def test_a_name_that_is_none_is_refused_before_anything_is_asked(hub, tmp_path, expert, name):
    for act in (lambda: fetch(name), lambda: pull(name, tmp_path / "out"), lambda: push(expert, name)):
        with pytest.raises(ModelError, match=r"is not a (hub name|revision); expected"):
            act()
    assert not hub.requests
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expert"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lab/expert", ("lab/expert", "main")),
        ("my_lab/Expert-2.b@v1.0", ("my_lab/Expert-2.b", "v1.0")),
        ("lab/x@refs/pr/3", ("lab/x", "refs/pr/3")),
    ],
)
def test_a_name_is_repository_and_revision(name, parts):
    assert parse_name(name) == parts


def test_a_hub_with_evil_answers_writes_nowhere_else(hub, expert, tmp_path):
    sha = hub.add(NAME, {**contents(expert), "../../evil.safetensors": b"", "/evil/README.md": b"", "..\\run.json": b""})
    directory = fetch(NAME)
    assert contents(directory) == contents(expert)
    stored = hub.repositories[NAME]
    for name in ("../../../evil", "", "ABC", sha + "/.."):
        stored.commits[name] = stored.commits[sha]
        stored.branches["main"] = name
        with pytest.raises(ModelError, match="the hub calls its commit"):
            fetch(NAME)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "expert"]


def test_a_missing_library_names_the_extra(hub, monkeypatch):
    hub.add(NAME, {CONFIG_FILE: b"", WEIGHTS_FILE: b""})
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=re.escape("the hub needs huggingface_hub: pip install 'sparselet[hub]'.")):
        fetch(NAME)


def test_by_environment_alone_and_imported_only_when_used(hub, expert, tmp_path):
    code = f"""
import sys
from sparselet.hub.publish import push
from sparselet.hub.sources import pull
assert "huggingface_hub" not in sys.modules
push({str(expert)!r}, {NAME!r})
pull({NAME!r}, {str(tmp_path / "pulled")!r})
"""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "secret",
    }
    hub.token = "secret"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "pulled").items() >= contents(expert).items()


# The card


def test_the_card_says_what_the_adapter_records(hub, expert):
    config = json.loads((expert / CONFIG_FILE).read_text())
    config |= {
        "density": 0.25,
        "block_size": 4,
        "reselect_every": 100,
        "initial_mask": "dense",
        "selection_epochs": 1.0,
        "seed": 7,
        "data_fingerprint": "abc123",
        "chat_template": False,
        "metrics": {"validation_loss": 1.23456, "steps": 60},
        "versions": {"torch": "2.9"},
    }
    (expert / CONFIG_FILE).write_text(json.dumps(config))
    text = prepare(expert, NAME).card
    assert text is not None
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "sparselet",
        "pipeline_tag": "text-generation",
        "tags": ["sparselet", "sparse-adapter", "peft"],
    }
    adapter = SparseAdapter.load(expert)
    total = sum(delta.size for delta in adapter.values())
    for row in (
        "base model | org/base",
        "task | backwards",
        f"entries | {adapter.nnz:,} of {total:,} in 6 targets",
        "density | 0.25",
        "mask | tiles of 4×4",
        "score | mcs",
        "selected again | every 100 steps",
        "selection epochs | 1",
        "seed | 7",
        "validation loss | 1.235",
        "steps | 60",
        "training data | abc123",
        "base weights | fingerprints of 6 of 6 targets; weights of another model are refused",
        "chat template | no",
        "versions | torch 2.9",
    ):
        assert f"\n| {row} |\n" in text
    assert "merge" not in text


@pytest.mark.parametrize(("block_size", "words"), [("row", "whole output rows"), ("column", "whole input columns")])
def test_the_card_names_rows_and_columns(expert, block_size, words):
    adapter = make_adapter(make_model(), block_size)
    SparseAdapter(adapter, adapter.metadata.with_fields({"block_size": block_size})).save(expert)
    assert f"\n| mask | {words} |\n" in (prepare(expert, NAME).card or "")


@pytest.mark.parametrize("base", [None, "packaged:smollm2-135m", "/home/me/llama", "../llama", "gpt2"])
def test_a_base_model_that_is_not_on_the_hub_is_not_linked(hub, expert, base):
    adapter = SparseAdapter.load(expert)
    SparseAdapter(adapter, adapter.metadata.with_fields({"base_model_name_or_path": base})).save(expert)
    text = prepare(expert, NAME).card or ""
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "/home/me" not in text
    assert "../" not in text
    assert ("| base model |" in text) == (base is not None)


def test_a_directory_here_is_not_taken_for_a_name_on_the_hub(expert, tmp_path, monkeypatch):
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = prepare(expert, NAME).card or ""
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "| base model | base, a local directory |" in text


def test_the_python_on_the_card_runs(hub, expert):
    push(expert, NAME)
    text = hub.repositories[NAME].head()["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    scope = {"base_model": make_model()}
    exec(code.group(1), scope)
    inputs = torch.tensor([[5, 9, 33]])
    expected = make_model()
    with apply_temporarily(expected, SparseAdapter.load(expert)):
        assert torch.equal(scope["model"](inputs).logits, expected(inputs).logits)


words = st.text(max_size=20) | st.text("|\\\n\r<`-#: ", max_size=8)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["base_model_name_or_path", "task", "task_type", "density", "block_size", "score", "reselect_every", "metrics"]
FIELDS += ["versions", "selection_epochs", "seed", "data_fingerprint", "peft_type", "r", "target_modules"]
recipes = anything | st.fixed_dictionaries({"experts": anything | st.lists(anything), "weights": anything, "method": anything})


@few
@given(st.dictionaries(st.sampled_from(FIELDS), anything), recipes)
def test_whatever_the_metadata_holds_the_card_is_valid(metadata, recipe):
    shapes = {"model.q_proj": (4, 4)}
    for text in (
        model_card(NAME, {**metadata, "merge": recipe}, shapes, {}, 3, 100),
        peft_card(NAME, metadata, 100),
    ):
        front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        assert front is not None
        assert yaml.safe_load(front.group(1)) == ModelCard(text).data.to_dict()
        width = None
        for line in text.split("\n"):
            if not line.startswith("|"):
                width = None
                continue
            cells = len(re.findall(r"(?<!\\)(?:\\\\)*\|", line))
            assert width in (None, cells)
            width = cells
            assert "<" not in line


# The command line


def test_a_dry_run_shows_files_and_card_and_asks_nobody(cli, hub, expert):
    before = contents(expert)
    code, out, _ = cli("push", expert, NAME, "--dry-run")
    assert code == 0
    assert prepare(expert, NAME).card in out
    for name in (*before, "README.md"):
        assert name in out
    assert "Nothing was uploaded." in out
    assert not hub.requests
    assert contents(expert) == before


def test_push_and_pull_for_machines(cli, hub, expert, tmp_path):
    code, out, err = cli("push", expert, NAME, "--private", "--message", "hello", "--revision", "v1", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    repository = hub.repositories[NAME]
    assert told["url"].endswith(repository.branches["v1"])
    assert told["files"] == {name: len(data) for name, data in repository.head("v1").items() if name != ".gitattributes"}
    assert told["kind"] == "sparse adapter"
    assert repository.private
    assert repository.messages[-1] == "hello"
    code, out, err = cli("pull", f"{NAME}@v1", "--out", tmp_path / "pulled", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"output": str(tmp_path / "pulled"), "kind": "sparse adapter", "files": told["files"]}


def test_push_and_pull_say_what_they_did_and_what_is_next(cli, hub, expert, tmp_path, lora):
    code, out, _ = cli("push", expert, NAME)
    assert code == 0
    assert f"Pushed: {hub.url}/{NAME}/commit/" in out
    assert "The card was made from the metadata" in out
    following = re.search(r"Next: sparselet (pull \S+) --out DIRECTORY", out)
    assert following is not None
    code, out, _ = cli(*following.group(1).split(), "--out", tmp_path / "pulled")
    assert code == 0
    assert "sparse adapter" in out
    assert f"Next: sparselet inspect {tmp_path / 'pulled'}" in out
    assert cli("inspect", tmp_path / "pulled")[0] == 0
    push(lora, "lab/lora")
    code, out, _ = cli("pull", "lab/lora", "--out", tmp_path / "lora")
    assert "LORA adapter" in out


def test_an_error_is_one_line(cli, hub, tmp_path):
    code, out, err = cli("pull", NAME, "--out", tmp_path / "pulled")
    assert (code, out) == (1, "")
    assert err == (
        "error: cannot fetch lab/expert: there is no such repository, or you may not see it; check the name, or log in with "
        "`hf auth login`.\n"
    )
