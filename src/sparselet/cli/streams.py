"""Standard output and error that never end the program: what cannot be shown is lost, and the work that was done stays."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Lenient:
    """A text stream whose writes do not fail. After the first failure nothing more is written.

    failure: what went wrong first, such as a pipe that nobody reads any more, or a full disk.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        """Write as the stream does, as long as that works."""
        if self.failure is None:
            try:
                return self._stream.write(text)
            except (OSError, ValueError) as error:  # ValueError: it is closed
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush as the stream does, as long as that works."""
        if self.failure is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.failure = error
        with contextlib.suppress(OSError, ValueError):  # or Python would try again to write what is left, when it exits
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lenient_streams() -> Iterator[None]:
    """Within the block, printing never fails: characters that an encoding lacks are written as escapes.

    Afterwards the streams are what they were.
    """
    before = sys.stdout, sys.stderr
    handlers = [getattr(stream, "errors", None) for stream in before]
    try:
        for stream in before:
            _on_unknown(stream, "backslashreplace")
        sys.stdout, sys.stderr = (stream if stream is None else Lenient(stream) for stream in before)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
        for stream, errors in zip(before, handlers, strict=True):
            _on_unknown(stream, errors)


def _on_unknown(stream: Any, errors: str | None) -> None:
    """What a stream does with characters that its encoding lacks."""
    if errors is not None and hasattr(stream, "reconfigure"):
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(errors=errors)
