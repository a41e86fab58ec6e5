"""SHiRA and Super-Tuning adapters are read as what PEFT adds to the weights, or refused."""

import pytest
import torch
from helpers.foreign import FIRST, QV, edit, indexed, refused, save_peft, tuner_layers
from helpers.strategies import few
from helpers.tiny import logits, make_model
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, SupertuningConfig
from safetensors.torch import load_file

from sparselet.apply import apply_temporarily
from sparselet.errors import (
    BadConfig,
    BadDtype,
    BadShape,
    ConfigError,
    IndexOutOfBounds,
    MissingTensor,
    NonFiniteValue,
    UnknownTarget,
    UnknownTensor,
    UnsupportedExpert,
)
from sparselet.formats import EntriesFile, open_expert
from sparselet.formats.single_entries.read import SHIRA, SUPER_TUNING

both = pytest.mark.parametrize("kind", ["shira", "super"])


@both
def test_single_entries_are_what_peft_adds_to_the_weights(tmp_path, kind, base_dir):
    model = indexed(kind, tmp_path)
    expert = open_expert(tmp_path, base_dir)
    assert isinstance(expert, EntriesFile)
    layers = tuner_layers(model)
    assert set(expert) == set(layers)
    for name, layer in layers.items():
        delta = expert[name]
        found = layer.get_delta_weight("default")
        assert torch.equal(delta.to_dense(), found.to_dense() if found.is_sparse else found), name
        assert delta.nnz == (2 * sum(delta.shape) if kind == "shira" else int(delta.size * (1 - 0.7)))
    assert expert.nnz == sum(delta.nnz for delta in expert.values())
    assert expert.metadata.task_type == "CAUSAL_LM"
    expert.check_values()
    expected = logits(model)
    base = make_model()
    with apply_temporarily(base, expert):
        assert torch.equal(logits(base), expected)


LAYOUTS = {"shira": SHIRA, "super": SUPER_TUNING}


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory):
    """An adapter of each kind, to write over again and again."""
    home = tmp_path_factory.mktemp("adapters")
    for kind in LAYOUTS:
        indexed(kind, home / kind)
    return home


