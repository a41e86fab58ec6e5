"""Safetensors files tensor by tensor, so that no more than one is in memory: `TensorFile` reads, `TensorStream` writes.

The safetensors library writes only what it is given whole. The layout is that of its specification: 8 bytes of
little-endian header length, a JSON header (padded with spaces), then the tensors' bytes without holes.
"""

import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

import safetensors
import torch
from torch import Tensor

from sparselet.errors import BadContainer, BadDtype, MissingFile

_NAMES = {torch.float32: "F32", torch.int32: "I32"}
MAPPED = 4 * 2**20  # bytes of a file that stay mapped, and so resident, after they were read
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
        self._lock = threading.Lock()
        self._open()
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 - not a mapping
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(part.get_shape()) for name, part in slices.items()}
        self.dtypes: dict[str, str] = {name: part.get_dtype() for name, part in slices.items()}
        self.notes: dict[str, str] = dict(self._file.metadata() or {})

    def read(self, name: str) -> Tensor:
        """A tensor, mapped into memory; not to be written to. What was mapped is let go by and by."""
        with self._lock:  # threads read targets of one file at the same time
            if self._mapped > MAPPED:
                self._open()
            tensor = self._file.get_tensor(name)
            self._mapped += tensor.nbytes
            return tensor

    def _open(self) -> None:
        try:
            self._file = safetensors.safe_open(self.path, framework="pt")
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise BadContainer(f"{self.path} is not a whole safetensors file: {error}") from error
        self._mapped = 0
