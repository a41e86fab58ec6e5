"""Adapters as directories: what is saved comes back, byte for byte the same, whole or not at all."""

import json
import pickle
import resource
import stat

import pytest
import safetensors
import safetensors.torch
import torch
from helpers.strategies import random_delta

from sparselet import SparseAdapter, SparseDelta
from sparselet.adapter import CONFIG_FILE, PREFIX, WEIGHTS_FILE, AdapterFile, UnfinishedAdapterWarning
from sparselet.adapter_metadata import AdapterMetadata
from sparselet.errors import BadDtype, NonFiniteValue, UnsafePath, WriteFailed
from sparselet.fingerprint import fingerprint_weight

Q, K, V = (f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
METADATA = {"task": "copying", "density": 0.25, "score": "mcs", "metrics": {"rouge_l": 51.4}, "seed": 0, "note": "naïve ≥"}


def make(kind, dtype=torch.float32, **parts):
    blocks = {"element": (1, 1, 1), "tiles": (3, 3, 3), "mixed": (1, 2, 3), "lines": ("row", "column", "row")}[kind]
    shapes = ((6, 12), (12, 6), (6, 6))
    deltas = {n: random_delta(s, b, 0.5, i, dtype) for i, (n, s, b) in enumerate(zip((V, Q, K), shapes, blocks, strict=True))}
    return SparseAdapter(deltas, METADATA, **parts)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, delta in expected.items():
        assert found[name].shape == delta.shape
        assert found[name].block == delta.block or delta.nnz == 0
        for one, other in ((found[name].indices, delta.indices), (found[name].values, delta.values)):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("kind", ["element", "tiles", "mixed", "lines"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_saved_is_loaded(tmp_path, kind, dtype):
    adapter = make(kind, dtype)
    assert adapter.save(tmp_path / "a") == tmp_path / "a"
    loaded = SparseAdapter.load(tmp_path / "a")
    assert_same(loaded, adapter)
    assert {key: loaded.metadata.to_json()[key] for key in METADATA} == METADATA
    assert sorted(contents(tmp_path / "a")) == [CONFIG_FILE, WEIGHTS_FILE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_stored_in_the_dtype_asked_for(tmp_path, dtype):
    adapter = make("mixed")
    loaded = SparseAdapter.load(adapter.save(tmp_path / "a", dtype))
    assert_same(loaded, {name: delta.to(dtype) for name, delta in adapter.items()})
    assert adapter[Q].values.dtype == torch.float32


def test_an_entry_takes_eight_bytes_and_a_tile_about_four_an_entry(tmp_path):
    for block_size, expected in ((1, 8.0), (16, 4 + 4 / 256), ("row", 4 + 4 / 64)):
        delta = SparseDelta.from_dense(torch.ones(64, 64), block_size=block_size)
        file = SparseAdapter({Q: delta}).save(tmp_path / str(block_size)) / WEIGHTS_FILE
        header = int.from_bytes(file.read_bytes()[:8], "little")
        assert (file.stat().st_size - 8 - header) / delta.nnz == expected


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_targets_without_entries_and_adapters_without_targets_come_back(tmp_path, dtype):
    for i, deltas in enumerate(
        ({}, {Q: SparseDelta.empty((6, 6))}, {Q: SparseDelta.empty((6, 6)), V: random_delta((6, 12), 3)})
    ):
        adapter = SparseAdapter(deltas)
        loaded = SparseAdapter.load(adapter.save(tmp_path / str(i), dtype))
        assert {n: (d.shape, d.nnz) for n, d in loaded.items()} == {n: (d.shape, d.nnz) for n, d in adapter.items()}


def test_fingerprints_come_back_and_absent_ones_stay_absent(tmp_path):
    found = fingerprint_weight(torch.randn(6, 6))
    loaded = SparseAdapter.load(make("element", fingerprints={Q: found, "other": found}).save(tmp_path / "a"))
    assert loaded.fingerprints == {Q: found, K: None, V: None}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_modules_trained_in_full_come_back(tmp_path, dtype):
    modules = {"score.weight": torch.randn(3, 4), "score.bias": torch.randn(3).bfloat16()}
    adapter = SparseAdapter(dict(make("mixed")), {"modules_to_save": ["score"]}, modules=modules)
    loaded = SparseAdapter.load(adapter.save(tmp_path / "a", dtype))
    assert loaded.modules.keys() == modules.keys()
    for name, tensor in modules.items():
        assert loaded.modules[name].dtype == tensor.dtype
        assert torch.equal(loaded.modules[name], tensor)


def test_targets_are_read_one_by_one(tmp_path):
    adapter = make("mixed")
    file = AdapterFile(adapter.save(tmp_path / "a"))
    assert file.shapes == {name: delta.shape for name, delta in adapter.items()}
    assert_same({name: file[name] for name in file}, adapter)
    assert len(file) == 3
    assert not file.unfinished
    with pytest.raises(KeyError):
        file["nowhere"]


def test_an_adapter_saved_while_its_mask_was_selected_loads_with_a_warning(tmp_path):
    path = make("element").save(tmp_path / "a")
    tensors = safetensors.torch.load_file(path / WEIGHTS_FILE)
    tensors[f"{PREFIX}{Q}.sparse_pending"] = torch.zeros(3)
    safetensors.torch.save_file(tensors, path / WEIGHTS_FILE)
    with pytest.warns(UnfinishedAdapterWarning, match="still being selected"):
        assert_same(SparseAdapter.load(path), make("element"))


def test_an_adapter_is_a_mapping_in_the_order_of_names():
    adapter = make("mixed")
    assert list(adapter) == [K, Q, V]
    assert adapter.nnz == sum(delta.nnz for delta in adapter.values())
    assert adapter.density == adapter.nnz / (72 + 72 + 36)
    assert SparseAdapter({}).density == 0
    assert "copying" in repr(adapter)


def test_the_config_describes_the_deltas(tmp_path):
    adapter = SparseAdapter({Q: SparseDelta.from_dense(torch.ones(6, 12), block_size=3), V: SparseDelta.empty((6, 12))})
    config = json.loads((adapter.save(tmp_path / "a") / CONFIG_FILE).read_text())
    assert config["peft_type"] == "SPARSELET"
    assert config["format_version"] == 1
    assert config["targets"] == {name: {"shape": [6, 12], "fingerprint": None} for name in (Q, V)}
    assert config["density"] == 0.5
    assert config["block_size"] == 3
    assert config["target_modules"] == [Q, V]


def test_metadata_cannot_change_what_the_file_says_of_itself(tmp_path):
    lie = {"peft_type": "LORA", "format_version": 99, "targets": {}}
    loaded = SparseAdapter.load(SparseAdapter(dict(make("element")), lie).save(tmp_path / "a"))
    assert_same(loaded, make("element"))
    assert not lie.keys() & loaded.metadata.to_json().keys()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_same_adapter_gives_the_same_bytes(tmp_path, dtype):
    first = make("mixed")
    backwards = SparseAdapter({name: first[name] for name in reversed(list(first))}, dict(reversed(METADATA.items())))
    loaded = SparseAdapter.load(first.save(tmp_path / "first"))
    for name, adapter in {"a": first, "b": backwards, "c": loaded}.items():
        adapter.save(tmp_path / name, dtype)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_plain_safetensors_reads_the_weights(tmp_path, dtype):
    adapter = make("mixed")
    file = adapter.save(tmp_path / "a", dtype) / WEIGHTS_FILE
    tensors = safetensors.torch.load_file(file)
    assert sorted(tensors) == sorted(f"{PREFIX}{name}.sparse_{part}" for name in adapter for part in ("values", "indices"))
    with safetensors.safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name, delta in adapter.items():
            assert torch.equal(opened.get_tensor(f"{PREFIX}{name}.sparse_values"), delta.values.to(dtype or torch.float32))
            assert torch.equal(opened.get_tensor(f"{PREFIX}{name}.sparse_indices"), delta.indices)
            assert opened.get_tensor(f"{PREFIX}{name}.sparse_indices").dtype == torch.int32


def test_every_tensor_starts_at_a_multiple_of_its_entry_size(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        raw = (make("mixed").save(tmp_path / str(dtype), dtype) / WEIGHTS_FILE).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        width = {"F64": 8, "F32": 4, "I32": 4, "BF16": 2}
        for name, record in header.items():
            if name != "__metadata__":
                assert (start + record["data_offsets"][0]) % width[record["dtype"]] == 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_deltas_that_share_memory_are_saved_like_any_others(tmp_path, dtype):
    delta = random_delta((6, 12), 3)
    module = torch.randn(4, 4)
    adapter = SparseAdapter(
        {Q: delta, K: delta.scale(2.0), V: delta},
        {"modules_to_save": ["head", "embed"]},
        modules={"head.weight": module, "embed.weight": module},
    )
    loaded = SparseAdapter.load(adapter.save(tmp_path / "a", dtype))
    assert_same(loaded, {name: d.to(dtype) if dtype else d for name, d in adapter.items()})
    assert torch.equal(loaded.modules["embed.weight"], module)


def test_values_that_are_views_are_saved_by_their_own_entries(tmp_path):
    strided = SparseDelta((6, 6), torch.arange(10)[::2], torch.arange(10.0)[::2])
    for dtype in (torch.float32, torch.float16):
        loaded = SparseAdapter.load(SparseAdapter({Q: strided}).save(tmp_path / str(dtype), dtype))
        assert loaded[Q].values.tolist() == [0, 2, 4, 6, 8]
        assert loaded[Q].indices.tolist() == [0, 2, 4, 6, 8]


def test_values_that_require_gradients_are_saved(tmp_path):
    delta = SparseDelta((6, 6), torch.arange(4), torch.ones(4, requires_grad=True))
    for dtype in (torch.float32, torch.bfloat16):
        assert SparseAdapter.load(SparseAdapter({Q: delta}).save(tmp_path / str(dtype), dtype)).nnz == 4


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_a_dtype_the_format_does_not_have_is_refused(tmp_path, dtype):
    with pytest.raises(BadDtype):
        make("element").save(tmp_path / "a", dtype)
    assert not list(tmp_path.rglob("*.safetensors*"))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_saved(tmp_path, wrong):
    adapter = SparseAdapter({Q: SparseDelta((6, 6), torch.tensor([1, 2]), torch.tensor([1.0, wrong]))})
    with pytest.raises(NonFiniteValue, match=f"{Q}: 1 of 2 values are NaN or infinite"):
        adapter.save(tmp_path / "a")


def test_values_too_large_for_the_dtype_asked_for_are_not_saved(tmp_path):
    adapter = SparseAdapter({Q: SparseDelta((6, 6), torch.tensor([1]), torch.tensor([1e6]))})
    with pytest.raises(NonFiniteValue, match=Q):
        adapter.save(tmp_path / "a", torch.float16)


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "a..b", ".a", "", "a\0b", "a b", "c:a", "a\nb", 3])
def test_a_target_name_that_is_no_module_name_is_refused(name):
    with pytest.raises(UnsafePath, match="is not a module name"):
        SparseAdapter({name: random_delta((6, 6))})


def big_adapter():
    return SparseAdapter({Q: SparseDelta.from_dense(torch.ones(256, 256))})


def assert_old_file_is_whole(path, before):
    assert contents(path) == before
    assert_same(SparseAdapter.load(path), make("element"))


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, dtype):
    path = make("element").save(tmp_path / "a")
    before = contents(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))  # the file would take 512 or 384 KiB
    try:
        with pytest.raises(WriteFailed) as caught:
            big_adapter().save(path, dtype)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write {path / WEIGHTS_FILE}: File too large. Nothing was changed." in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert_old_file_is_whole(path, before)


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_write_that_fails_at_its_end_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = make("element").save(tmp_path / "a")
    before = contents(path)

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(f"os.{call}", fail)
        with pytest.raises(WriteFailed, match="Input/output error"):
            big_adapter().save(path)
    assert_old_file_is_whole(path, before)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = make("element").save(tmp_path / "a")
    before = contents(path)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sparselet.adapter.add_delta", interrupt)
        with pytest.raises(KeyboardInterrupt):
            big_adapter().save(path)
    assert_old_file_is_whole(path, before)


def test_metadata_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    path = make("element").save(tmp_path / "a")
    before = contents(path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        SparseAdapter(dict(big_adapter()), {"metrics": torch.ones(1)}).save(path)
    assert_old_file_is_whole(path, before)


def test_a_path_that_is_a_file_cannot_be_written_to(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(WriteFailed, match="cannot write"):
        make("element").save(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


def test_saved_files_are_readable_as_the_umask_says(tmp_path):
    path = make("element").save(tmp_path / "a")
    (tmp_path / "plain").touch()
    for file in path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_saving_and_loading_never_pickles(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickled")

    for module, names in ((pickle, ("load", "loads", "dump", "dumps", "Pickler", "Unpickler")), (torch, ("load", "save"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    for dtype in (torch.float32, torch.bfloat16):
        assert len(SparseAdapter.load(make("mixed").save(tmp_path / "a", dtype))) == 3


def test_a_field_of_the_metadata_is_read_by_name():
    metadata = AdapterMetadata(task="trec", extra={"lora": 1})
    assert (metadata["task"], metadata["lora"]) == ("trec", 1)
    with pytest.raises(KeyError, match="score"):
        metadata["score"]
