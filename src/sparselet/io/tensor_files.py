"""Safetensors files read (`TensorFile`) and written (`TensorStream`) tensor by tensor: at most one is in memory.

The safetensors library writes only complete sets of tensors. The layout is that of its specification: 8 bytes of
little-endian header length, a JSON header (padded with spaces), then the tensors' bytes without holes.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

import safetensors
import torch
from torch import Tensor

from sparselet.errors import BadContainer, BadDtype, MissingFile
from sparselet.io.printable import reason

_STREAMED = {torch.float32: "F32", torch.int32: "I32"}
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
_ROOM = 120  # bytes of header per tensor beside its name: dtype, up to three sides, two offsets


class TensorStream:
    """Append float32 and int32 tensors to `file`; the header is filled in when the block ends.

    names: every tensor that may be added, which sets the header's size; any may be left out, in any order.
    notes: strings to keep in the header beside the tensors.
    """

    def __init__(self, file: IO[bytes], names: Iterable[str], notes: Mapping[str, str] | None = None) -> None:
        self._file = file
        room = sum(len(json.dumps(name)) + _ROOM for name in names) + 64 + (len(json.dumps(notes)) if notes else 0)
        self._room = -(-(room + 8) // 8) * 8 - 8  # the data then starts at a multiple of 8 bytes
        self._header: dict[str, object] = {"__metadata__": {"format": "pt", **(notes or {})}}
        self._position = 0
        file.write(b"\0" * (8 + self._room))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. Raises BadDtype for any dtype but float32 and int32, which alone keep all offsets aligned."""
        if tensor.dtype not in _STREAMED:
            raise BadDtype(f"{name}: only float32 and int32 can be streamed, got {tensor.dtype}.")
        data = tensor.detach().cpu().contiguous().numpy()
        self._file.write(data.astype(data.dtype.newbyteorder("<"), copy=False).data if data.size else b"")
        end = self._position + data.nbytes
        self._header[name] = {
            "dtype": _STREAMED[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._position, end],
        }
        self._position = end

    def __enter__(self) -> "TensorStream":
        return self

    def __exit__(self, cls: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if cls is not None:
            return
        header = json.dumps(self._header, separators=(",", ":")).encode().ljust(self._room)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.seek(0, 2)


class TensorFile:
    """A safetensors file: shapes and dtypes from its header; `read` returns a tensor.

    shapes, dtypes: by tensor name. notes: the strings that the header holds beside the tensors.
    Raises MissingFile, BadContainer.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise MissingFile(f"{path} is missing.")
        self.path = path
        try:
            # The library checks the header and the size. It takes no path that is not UTF-8.
            with path.open("rb") as file, safetensors.safe_open(_utf8_path(path, file.fileno()), framework="pt"):
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
                self._inode = os.fstat(file.fileno()).st_ino
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise BadContainer(f"{path} is not a whole safetensors file: {reason(error)}") from error
        self.notes: dict[str, str] = header.pop("__metadata__", None) or {}
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self.dtypes: dict[str, str] = {name: entry["dtype"] for name, entry in header.items()}
        self._start = 8 + size
        self._offsets: dict[str, tuple[int, int]] = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own. Several threads may read one file at the same time.

        The file is open only during the call, so that a process can use more files than it may have open.
        Raises BadDtype, MissingFile, BadContainer (the file was replaced or cut short after its header was read).
        """
        if self.dtypes[name] not in SAFETENSORS_DTYPES:
            raise BadDtype(f"{self.path}: {name} is {self.dtypes[name]}; expected one of {', '.join(SAFETENSORS_DTYPES)}.")
        begin, end = self._offsets[name]
        data = torch.empty(end - begin, dtype=torch.uint8)
        self._fill(data.numpy().data, self._start + begin)
        return data.view(SAFETENSORS_DTYPES[self.dtypes[name]]).view(self.shapes[name])

    def _fill(self, view: memoryview, position: int) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise MissingFile(f"{self.path} can no longer be read: {error.strerror}.") from error
        try:
            same = os.fstat(descriptor).st_ino == self._inode
            while same and view:  # a call reads at most 2 GiB
                count = os.preadv(descriptor, [view], position)
                same = count > 0
                view, position = view[count:], position + count
        finally:
            os.close(descriptor)
        if not same:
            raise BadContainer(f"{self.path} was replaced or cut short while it was read.")


def _utf8_path(path: Path, descriptor: int) -> str:
    """A UTF-8 name of an open file."""
    text = str(path)
    return text if text == text.encode(errors="replace").decode() else f"/dev/fd/{descriptor}"
