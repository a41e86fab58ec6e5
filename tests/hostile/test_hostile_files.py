"""One file for each way an adapter can be wrong, and the named error that says so."""

import contextlib
import json
import os
import resource
import shutil

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselet import SparseAdapter
from sparselet.adapter import AdapterFile
from sparselet.errors import (
    AbsurdShape,
    BadConfig,
    BadContainer,
    BadDtype,
    BadShape,
    DuplicateIndex,
    FormatError,
    IndexOutOfBounds,
    MissingFile,
    MissingTensor,
    NonFiniteValue,
    UnknownTensor,
    UnsafePath,
    UnsortedIndices,
    UnsupportedVersion,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGET = "layers.0.q"
VALUES, INDICES = (f"base_model.model.{TARGET}.sparse_{part}" for part in ("values", "indices"))
ROWS, COLUMNS = 4, 6
MEBIBYTE = 2**20


def good_config(**changes):
    targets = {TARGET: {"shape": [ROWS, COLUMNS], "fingerprint": None}}
    return {"peft_type": "SPARSELET", "format_version": 1, "targets": targets, **changes}


def good_tensors():
    return {VALUES: torch.tensor([0.5, 0.0, -1.0]), INDICES: torch.tensor([1, 5, 23], dtype=torch.int32)}


def write(path, config=None, tensors=None):
    """An adapter directory: `config` is JSON or raw bytes, `tensors` a dict or raw bytes; good ones by default."""
    path.mkdir(exist_ok=True)
    config = good_config() if config is None else config
    (path / CONFIG).write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    tensors = good_tensors() if tensors is None else tensors
    (path / WEIGHTS).write_bytes(tensors if isinstance(tensors, bytes) else safetensors.torch.save(tensors))
    return path


def assert_refused(path, error, *parts):
    """Loading raises exactly this error, and the message holds each of the parts."""
    with pytest.raises(FormatError) as caught:
        SparseAdapter.load(path)
    assert type(caught.value) is error, caught.value
    for part in parts:
        assert str(part) in str(caught.value)


def test_the_file_that_the_others_spoil_is_good(tmp_path):
    delta = SparseAdapter.load(write(tmp_path / "a"))[TARGET]
    assert delta.indices.tolist() == [1, 5, 23]
    assert delta.values.tolist() == [0.5, 0.0, -1.0]


# The directory


def test_a_directory_that_is_not_there(tmp_path):
    assert_refused(tmp_path / "nowhere", MissingFile, tmp_path / "nowhere", "is not a directory", CONFIG, WEIGHTS)


def test_a_path_that_is_a_file(tmp_path):
    assert_refused(write(tmp_path / "a") / WEIGHTS, MissingFile, WEIGHTS, "is not a directory")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_is_missing(tmp_path, name):
    path = write(tmp_path / "a")
    (path / name).unlink()
    assert_refused(path, MissingFile, path / name, "is missing")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_is_a_directory(tmp_path, name):
    path = write(tmp_path / "a")
    (path / name).unlink()
    (path / name).mkdir()
    assert_refused(path, MissingFile, path / name)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    path = write(tmp_path / "a")
    (path / name).unlink()
    os.mkfifo(path / name)
    assert_refused(path, MissingFile, path / name)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_link_out_of_the_directory(tmp_path, name):
    path = write(tmp_path / "a")
    shutil.move(path / name, tmp_path / "outside")
    for target in (tmp_path / "outside", "../outside"):
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(target)
        assert_refused(path, UnsafePath, path / name, "symbolic link that leaves its directory")


def test_a_link_into_a_directory_whose_name_begins_alike(tmp_path):
    path, other = write(tmp_path / "a"), write(tmp_path / "ab")
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).symlink_to(other / WEIGHTS)
    assert_refused(path, UnsafePath, path / WEIGHTS)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_link_to_itself(tmp_path, name):
    path = write(tmp_path / "a")
    (path / name).unlink()
    (path / name).symlink_to(name)
    assert_refused(path, UnsafePath, path / name, "leads nowhere")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_link_that_leads_nowhere(tmp_path, name):
    path = write(tmp_path / "a")
    (path / name).unlink()
    (path / name).symlink_to("gone")
    assert_refused(path, UnsafePath, path / name, "leads nowhere")


def test_a_link_that_stays_inside_is_followed(tmp_path):
    path = write(tmp_path / "a")
    (path / WEIGHTS).rename(path / "blob")
    (path / WEIGHTS).symlink_to("blob")
    assert len(SparseAdapter.load(path)) == 1


