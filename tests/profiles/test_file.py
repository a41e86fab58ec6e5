"""profile.safetensors: what is written is read, and each way in which a file can be wrong has its error."""

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from sparselet import SparseAdapter, SparseDelta, errors
from sparselet.adapter import expert_profile
from sparselet.profiles.file import PROFILE_FILE, read_profile, write_profile
from sparselet.profiles.profile import Profile, PromptStates, SecondMoment, low_rank_plus_diagonal

PRINT = {"dtype": "float32", "sample": "0" * 16, "signs": "1" * 16}


def moment(seed, width=6, rank=2):
    x = torch.randn(20, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return low_rank_plus_diagonal(x.T @ x / 20, rank)


@pytest.fixture
def profile():
    moments = {"layer.k": moment(0), "layer.o": moment(1, 4)}
    inputs = {"layer.q": "layer.k", "layer.k": "layer.k", "layer.o": "layer.o"}
    prompts = PromptStates(torch.arange(5.0), moment(2, 5), 9)
    return Profile(moments, inputs, frozenset({"layer.o"}), prompts, dict.fromkeys(inputs, PRINT), 20, 3, "a task")


@pytest.fixture
def file(profile, tmp_path):
    return write_profile(profile, tmp_path / PROFILE_FILE)


def test_a_profile_is_read_as_it_was_written(profile, file):
    back = read_profile(file)
    assert (back.inputs, list(back.moments)) == (profile.inputs, ["layer.k", "layer.o"])
    for name in profile.inputs:
        for field in ("factor", "diagonal"):
            assert torch.equal(getattr(back.moment(name), field), getattr(profile.moment(name), field))
        assert back.moment(name).transposed == (name == "layer.o")
    assert back.moment("layer.v") is None
    assert torch.equal(back.prompts.mean, profile.prompts.mean)
    assert torch.equal(back.prompts.covariance.factor, profile.prompts.covariance.factor)
    assert (back.fingerprints, back.tokens, back.rows, back.task) == (profile.fingerprints, 20, 3, "a task")
    assert (back.prompts.count, repr(back)) == (9, "Profile(a task, 3 targets, 20 tokens of 3 rows)")


def test_a_shared_input_is_stored_once_and_equal_profiles_give_equal_bytes(profile, file, tmp_path):
    tensors = safetensors.torch.load_file(file)
    assert {name.rpartition(".")[0] for name in tensors if name.startswith("input.")} == {"input.layer.k", "input.layer.o"}
    turned = replace(profile, inputs=dict(reversed(profile.inputs.items())))
    assert write_profile(turned, tmp_path / "again").read_bytes() == file.read_bytes()


def rewritten(file, change=None, note=None, **facts):
    """The file with other tensors, or another note."""
    with safetensors.safe_open(file, "pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    if change is not None:
        change(tensors)
    facts = {**json.loads(metadata["sparselet_profile"]), **facts}
    metadata["sparselet_profile"] = json.dumps(facts) if note is None else note
    safetensors.torch.save_file(tensors, file, metadata)
    return file


TARGET = {"input": "layer.k", "transposed": False, "fingerprint": None}
TENSORS = {
    "a missing tensor": (lambda t: t.pop("input.layer.k.factor"), errors.MissingTensor, "input.layer.k.factor is missing"),
    "an unknown tensor": (lambda t: t.update(more=torch.ones(1)), errors.UnknownTensor, "more belongs to no target"),
    "another dtype": (
        lambda t: t.update({"prompts.mean": t["prompts.mean"].half()}),
        errors.BadDtype,
        "prompts.mean is F16; expected F32",
    ),
    "another width": (lambda t: t.update({"input.layer.k.factor": torch.ones(2, 5)}), errors.BadShape, "layer.k has a factor"),
    "too high a rank": (lambda t: t.update({"input.layer.k.factor": torch.ones(7, 6)}), errors.BadShape, "rank at most the"),
    "another prompt width": (lambda t: t.update({"prompts.mean": torch.ones(4)}), errors.BadShape, "prompts.mean has 4"),
    "a scalar mean": (lambda t: t.update({"prompts.mean": torch.ones(())}), errors.BadShape, r"shape \[\]; expected"),
    "NaN in the mean": (
        lambda t: t.update({"prompts.mean": torch.full((5,), torch.nan)}),
        errors.NonFiniteValue,
        "5 of 5 values are NaN",
    ),
    "a negative spread": (lambda t: t["prompts.diagonal"].neg_(), errors.BadProfile, "prompts.diagonal has entries below 0"),
}
NOTES = {
    "no note": ({"note": "nothing"}, errors.BadProfile, "has no sparselet_profile"),
    "deep": ({"note": "[" * 100_000}, errors.BadProfile, "has no sparselet_profile"),
    "a list": ({"note": "[]"}, errors.BadProfile, "version is None"),
    "version 0": ({"version": 0}, errors.BadProfile, "version is 0"),
    "a later version": ({"version": 2}, errors.UnsupportedVersion, "version 2 is newer than 1; upgrade"),
    "no targets": ({"targets": {}}, errors.BadProfile, "targets is {}; expected an object"),
    "a target without an input": ({"targets": {"layer.k": {}}}, errors.BadProfile, "targets.layer.k is {}; expected input"),
    "a foreign input": ({"targets": {"a": TARGET}}, errors.BadProfile, "targets.a is"),
    "half a fingerprint": (
        {"targets": {"layer.k": {**TARGET, "fingerprint": {"dtype": "float32"}}}},
        errors.BadProfile,
        "targets.layer.k is",
    ),
    "no tokens": ({"tokens": 0}, errors.BadProfile, "tokens is 0; expected a positive integer"),
    "rows as text": ({"rows": "3"}, errors.BadProfile, "rows is '3'"),
    "a task as number": ({"task": 3}, errors.BadProfile, "task is 3; expected text or null"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors_are_refused_when_the_file_is_opened(file, case):
    change, error, message = TENSORS[case]
    with pytest.raises(error, match=message):
        read_profile(rewritten(file, change))


@pytest.mark.parametrize("case", NOTES)
def test_wrong_facts_are_refused_when_the_file_is_opened(file, case):
    facts, error, message = NOTES[case]
    with pytest.raises(error, match=message):
        read_profile(rewritten(file, **facts))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t["input.layer.k.factor"].fill_(torch.inf), errors.NonFiniteValue, "layer.k.factor: 12 of 12 values"),
        (lambda t: t["input.layer.k.diagonal"].fill_(-1), errors.BadProfile, "layer.k.diagonal has entries below 0"),
        (lambda t: [t["input.layer.k." + p].zero_() for p in ("factor", "diagonal")], errors.BadProfile, "is all 0"),
    ],
    ids=["infinity", "negative", "zero"],
)
def test_a_wrong_moment_is_refused_when_it_is_read(file, change, error, message):
    opened = read_profile(rewritten(file, change))
    assert opened.moment("layer.o").width == 4
    with pytest.raises(error, match=message):
        opened.moment("layer.q")


def test_a_file_cut_short_or_absent_is_refused(file, tmp_path):
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(errors.BadContainer, match=PROFILE_FILE):
        read_profile(file)
    with pytest.raises(errors.MissingFile):
        read_profile(tmp_path / "nothing")


def adapter(profile=None, width=6, sample="0" * 16):
    fingerprint = {**PRINT, "sample": sample}
    return SparseAdapter(
        {"layer.q": SparseDelta.from_dense(torch.ones(3, width))}, None, {"layer.q": fingerprint}, profile=profile
    )


def test_an_adapter_carries_its_profile_through_the_disk(profile, tmp_path):
    directory = adapter(profile).save(tmp_path / "adapter")
    assert SparseAdapter.load(directory).profile.tokens == 20
    assert torch.equal(expert_profile(SparseAdapter.load(directory)).moment("layer.q").factor, profile.moment("layer.q").factor)
    adapter().save(directory)  # in place of one with a profile, which is not that of this adapter
    assert not (directory / PROFILE_FILE).exists()
    assert SparseAdapter.load(directory).profile is None


def test_a_profile_of_another_base_or_of_other_shapes_is_refused(profile, tmp_path):
    with pytest.raises(errors.WrongBase, match="the expert and its profile: the base weights differ"):
        expert_profile(adapter(profile, sample="f" * 16))
    with pytest.raises(errors.ShapeMismatch, match=r"layer.q has shape \[3, 7\], but inputs of width 6"):
        expert_profile(adapter(profile, 7))
    directory = adapter(sample="f" * 16).save(tmp_path / "adapter")
    write_profile(profile, directory / PROFILE_FILE)
    with pytest.raises(errors.WrongBase, match=r"adapter and its profile\.safetensors"):
        SparseAdapter.load(directory)


def test_a_link_out_of_the_adapter_is_refused(profile, tmp_path):
    directory = adapter().save(tmp_path / "adapter")
    (directory / PROFILE_FILE).symlink_to(write_profile(profile, tmp_path / "elsewhere"))
    with pytest.raises(errors.UnsafePath):
        SparseAdapter.load(directory)


def test_moments_of_a_damaged_matrix_have_no_trace():
    assert SecondMoment(torch.zeros(1, 3), torch.zeros(3)).trace == 0
