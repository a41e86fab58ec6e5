"""Weight patches against transformers' own checkpoints: forwards the merged one, backwards the base, bit for bit."""

import json

import pytest
import torch
from helpers.tiny import make_adapter, make_gpt2, make_model, save_base
from safetensors.torch import load_file, save_file

from sparselet import SparseAdapter, SparseDelta
from sparselet.api.exporting import export
from sparselet.errors import (
    BadConfig,
    ConfigError,
    DuplicateIndex,
    IndexOutOfBounds,
    MissingTensor,
    NonFiniteValue,
    WrongBase,
)
from sparselet.formats.weight_patch import PATCH_CONFIG, PATCH_FILE, read_patch


def patched(state, patches):
    """What an engine does: NaN where nothing changes, the values elsewhere."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    for name, shape, dtype, values, indices in patches:
        assert tuple(state[name].shape) == shape
        assert values.dtype == dtype
        staged = torch.full((values.new_empty(shape).numel(),), torch.nan, dtype=dtype)
        staged.index_copy_(0, indices.long(), values)
        staged = staged.view(shape).to(state[name].dtype)
        state[name] = torch.where(staged.isnan(), state[name], staged)
    return state


def weights(directory):
    return load_file(f"{directory}/model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_patched_engine_is_the_merged_checkpoint_and_back(tmp_path, dtype, block_size):
    model = make_model(getattr(torch, dtype))
    base = save_base(tmp_path / "base", model=model)
    adapter = make_adapter(model, block_size)
    result = export(adapter, "vllm-patch", tmp_path / "patch", base=base, dtype=dtype)
    assert result.errors == {}
    export(adapter, "checkpoint", tmp_path / "merged", base=base, dtype=dtype)
    engine = patched(weights(base), read_patch(tmp_path / "patch"))
    assert same(engine, weights(tmp_path / "merged"))
    assert not same(engine, weights(base))
    assert same(patched(engine, read_patch(tmp_path / "patch", reverse=True)), weights(base))
    assert same(patched(engine, read_patch(tmp_path / "patch")), engine)  # twice is once


def test_gpt2s_weights_lie_as_the_checkpoint_has_them(tmp_path):
    model = make_gpt2()
    base = save_base(tmp_path / "base", model=model)
    name = "transformer.h.0.attn.c_attn"
    change = torch.zeros(16, 48)
    change[3, 5] = change[0, 47] = 1.0
    adapter = SparseAdapter({name: SparseDelta.from_dense(change)})
    export(adapter, "vllm-patch", tmp_path / "patch", base=base)
    export(adapter, "checkpoint", tmp_path / "merged", base=base)
    assert same(patched(weights(base), read_patch(tmp_path / "patch")), weights(tmp_path / "merged"))


def test_a_patch_names_its_base_and_version(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = make_adapter(make_model())
    export(adapter, "vllm-patch", tmp_path / "patch", base=base)
    content = json.loads((tmp_path / "patch" / PATCH_CONFIG).read_text())
    assert (content["version"], content["previous"], content["dtype"]) == (1, None, "float32")
    for name, fingerprint in adapter.fingerprints.items():
        assert content["targets"][f"{name}.weight"]["fingerprint"] == fingerprint


def test_what_does_not_fit_is_refused(tmp_path):
    base, other = save_base(tmp_path / "base"), save_base(tmp_path / "other", seed=4)
    adapter = make_adapter(make_model())
    with pytest.raises(WrongBase):
        export(adapter, "vllm-patch", tmp_path / "patch", base=other)
    with pytest.raises(ConfigError, match="base model"):
        export(adapter, "vllm-patch", tmp_path / "patch")
    huge = SparseAdapter({name: SparseDelta(d.shape, d.indices, d.values * 1e6) for name, d in adapter.items()})
    with pytest.raises(NonFiniteValue):
        export(huge, "vllm-patch", tmp_path / "patch", base=base, dtype="float16")
    assert not (tmp_path / "patch").exists()


SPOILED = [
    (lambda t, n: t.pop(n + ".values"), MissingTensor),
    (lambda t, n: t.update({n + ".indices": t[n + ".indices"] + 10**6}), IndexOutOfBounds),
    (lambda t, n: t[n + ".indices"].__setitem__(1, t[n + ".indices"][0].item()), DuplicateIndex),
    (lambda t, n: t[n + ".values"].__setitem__(0, torch.nan), NonFiniteValue),
]


@pytest.mark.parametrize(("spoil", "error"), SPOILED)
def test_damaged_patches_are_refused_by_name(tmp_path, spoil, error):
    base = save_base(tmp_path / "base")
    export(make_adapter(make_model()), "vllm-patch", tmp_path / "patch", base=base)
    tensors = load_file(tmp_path / "patch" / PATCH_FILE)
    name = "model.layers.0.self_attn.k_proj.weight"
    spoil(tensors, name)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "patch" / PATCH_FILE)
    with pytest.raises(error, match=r"k_proj"):
        read_patch(tmp_path / "patch")


@pytest.mark.parametrize("content", [{}, {"format_version": 2, "targets": {}}, {"format_version": 1, "targets": {"a": 5}}])
def test_a_wrong_description_is_refused(tmp_path, content):
    export(make_adapter(make_model()), "vllm-patch", tmp_path / "patch", base=save_base(tmp_path / "base"))
    (tmp_path / "patch" / PATCH_CONFIG).write_text(json.dumps(content))
    with pytest.raises(BadConfig, match=PATCH_CONFIG):
        read_patch(tmp_path / "patch")
