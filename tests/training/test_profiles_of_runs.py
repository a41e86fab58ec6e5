"""Profiles made by training and later, for every kind of expert, and merges by them."""

import logging

import pytest
import torch
from helpers.tiny import make_adapter, make_gpt2, make_model, save_base, save_task
from helpers.training_runs import bytes_of

import sparselet as sl
from sparselet.apply import apply_temporarily
from sparselet.errors import ConfigError, MissingProfile, OutputExists, SparseletError
from sparselet.formats import open_expert
from sparselet.merging import METHODS
from sparselet.models import load_model, load_tokenizer
from sparselet.profiles.file import PROFILE_FILE, read_profile
from sparselet.tasks.task import load_task
from sparselet.training import train

METHOD_NAMES = ("sparse", "lora", "full", "full-qkv")


@pytest.fixture(scope="module")
def runs(settings_of, tmp_path_factory):
    """An expert of each method."""
    directory = tmp_path_factory.mktemp("runs")
    for method in METHOD_NAMES:
        train(settings_of(method), directory / method)
    return directory


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_training_profiles_every_kind_of_expert(method, runs, base_dir, task_dir):
    profile = read_profile(runs / method / PROFILE_FILE)
    expert = open_expert(runs / method, base_dir)
    model, tokenizer = load_model(base_dir), load_tokenizer(base_dir)
    seen = []
    with apply_temporarily(model, expert), torch.no_grad():
        hook = model.get_submodule("model.layers.1.self_attn.v_proj").register_forward_pre_hook(
            lambda module, given: seen.append(given[0][0].double())
        )
        for row in load_task(task_dir, ("train",)).rows("train"):
            model(torch.tensor([tokenizer(f"{row.input} {row.target}")["input_ids"] + [1]]))
        hook.remove()
    x = torch.cat(seen)
    assert profile.tokens == len(x)
    moment = profile.moment("model.layers.1.self_attn.v_proj")
    torch.testing.assert_close(moment.to_dense(), x.T @ x / len(x), rtol=1e-3, atol=1e-4)
    assert len(profile.inputs) == (15 if method == "full" else 6)
    assert profile.prompts.count == 12


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_profile_made_later_is_that_of_training(method, runs, base_dir, task_dir, tmp_path):
    result = sl.profile(str(runs / method), task_dir, base=base_dir, out=tmp_path / "later")
    later, trained = read_profile(result.path), read_profile(runs / method / PROFILE_FILE)
    if method == "sparse":  # the others' W + ΔW is rounded once more
        assert result.path.read_bytes() == (runs / method / PROFILE_FILE).read_bytes()
    assert (later.inputs, later.transposed) == (trained.inputs, trained.transposed)
    for name in trained.inputs:
        torch.testing.assert_close(later.moment(name).to_dense(), trained.moment(name).to_dense(), rtol=1e-4, atol=1e-5)
    assert torch.equal(later.prompts.mean, trained.prompts.mean)
    assert (later.fingerprints, later.tokens, later.rows) == (trained.fingerprints, trained.tokens, trained.rows)


def test_without_a_profile_the_other_files_are_the_same(runs, settings_of, tmp_path):
    train(settings_of("sparse", profile=False), tmp_path / "bare")
    files = bytes_of(runs / "sparse")
    assert files.pop(PROFILE_FILE)
    assert bytes_of(tmp_path / "bare") == files


def test_an_expert_in_memory_has_its_profile(base_dir, task_dir, tmp_path):
    expert = sl.train(task_dir, model=base_dir, epochs=1, batch_size=4)
    directory = expert.save(tmp_path / "saved")
    assert read_profile(directory / PROFILE_FILE).tokens == expert.profile.tokens
    bare = make_adapter(make_model(), base_model_name_or_path=base_dir)
    with pytest.raises(MissingProfile, match="regmean needs a profile of each expert, and expert 2 has none"):
        sl.merge([expert, bare], "regmean")
    assert sl.profile(bare, task_dir).path is None
    assert bare.profile.rows == 12
    assert sl.merge([expert, bare], "regmean").nnz


def test_experts_of_all_kinds_merge_by_their_profiles(runs, base_dir, tmp_path):
    paths = [runs / method for method in METHOD_NAMES]
    merged = sl.merge(paths, "regmean", base=base_dir)
    streamed = sl.merge(paths, "regmean", base=base_dir, out=tmp_path / "merged", workers=2)
    for name in merged:
        torch.testing.assert_close(streamed[name].to_dense(), merged[name].to_dense())
    name = "model.layers.0.self_attn.q_proj"
    opened = [open_expert(path, base_dir)[name] for path in paths]
    moments = [read_profile(path / PROFILE_FILE).moment(name) for path in paths]
    expected = METHODS["regmean"].function(opened, [1.0] * 4, moments=moments)
    torch.testing.assert_close(merged[name].to_dense(), expected.to_dense())


def test_transposed_targets_are_profiled_as_such(tmp_path):
    base, task = save_base(tmp_path / "base", model=make_gpt2()), save_task(tmp_path / "task")
    expert = sl.train(task, model=base, epochs=1, batch_size=4, max_input_length=16)
    moment = expert.profile.moment("transformer.h.0.attn.c_attn")
    assert (moment.transposed, moment.width, expert.shapes["transformer.h.0.attn.c_attn"]) == (True, 16, (16, 48))
    merged = sl.merge([expert, expert], "regmean")
    torch.testing.assert_close(
        merged["transformer.h.0.attn.c_attn"].to_dense(), expert["transformer.h.0.attn.c_attn"].to_dense()
    )


def test_a_profile_that_fails_does_not_lose_the_expert(settings_of, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise SparseletError("no memory for it")

    monkeypatch.setattr("sparselet.training.profiling.collect_moments", fail)
    with caplog.at_level(logging.WARNING):
        expert = train(settings_of("sparse"), tmp_path / "expert")
    assert expert.profile is None
    assert "The expert gets no profile: no memory for it" in caplog.text
    assert not (tmp_path / "expert" / PROFILE_FILE).exists()


def test_a_profile_is_not_written_over_or_into_the_hubs_cache(runs, task_dir, base_dir):
    with pytest.raises(OutputExists):
        sl.profile(str(runs / "sparse"), task_dir)
    with pytest.raises(ConfigError, match="org/name is not a directory here; pull it first, or set `out`"):
        sl.profile("org/name", task_dir)


def test_a_converted_expert_keeps_its_profile(runs, base_dir, tmp_path):
    sl.convert(str(runs / "lora"), tmp_path / "sparse", base=base_dir)
    assert (tmp_path / "sparse" / PROFILE_FILE).read_bytes() == (runs / "lora" / PROFILE_FILE).read_bytes()
