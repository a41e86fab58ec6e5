"""Writing a safetensors file tensor by tensor, so that no more than one tensor is in memory.

The safetensors library writes only what it is given whole. The layout is that of its specification: 8 bytes of
little-endian header length, a JSON header (padded with spaces), then the tensors' bytes without holes.
"""

import json
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from sparselet.errors import BadDtype

_NAMES = {torch.float32: "F32", torch.int32: "I32"}
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