# The configuration


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"targets: {}", b"\xff\xfe\x00", b'{"a": 1}}', b"[" * 100_000, b'{"format_version": ' + b"9" * 5000 + b"}"],
)
def test_a_configuration_that_is_not_json(tmp_path, raw):
    path = write(tmp_path / "a", raw)
    assert_refused(path, BadConfig, path / CONFIG, "is not JSON")


@pytest.mark.parametrize(("content", "kind"), [([], "list"), ("text", "str"), (None, "NoneType"), (3, "int")])
def test_a_configuration_that_is_no_object(tmp_path, content, kind):
    path = write(tmp_path / "a", json.dumps(content).encode())
    assert_refused(path, BadConfig, path / CONFIG, "expected an object", kind)


@pytest.mark.parametrize("peft_type", ["LORA", "sparselet", None, 1, ["SPARSELET"]])
def test_a_configuration_of_another_method(tmp_path, peft_type):
    path = write(tmp_path / "a", good_config(peft_type=peft_type))
    assert_refused(path, BadConfig, path / CONFIG, f"peft_type is {peft_type!r}")


@pytest.mark.parametrize("field", ["peft_type", "format_version", "targets"])
def test_a_configuration_without_a_field_it_must_have(tmp_path, field):
    config = good_config()
    del config[field]
    path = write(tmp_path / "a", config)
    assert_refused(path, BadConfig, path / CONFIG, field)


@pytest.mark.parametrize("prompt", ["no place", "{input} {input}", 3, ["{input}"]])
def test_a_prompt_without_its_one_placeholder(tmp_path, prompt):
    path = write(tmp_path / "a", {**good_config(), "prompt": prompt})
    assert_refused(path, BadConfig, path / CONFIG, "prompt is", "text with {input} in it, once")


@pytest.mark.parametrize("version", [0, -1, 1.0, "1", True, None, [1]])
def test_a_format_version_of_the_wrong_kind(tmp_path, version):
    path = write(tmp_path / "a", good_config(format_version=version))
    assert_refused(path, BadConfig, path / CONFIG, f"format_version is {version!r}")


@pytest.mark.parametrize("version", [2, 10**12])
def test_a_format_version_of_the_future(tmp_path, version):
    path = write(tmp_path / "a", good_config(format_version=version))
    assert_refused(path, UnsupportedVersion, path / CONFIG, f"format_version {version} is newer than 1", "upgrade")


@pytest.mark.parametrize("targets", [None, [TARGET], "all-linear", 3, [[TARGET, [4, 6]]]])
def test_targets_of_the_wrong_kind(tmp_path, targets):
    path = write(tmp_path / "a", good_config(targets=targets))
    assert_refused(path, BadConfig, path / CONFIG, "targets is", "expected an object")


@pytest.mark.parametrize("record", [None, [4, 6], "4x6", {}, {"shape": None}, {"shape": "4x6"}, {"shape": {"0": 4, "1": 6}}])
def test_a_target_without_a_shape(tmp_path, record):
    path = write(tmp_path / "a", good_config(targets={TARGET: record}))
    assert_refused(path, BadConfig, path / CONFIG, TARGET, "expected an object with a shape")


@pytest.mark.parametrize(
    "shape",
    [
        [],
        [24],
        [4, 6, 1],
        [4.0, 6],
        ["4", 6],
        [True, 6],
        [None, 6],
        [[4], 6],
        [0, 6],
        [-4, 6],
        [4, -6],
        [1e400, 6],
        [float("nan"), 6],
    ],
)
def test_a_shape_without_two_positive_sides(tmp_path, shape):
    path = write(tmp_path / "a", good_config(targets={TARGET: {"shape": shape}}))
    assert_refused(path, BadShape, path / CONFIG, TARGET, "two positive sides")


@pytest.mark.parametrize("shape", [[2**40, 6], [4, 2**40], [2**20, 2**20], [10**400, 10**400], [2**27, 1]])
def test_a_shape_beyond_any_model(tmp_path, shape):
    path = write(tmp_path / "a", good_config(targets={TARGET: {"shape": shape}}))
    assert_refused(path, AbsurdShape, path / CONFIG, TARGET, "larger than any target")


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/etc/passwd", "..", ".", "", "a..b", ".a", "a.", "a\0b", "a\\b", "C:x", "a b", "a\n", "\u202ea"]
)
def test_a_target_name_that_is_no_module_name(tmp_path, name):
    path = write(tmp_path / "a", good_config(targets={name: {"shape": [ROWS, COLUMNS]}}))
    assert_refused(path, UnsafePath, path / CONFIG, repr(name), "is not a module name")


