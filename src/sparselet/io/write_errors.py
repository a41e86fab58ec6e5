"""Errors of writing, all as `WriteFailed`, which names the output and the system's reason."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sparselet.errors import SparseletError, WriteFailed


@contextlib.contextmanager
def convert_write_errors(path: str | Path, outcome: str = "Nothing was changed.") -> Iterator[None]:
    """Raise WriteFailed, naming `path`, for an error of writing in the block. outcome: the end of the message.

    torch, safetensors and tokenizers have errors of their own, some of which only say that writing failed.
    """
    try:
        yield
    except SparseletError:
        raise
    except OSError as error:
        raise WriteFailed(_message(path, error.strerror or str(error), outcome)) from error
    except Exception as error:
        cause = _write_failure(error, Path(path))
        if cause is None:
            raise
        raise WriteFailed(_message(path, cause, outcome)) from error


def _message(path: str | Path, cause: str, outcome: str) -> str:
    hint = " Make room on the disk, and run again." if cause in map(os.strerror, (errno.ENOSPC, errno.EDQUOT)) else ""
    return f"cannot write {path}: {cause}. {outcome}{hint}"


def _write_failure(error: BaseException, path: Path) -> str | None:
    """Why an error other than OSError means that a file could not be written; None if it means something else."""
    code = re.search(r"\(os error (\d+)\)", str(error))  # Rust's text, in safetensors and tokenizers
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error.__cause__, OSError):
        return error.__cause__.strerror or str(error.__cause__)
    if not isinstance(error, RuntimeError):  # torch's
        return None
    parent = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if shutil.disk_usage(parent).free < 2**16:  # torch stops with a part of a buffer unwritten
        return os.strerror(errno.ENOSPC)
    by_torch = re.search("PytorchStreamWriter|inline_container|iostream error", str(error))
    return "the file system takes no more" if by_torch else None
