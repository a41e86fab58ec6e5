"""Writing files whole or not at all, and naming them safely.

Every write goes to a temporary name in the same directory, is flushed to the disk, and is then renamed over the final
name, so that a reader sees the old file or the new one and never a part.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from sparselet.errors import AbsurdShape, BadConfig, ConfigError, MissingFile, OutputExists, UnsafePath, WriteFailed

_MAX_JSON_BYTES = 64 * 2**20


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under `path` only when the block ends without an error.

    Raises WriteFailed (disk full, no permission); the temporary file is removed then.
    """
    path = Path(path)
    temporary = None
    try:
        with naming_failure(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            temporary = None
            _sync_directory(path.parent)
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends without an error, and vanishes otherwise.

    Raises OutputExists if `path` is there and not an empty directory, WriteFailed if it cannot be written.
    """
    path = Path(path)
    refuse_existing(path)
    temporary: Path | None = None
    try:
        with naming_failure(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
            yield temporary
            for file in temporary.rglob("*"):  # libraries write some files for the owner alone
                os.chmod(file, (0o777 if file.is_dir() else 0o666) & ~_umask())
            os.chmod(temporary, 0o777 & ~_umask())
            _sync_directory(temporary)
            os.replace(temporary, path)
            temporary = None
            _sync_directory(path.parent)
    except WriteFailed as error:  # of a file in it, which is not known by the temporary name
        raise WriteFailed(str(error).replace(str(temporary), str(path))) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def naming_failure(path: str | Path, left: str = "Nothing was changed.") -> Iterator[None]:
    """Raise WriteFailed, naming `path`, for what the block raises when it cannot write; `left` ends the message.

    torch and safetensors have errors of their own, which do not say that the disk is full; it is looked at then.
    """
    try:
        yield
    except OSError as error:
        raise WriteFailed(f"cannot write {path}: {error.strerror or error}. {left}") from error
    except (RuntimeError, SafetensorError) as error:
        if not _is_full(Path(path)):
            raise
        raise WriteFailed(f"cannot write {path}: {os.strerror(errno.ENOSPC)}. {left}") from error


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as `json_bytes`, atomically."""
    with atomic_write(path) as file:
        file.write(json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """`content` as indented JSON with sorted keys. The same content gives the same bytes.

    Halves of surrogate pairs, which paths that are not UTF-8 have, are written as JSON's escapes.
    """
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically; halves of surrogate pairs as escapes."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def flush(directory: Path) -> None:
    """Have the disk hold all files in a directory, and their names, before anything is written that relies on them."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _sync_directory(path)
    _sync_directory(directory)


def read_toml(file: Path) -> dict[str, Any]:
    """What a TOML file holds. Raises ConfigError."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises MissingFile, AbsurdShape, BadConfig."""
    if not file.is_file():
        raise MissingFile(f"{file} is missing.")
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise AbsurdShape(f"{file} has {file.stat().st_size} bytes; the limit is {_MAX_JSON_BYTES}.")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadConfig(f"{file}: expected an object, got {type(content).__name__}.")
    return content


def refuse_existing(path: str | Path) -> None:
    """Raise OutputExists unless `path` is free or an empty directory."""
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise OutputExists(f"{path} exists already. Choose another output, or remove it first.")


def check_inside(directory: Path, name: str) -> Path:
    """The path of the file `name` in `directory`, once it is known to lie there.

    Raises UnsafePath for a name with path parts or a symbolic link that leaves the directory.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UnsafePath(f"{name!r} is not a plain file name; path parts are not allowed.")
    path = directory / name
    if path.is_symlink() and not _stays_inside(path, directory):
        raise UnsafePath(f"{path} is a symbolic link that leaves its directory or leads nowhere. Copy the file itself there.")
    return path


def cache_directory() -> Path:
    """Where converted models are kept: $SPARSELET_CACHE, or `sparselet` in the user's cache directory."""
    if os.environ.get("SPARSELET_CACHE"):
        return Path(os.environ["SPARSELET_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparselet"


def _stays_inside(link: Path, directory: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(directory.resolve())
    except (OSError, RuntimeError):  # it leads nowhere, or round in a circle
        return False


def _is_full(path: Path) -> bool:
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free < 2**16  # torch gives up with a part of a buffer unwritten


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