@pytest.mark.parametrize(
    "found", ["abc", [], 1, {}, {"dtype": "float32", "sample": "00"}, {"dtype": "float32", "sample": 1, "signs": "00"}]
)
def test_a_fingerprint_of_the_wrong_kind(tmp_path, found):
    path = write(tmp_path / "a", good_config(targets={TARGET: {"shape": [ROWS, COLUMNS], "fingerprint": found}}))
    assert_refused(path, BadConfig, path / CONFIG, TARGET, "fingerprint is")


@pytest.mark.parametrize("modules", ["score", {"score": 1}, [1], [None], [""], 3])
def test_modules_to_save_of_the_wrong_kind(tmp_path, modules):
    path = write(tmp_path / "a", good_config(modules_to_save=modules))
    assert_refused(path, BadConfig, path / CONFIG, "modules_to_save is")


def test_a_huge_configuration_is_refused_by_its_size(tmp_path):
    path = write(tmp_path / "a")
    os.truncate(path / CONFIG, 2**40)  # sparse: takes no room on the disk
    before = peak_memory()
    assert_refused(path, AbsurdShape, path / CONFIG, f"has {2**40} bytes; the limit is")
    assert peak_memory() - before < 64 * MEBIBYTE


# The container


@pytest.mark.parametrize("length", [0, 1, 7, 8, 40, -1, -4])
def test_a_truncated_container(tmp_path, length):
    raw = safetensors.torch.save(good_tensors())
    path = write(tmp_path / "a", tensors=raw[:length])
    assert_refused(path, BadContainer, path / WEIGHTS, "is not a whole safetensors file")


@pytest.mark.parametrize("claim", [0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(tmp_path, claim):
    raw = safetensors.torch.save(good_tensors())
    path = write(tmp_path / "a", tensors=claim.to_bytes(8, "little") + raw[8:])
    before = peak_memory()
    assert_refused(path, BadContainer, path / WEIGHTS)
    assert peak_memory() - before < 64 * MEBIBYTE


@pytest.mark.parametrize("raw", [b"garbage" * 100, b"\x80\x04\x95" + b"\0" * 100, b"PK\x03\x04" + b"\0" * 100, b"\xff" * 64])
def test_a_container_of_garbage(tmp_path, raw):
    path = write(tmp_path / "a", tensors=raw)
    assert_refused(path, BadContainer, path / WEIGHTS)


def container(header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def claim(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"not JSON", b""),
        (b"[]", b""),
        ({VALUES: claim(offsets=(0, 400))}, b"\0" * 4),
        ({VALUES: claim(shape=(2**40,), offsets=(0, 2**42))}, b"\0" * 4),
        ({VALUES: claim(shape=(2**62, 4), offsets=(0, 4))}, b"\0" * 4),
        ({VALUES: claim(shape=(2,), offsets=(0, 4))}, b"\0" * 4),
        ({VALUES: claim(offsets=(4, 0))}, b"\0" * 4),
        ({VALUES: claim(), INDICES: claim("I32", offsets=(2, 6))}, b"\0" * 6),
        ({VALUES: claim(), INDICES: claim("I32", offsets=(8, 12))}, b"\0" * 12),
        ({VALUES: claim(), INDICES: claim("I32", offsets=(0, 4))}, b"\0" * 4),
        ({VALUES: claim("F31"), INDICES: claim("I32", offsets=(4, 8))}, b"\0" * 8),
        ({VALUES: claim(), INDICES: claim("I32", offsets=(4, 8))}, b"\0" * 12),
    ],
    ids=[
        "header not JSON",
        "header no object",
        "beyond the end",
        "terabytes",
        "a size that overflows",
        "shape and offsets disagree",
        "backward offsets",
        "overlapping",
        "a hole",
        "the same bytes twice",
        "unknown dtype",
        "bytes left over",
    ],
)
def test_a_container_whose_header_is_wrong(tmp_path, header, data):
    path = write(tmp_path / "a", tensors=container(header, data))
    before = peak_memory()
    assert_refused(path, BadContainer, path / WEIGHTS)
    assert peak_memory() - before < 64 * MEBIBYTE


# The tensors


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.layers.1.q.sparse_values",
        f"base_model.model.{TARGET}.sparse_extra",
        f"{TARGET}.sparse_values",
        "base_model.model.score.weight",
        "layers.9.q.sparse_pending",
        "",
    ],
)
def test_a_tensor_that_no_target_has(tmp_path, name):
    path = write(tmp_path / "a", tensors={**good_tensors(), name: torch.ones(1)})
    assert_refused(path, UnknownTensor, path / WEIGHTS, f"{name} belongs to no target")


