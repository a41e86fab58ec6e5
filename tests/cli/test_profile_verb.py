"""`sparselet profile`."""

import json
import shutil

import pytest
from helpers.tiny import make_adapter, make_model

from sparselet.profiles.file import PROFILE_FILE, read_profile


@pytest.fixture
def expert(tmp_path, base_dir):
    about = {"base_model_name_or_path": base_dir, "task": "backwards", "chat_template": False}
    return make_adapter(make_model(), **about).save(tmp_path / "expert")


def test_a_profile_is_written_beside_the_expert_and_merged_by(cli, expert, task_dir, tmp_path):
    code, out, err = cli("profile", expert, "--task", task_dir)
    assert code == 0, err
    assert "188 tokens; 12 prompts" in out
    assert "6, with 2 different inputs" in out
    assert f"Next: sparselet merge {expert} OTHER-EXPERT --method regmean" in out
    assert read_profile(expert / PROFILE_FILE).rows == 12
    other = shutil.copytree(expert, tmp_path / "other")
    code, _, err = cli("merge", expert, other, "--method", "regmean", "--out", tmp_path / "merged")
    assert code == 0, err


def test_its_size_and_place_are_chosen_by_flags(cli, refused, expert, task_dir, tmp_path):
    flags = ("--task", task_dir, "--out", tmp_path / "p", "--tokens", 40, "--rank", 3, "--json")
    code, out, err = cli("profile", expert, *flags)
    assert code == 0, err
    assert json.loads(out)["profile"] == str(tmp_path / "p")
    profile = read_profile(tmp_path / "p")
    assert (profile.tokens <= 40, profile.rows < 12) == (True, True)
    assert {len(moment.factor) for moment in profile.moments.values()} == {3}
    code, _, err = cli("profile", expert, "--task", task_dir, "--out", tmp_path / "full", "--full")
    assert {len(moment.factor) for moment in read_profile(tmp_path / "full").moments.values()} == {16}
    assert "exists already" in refused("profile", expert, "--task", task_dir, "--out", tmp_path / "p")
    assert "--rank must be at least 1" in refused("profile", expert, "--task", task_dir, "--rank", 0)
    assert "--tokens must be at least 1" in refused("profile", expert, "--task", task_dir, "--tokens", 0)


def test_without_a_profile_a_merge_says_how_to_make_one(refused, expert, experts, tmp_path):
    error = refused("merge", expert, experts[0], "--method", "regmean", "--out", tmp_path / "merged")
    assert f"{expert} has none" in error
    assert f"sparselet profile {expert} with their `task`" in error
    assert not (tmp_path / "merged").exists()