@given(data=st.data())
@few
def test_repeated_positions_add_up_and_zeros_stay_selected(rewritten, base_dir, data):
    """Against PEFT's own layer, with the positions and values of an arbitrary file put into it."""
    kind = data.draw(st.sampled_from(["shira", "super"]))
    directory = rewritten / kind
    layout, prefix = LAYOUTS[kind], f"base_model.model.{FIRST}"
    size = 256
    numbers = st.sampled_from([0.0, 1.0, -2.0, 0.5])

    def spoil(tensors):
        count = len(tensors[prefix + layout.values])
        flat = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count)), dtype=torch.int32)
        tensors[prefix + layout.values] = torch.tensor(data.draw(st.lists(numbers, min_size=count, max_size=count)))
        tensors[prefix + layout.indices] = torch.stack([flat // 16, flat % 16]) if kind == "shira" else flat

    edit(directory, spoil)
    delta = open_expert(directory, base_dir)[FIRST]
    loaded = PeftModel.from_pretrained(make_model(), directory)
    found = tuner_layers(loaded)[FIRST].get_delta_weight("default").detach()
    assert torch.equal(delta.to_dense(), found.to_dense() if found.is_sparse else found)
    stored = load_file(directory / "adapter_model.safetensors")[prefix + layout.indices]
    flat = stored[0] * 16 + stored[1] if kind == "shira" else stored
    assert delta.indices.tolist() == sorted(set(flat.tolist()))


@both
def test_the_base_model_is_needed_for_the_shapes_and_must_be_the_right_one(tmp_path, kind, base_dir):
    indexed(kind, tmp_path / "adapter")
    refused(ConfigError, "does not hold the shapes.*set `base`", tmp_path / "adapter")
    make_model(hidden_size=32).save_pretrained(tmp_path / "wide")
    refused(BadShape, "Is this the base model it was trained on", tmp_path / "adapter", tmp_path / "wide")
    make_model(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    refused(UnknownTarget, r"no target model\.layers\.1\.self_attn", tmp_path / "adapter", tmp_path / "short")


@both
def test_a_base_model_saved_without_its_head_has_the_shapes_too(tmp_path, kind, base_dir):
    indexed(kind, tmp_path / "adapter")
    make_model().model.save_pretrained(tmp_path / "headless")
    found, expected = (open_expert(tmp_path / "adapter", base) for base in (tmp_path / "headless", base_dir))
    assert found.shapes == expected.shapes


@both
@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (lambda t, v, i: t.pop(v), MissingTensor, "is missing"),
        (lambda t, v, i: t.pop(i), MissingTensor, "is missing"),
        (lambda t, v, i: t.update({v: t[v][:-1]}), BadShape, r"expected \[K\] and"),
        (lambda t, v, i: t.update({i: t[i][..., :-1], v: t[v][:-1]}), BadShape, "makes"),
        (lambda t, v, i: t.update({v: t[v].int()}), BadDtype, "values are I32"),
        (lambda t, v, i: t.update({i: t[i].half()}), BadDtype, "indices F16"),
        (lambda t, v, i: t.update({"base_model.model.score.weight": t[v]}), UnknownTensor, "score.weight is not"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_wrong_tensors_of_single_entries_are_named(tmp_path, base_dir, kind, spoil, error, match):
    indexed(kind, tmp_path)
    v, i = (f"base_model.model.{FIRST}{suffix}" for suffix in (LAYOUTS[kind].values, LAYOUTS[kind].indices))
    edit(tmp_path, lambda t: spoil(t, v, i))
    refused(error, match, tmp_path, base_dir)


@both
@pytest.mark.parametrize("wrong", [-1, 16, 256])
def test_positions_outside_a_target_are_named(tmp_path, base_dir, kind, wrong):
    indexed(kind, tmp_path)
    if kind == "super" and wrong == 16:
        wrong = 300

    def spoil(tensors):
        tensors[f"base_model.model.{FIRST}{LAYOUTS[kind].indices}"].reshape(-1)[-1] = wrong

    with pytest.raises(IndexOutOfBounds, match=rf"q_proj.*{wrong} lies outside"):
        open_expert(edit(tmp_path, spoil), base_dir)[FIRST]


@both
def test_nan_in_single_entries_is_named(tmp_path, base_dir, kind):
    indexed(kind, tmp_path)

    def spoil(tensors):
        tensors[f"base_model.model.{FIRST}{LAYOUTS[kind].values}"][3] = float("nan")

    expert = open_expert(edit(tmp_path, spoil), base_dir)
    for read in (expert.check_values, lambda: expert[FIRST]):
        with pytest.raises(NonFiniteValue, match=r"adapter_model\.safetensors: .*q_proj"):
            read()


def test_shira_indices_saved_on_windows_are_floats(tmp_path, base_dir):
    indexed("shira", tmp_path)
    expected = open_expert(tmp_path, base_dir)[FIRST]
    name = f"base_model.model.{FIRST}.shira_indices"
    edit(tmp_path, lambda t: t.update({name: t[name].float()}))
    assert torch.equal(open_expert(tmp_path, base_dir)[FIRST].to_dense(), expected.to_dense())
    edit(tmp_path, lambda t: t.update({name: t[name] + 0.5}))
    with pytest.raises(BadDtype, match="not integers"):
        open_expert(tmp_path, base_dir)[FIRST]


def test_super_tuning_without_indices_or_with_lora_is_refused(tmp_path, base_dir):
    config = SupertuningConfig(sparsity=0.7, target_modules=QV, r=2)
    save_peft(tmp_path / "supra", config)
    refused(UnsupportedExpert, "is .: this is the hybrid with LoRA", tmp_path / "supra", base_dir)
    with pytest.warns(UserWarning, match="save_precomputed_indices"):
        config = SupertuningConfig(sparsity=0.7, target_modules=QV, save_precomputed_indices=False)
    save_peft(tmp_path / "bare", config)
    refused(UnsupportedExpert, "save_precomputed_indices is false", tmp_path / "bare", base_dir)


@both
def test_modules_trained_in_full_and_unknown_fields_are_refused(tmp_path, base_dir, kind):
    indexed(kind, tmp_path)
    refused(UnsupportedExpert, "modules_to_save is", edit(tmp_path, modules_to_save=["lm_head"]), base_dir)
    refused(UnsupportedExpert, "a field that is not known here", edit(tmp_path, modules_to_save=None, new=3), base_dir)
    fields = {"r": "2", "new": None} if kind == "shira" else {"sparsity": "0.7", "new": None}
    refused(BadConfig, "expected a number", edit(tmp_path, **fields), base_dir)