def test_a_tensor_that_only_looks_like_a_saved_module(tmp_path):
    tensors = {**good_tensors(), "base_model.model.scorer.weight": torch.ones(1)}
    path = write(tmp_path / "a", good_config(modules_to_save=["score"]), tensors)
    assert_refused(path, UnknownTensor, "scorer.weight")


@pytest.mark.parametrize("name", [VALUES, INDICES])
def test_a_tensor_that_is_missing(tmp_path, name):
    tensors = good_tensors()
    del tensors[name]
    path = write(tmp_path / "a", tensors=tensors)
    assert_refused(path, MissingTensor, path / WEIGHTS, TARGET, f"{name} is missing")


def test_a_target_without_tensors(tmp_path):
    config = good_config()
    config["targets"]["layers.1.q"] = {"shape": [ROWS, COLUMNS]}
    assert_refused(write(tmp_path / "a", config), MissingTensor, WEIGHTS, "layers.1.q.sparse_values is missing")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_values_of_a_dtype_that_is_not_allowed(tmp_path, dtype):
    path = write(tmp_path / "a", tensors={**good_tensors(), VALUES: torch.ones(3).to(dtype)})
    assert_refused(path, BadDtype, path / WEIGHTS, f"{TARGET}.sparse_values is", "expected one of F64, F32, F16, BF16")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.int64, "I64"), (torch.float32, "F32"), (torch.int16, "I16"), (torch.uint32, "U32"), (torch.bool, "BOOL")],
)
def test_indices_of_a_dtype_that_is_not_allowed(tmp_path, dtype, name):
    path = write(tmp_path / "a", tensors={**good_tensors(), INDICES: torch.tensor([0, 1, 2]).to(dtype)})
    assert_refused(path, BadDtype, path / WEIGHTS, f"{TARGET}.sparse_indices is {name}; expected I32 for 24 blocks")


def test_int32_indices_where_they_cannot_number_the_blocks(tmp_path):
    path = write(tmp_path / "a", good_config(targets={TARGET: {"shape": [2**20, 2**12]}}))
    assert_refused(path, BadDtype, path / WEIGHTS, f"{TARGET}.sparse_indices is I32; expected I64 for {2**32} blocks")


@pytest.mark.parametrize(
    ("values", "indices"),
    [
        (torch.ones(3), torch.zeros(2)),
        (torch.ones(2), torch.zeros(3)),
        (torch.ones(3, 1), torch.zeros(3)),
        (torch.ones(3), torch.zeros(3, 1)),
        (torch.ones(()), torch.zeros(())),
        (torch.ones(()), torch.zeros(1)),
        (torch.ones(1), torch.zeros(())),
        (torch.ones(3, 2, 1), torch.zeros(3)),
        (torch.ones(3, 1, 1), torch.zeros(3)),
        (torch.ones(3, 0, 0), torch.zeros(3)),
        (torch.ones(3, 2, 2, 1), torch.zeros(3)),
        (torch.ones(2, 2, 2), torch.zeros(3)),
        (torch.ones(3, 1, 5), torch.zeros(3)),
        (torch.ones(3, 1, 4), torch.zeros(3)),
        (torch.ones(3, 6, 1), torch.zeros(3)),
        (torch.ones(3, 1, 3), torch.zeros(3)),
        (torch.ones(3, 4, 6), torch.zeros(3)),
        (torch.ones(2, 1, 6), torch.zeros(3)),
    ],
)
def test_values_and_indices_that_do_not_belong_together(tmp_path, values, indices):
    path = write(tmp_path / "a", tensors={VALUES: values, INDICES: indices.int()})
    assert_refused(path, BadShape, path / WEIGHTS, TARGET, "expected [n], [n, B, B], [n, 1, 6] or [n, 4, 1], and [n]")


def test_more_indices_than_entries(tmp_path):
    path = write(tmp_path / "a", tensors={VALUES: torch.ones(25), INDICES: torch.arange(25).int()})
    assert_refused(path, BadShape, path / WEIGHTS, TARGET, "25 indices, but the target has only 24 blocks")


