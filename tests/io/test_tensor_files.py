"""Safetensors files tensor by tensor, against the safetensors library."""

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from sparselet.errors import BadContainer, BadDtype, MissingFile
from sparselet.io.tensor_files import SAFETENSORS_DTYPES, TensorFile, TensorStream

SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 0, 4), (2, 3, 4)]


def random_tensor(dtype, shape):
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
    return bits.view(dtype).view(shape)


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values(), ids=str)
def test_what_the_library_wrote_is_read_to_the_bit(tmp_path, dtype):
    tensors = {f"t{i}": random_tensor(dtype, shape) for i, shape in enumerate(SHAPES)}
    save_file({**tensors, "odd": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "a", {"note": "1"})
    file = TensorFile(tmp_path / "a")
    assert file.notes == {"note": "1"}
    assert file.shapes == {**{name: tuple(t.shape) for name, t in tensors.items()}, "odd": (3,)}
    for name, tensor in load_file(tmp_path / "a").items():
        read = file.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        assert SAFETENSORS_DTYPES[file.dtypes[name]] == read.dtype


def test_the_library_reads_what_was_streamed(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(4, dtype=torch.int32), "c": torch.zeros(0)}
    with (tmp_path / "a").open("wb") as file, TensorStream(file, [*tensors, "absent"], {"note": "1"}) as stream:
        for name, tensor in tensors.items():
            stream.add(name, tensor)
    loaded = load_file(tmp_path / "a")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(tmp_path / "a", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "1"}


def test_what_cannot_be_streamed_is_refused(tmp_path):
    with (tmp_path / "a").open("wb") as file, TensorStream(file, ["a"]) as stream, pytest.raises(BadDtype, match="a: only"):
        stream.add("a", torch.zeros(1, dtype=torch.float64))


def test_what_is_read_is_not_the_file(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "a")
    file = TensorFile(tmp_path / "a")
    file.read("a").fill_(1)
    assert not file.read("a").any()


def test_a_dtype_that_torch_lacks_is_named(tmp_path):
    header = b'{"a":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(BadDtype, match="a is F8_E8M0; expected one of BOOL, "):
        TensorFile(tmp_path / "a").read("a")


def test_files_that_are_not_there_or_not_whole_are_refused(tmp_path):
    with pytest.raises(MissingFile, match="a is missing"):
        TensorFile(tmp_path / "a")
    save_file({"a": torch.zeros(4)}, tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(BadContainer, match="is not a whole safetensors file"):
        TensorFile(tmp_path / "a")
