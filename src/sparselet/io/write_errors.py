"""Failures of writing, as one kind of error: `WriteFailed`, which names the output and the system's reason."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sparselet.errors import SparseletError, WriteFailed


@contextlib.contextmanager
def convert_write_errors(path: str | Path, left: str = "Nothing was changed.") -> Iterator[None]:
    """Raise WriteFailed, naming `path`, for what the block raises when it cannot write; `left` ends the message.

    torch, safetensors and tokenizers have errors of their own, of which some say only that writing failed.
    """
    try:
        yield
    except SparseletError:
        raise
    except OSError as error:
        raise WriteFailed(_cannot_write(path, error.strerror or str(error), left)) from error
    except Exception as error:
        reason = _failed_write(error, Path(path))
        if reason is None:
            raise
        raise WriteFailed(_cannot_write(path, reason, left)) from error


def _cannot_write(path: str | Path, reason: str, left: str) -> str:
    hint = " Make room on the disk, and run again." if reason in map(os.strerror, (errno.ENOSPC, errno.EDQUOT)) else ""
    return f"cannot write {path}: {reason}. {left}{hint}"


def _failed_write(error: BaseException, path: Path) -> str | None:
    """Why an error that is no OSError means that a file could not be written; None if it does not."""
    code = re.search(r"\(os error (\d+)\)", str(error))  # as Rust says it, in safetensors and tokenizers
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error.__cause__, OSError):
        return error.__cause__.strerror or str(error.__cause__)
    if not isinstance(error, RuntimeError):  # which is torch's
        return None
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if shutil.disk_usage(there).free < 2**16:  # torch gives up with a part of a buffer unwritten
        return os.strerror(errno.ENOSPC)
    return (
        "the file system takes no more"
        if re.search("PytorchStreamWriter|inline_container|iostream error", str(error))
        else None
    )