@pytest.mark.parametrize(("block", "blocks"), [((2, 2), 6), ((1, 6), 4), ((4, 1), 6)], ids=["tiles", "rows", "columns"])
def test_more_indices_than_blocks(tmp_path, block, blocks):
    tensors = {VALUES: torch.ones(blocks + 1, *block), INDICES: torch.arange(blocks + 1).int()}
    path = write(tmp_path / "a", tensors=tensors)
    assert_refused(path, BadShape, path / WEIGHTS, TARGET, f"{blocks + 1} indices, but the target has only {blocks} blocks")


@pytest.mark.parametrize("block_size", [3, 4, 5, 16])
def test_tiles_that_do_not_divide_the_target(tmp_path, block_size):
    tensors = {VALUES: torch.ones(1, block_size, block_size), INDICES: torch.zeros(1).int()}
    path = write(tmp_path / "a", tensors=tensors)
    message = f"tiles of {block_size}×{block_size} do not divide a target of 4×6"
    assert_refused(path, BadShape, path / WEIGHTS, TARGET, message)


@pytest.mark.parametrize("index", [-1, -(2**31), 24, 2**31 - 1])
def test_an_index_outside_the_target(tmp_path, index):
    indices = torch.tensor(sorted([1, 5, index]), dtype=torch.int32)
    path = write(tmp_path / "a", tensors={**good_tensors(), INDICES: indices})
    assert_refused(
        path, IndexOutOfBounds, path / WEIGHTS, TARGET, f"index {index} lies outside the target, which has 24 blocks"
    )


@pytest.mark.parametrize("index", [-1, 6])
def test_a_tile_outside_the_target(tmp_path, index):
    tensors = {VALUES: torch.ones(1, 2, 2), INDICES: torch.tensor([index], dtype=torch.int32)}
    path = write(tmp_path / "a", tensors=tensors)
    assert_refused(path, IndexOutOfBounds, path / WEIGHTS, TARGET, f"index {index} lies outside the target, which has 6 blocks")


def test_indices_that_do_not_ascend(tmp_path):
    path = write(tmp_path / "a", tensors={**good_tensors(), INDICES: torch.tensor([1, 9, 5], dtype=torch.int32)})
    assert_refused(path, UnsortedIndices, path / WEIGHTS, TARGET, "position 1 holds 9 and position 2 5")


def test_an_index_that_occurs_twice(tmp_path):
    path = write(tmp_path / "a", tensors={**good_tensors(), INDICES: torch.tensor([1, 5, 5], dtype=torch.int32)})
    assert_refused(path, DuplicateIndex, path / WEIGHTS, TARGET, "index 5 occurs twice")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_not_finite(tmp_path, wrong, dtype):
    path = write(tmp_path / "a", tensors={**good_tensors(), VALUES: torch.tensor([0.5, wrong, 1.0]).to(dtype)})
    assert_refused(path, NonFiniteValue, path / WEIGHTS, TARGET, "1 of 3 values are NaN or infinite")


# Anything else


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from([CONFIG, WEIGHTS]), st.floats(0, 1, exclude_max=True), st.binary(max_size=4), st.integers(0, 4))
def test_a_spoilt_file_loads_or_is_refused_by_name(tmp_path_factory, name, where, inserted, removed):
    path = write(tmp_path_factory.getbasetemp() / "spoilt")
    raw = (path / name).read_bytes()
    at = int(where * len(raw))
    (path / name).write_bytes(raw[:at] + inserted + raw[at + removed :])
    with contextlib.suppress(FormatError):
        SparseAdapter.load(path)


# Sizes


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_the_largest_shape_is_opened_without_memory_being_taken(tmp_path):
    tensors = {VALUES: torch.ones(1), INDICES: torch.tensor([2**37 - 1])}
    path = write(tmp_path / "a", good_config(targets={TARGET: {"shape": [2**25, 2**12]}}), tensors)
    before = peak_memory()
    assert AdapterFile(path)[TARGET].indices.tolist() == [2**37 - 1]
    assert peak_memory() - before < 64 * MEBIBYTE


def test_nothing_is_read_of_a_large_tensor_that_is_wrong(tmp_path):
    entries = 2**28
    header = {INDICES: claim("I32", (entries,), (0, 4 * entries)), VALUES: claim("F32", (entries,), (4 * entries, 8 * entries))}
    raw = container(header, b"")
    path = write(tmp_path / "a", tensors=raw)
    os.truncate(path / WEIGHTS, len(raw) + 8 * entries)  # sparse: takes no room on the disk
    before = peak_memory()
    assert_refused(path, BadShape, path / WEIGHTS, f"{entries} indices, but the target has only 24 blocks")
    assert peak_memory() - before < 64 * MEBIBYTE
