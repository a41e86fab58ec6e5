"""Standard output and error whose failures never end the program: text that cannot be shown is lost, results are kept."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class LenientStream:
    """A text stream whose writes never raise. After the first failure nothing is written.

    failure: the first error, such as that of a pipe without a reader, or of a full disk.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        """Write to the stream unless it has failed."""
        if self.failure is None:
            try:
                return self._stream.write(text)
            except (OSError, ValueError) as error:  # ValueError: it is closed
                self._stop_writing(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream unless it has failed."""
        if self.failure is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._stop_writing(error)

    def _stop_writing(self, error: Exception) -> None:
        self.failure = error
        with contextlib.suppress(OSError, ValueError):  # or Python writes the buffer again when it exits
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lenient_streams() -> Iterator[None]:
    """Within the block, printing never fails: characters that an encoding lacks are written as escapes.

    The streams are restored afterwards.
    """
    before = sys.stdout, sys.stderr
    handlers = [stream.errors if isinstance(stream, io.TextIOWrapper) else None for stream in before]
    try:
        for stream in before:
            _set_error_handler(stream, "backslashreplace")
        sys.stdout, sys.stderr = (stream if stream is None else LenientStream(stream) for stream in before)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
        for stream, errors in zip(before, handlers, strict=True):
            _set_error_handler(stream, errors)


def _set_error_handler(stream: Any, errors: str | None) -> None:
    """Set what a stream writes for characters that its encoding lacks, if it is one that can be set."""
    if errors is not None and isinstance(stream, io.TextIOWrapper):
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(errors=errors)
