"""Safetensors files tensor by tensor, so that no more than one is in memory: `TensorFile` reads, `TensorStream` writes.

The safetensors library writes only what it is given whole. The layout is that of its specification: 8 bytes of
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

_NAMES = {torch.float32: "F32", torch.int32: "I32"}
DTYPES = {
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
_ROOM = 120  # bytes of header a tensor takes beside its name: dtype, up to three sides, two offsets


class TensorStream:
    """Append float32 and int32 tensors to `file`; the header is filled in when the block ends.

    names: every tensor that may be added, so that room for the header is kept; fewer may be added, in any order.
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
        if tensor.dtype not in _NAMES:
            raise BadDtype(f"{name}: only float32 and int32 can be streamed, got {tensor.dtype}.")
        data = tensor.detach().cpu().contiguous().numpy()
        self._file.write(data.astype(data.dtype.newbyteorder("<"), copy=False).data if data.size else b"")
        end = self._position + data.nbytes
        self._header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._position, end],
        }
        self._position = end

    def __enter__(self) -> "TensorStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            return
        header = json.dumps(self._header, separators=(",", ":")).encode().ljust(self._room)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.seek(0, 2)


class TensorFile:
    """A safetensors file: shapes and dtypes from its header, its tensors when asked for.

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
        """A tensor, read into memory of its own. Threads may read one file at the same time.

        The file is open only meanwhile, so that there may be more files than a process may have open.
        Raises BadDtype, MissingFile, BadContainer (the file was replaced or cut short after its header was read).
        """
        if self.dtypes[name] not in DTYPES:
            raise BadDtype(f"{self.path}: {name} is {self.dtypes[name]}; expected one of {', '.join(DTYPES)}.")
        begin, end = self._offsets[name]
        data = torch.empty(end - begin, dtype=torch.uint8)
        self._fill(data.numpy().data, self._start + begin)
        return data.view(DTYPES[self.dtypes[name]]).view(self.shapes[name])

    def _fill(self, view: memoryview, position: int) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise MissingFile(f"{self.path} cannot be read any more: {error.strerror}.") from error
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
    """A name in UTF-8 of a file that is open."""
    text = str(path)
    return text if text == text.encode(errors="replace").decode() else f"/dev/fd/{descriptor}"
