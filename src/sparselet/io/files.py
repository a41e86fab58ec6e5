"""Writing files whole or not at all, and naming them safely.

Every write goes to a temporary name in the same directory (`sparselet.io.temporaries`), is flushed to the disk, and is renamed
over the final name then, so that a reader sees the old file or the new one and never a part. `check_output` judges, before the
work, whether that will be possible.
"""

import contextlib
import errno
import filecmp
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sparselet.errors import (
    AbsurdShape,
    BadConfig,
    MissingFile,
    NonFiniteValue,
    OutputExists,
    SparseletError,
    UnsafePath,
    WriteFailed,
)
from sparselet.io.printable import reason
from sparselet.io.temporaries import exchange, is_temporary, name_limit, remove_left, temporary_directory, temporary_file

_MAX_JSON_BYTES = 64 * 2**20
_LONGEST_PATH = 4095  # bytes of a path, Linux's
_ROOM_INSIDE = 160  # bytes for the longest name of a file in an output, in its temporary directory


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under `path` only when the block ends without an error.

    Raises WriteFailed (disk full, no permission); the temporary file is removed then.
    """
    path = Path(path)
    with naming_failure(path), parents_of(path), temporary_file(path) as temporary:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_directory(path.parent)


@contextlib.contextmanager
def atomic_directory(path: str | Path, keep_equal: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends without an error, and vanishes otherwise.

    Within another `atomic_directory` it is that one's, which is not there before its end.

    keep_equal: a directory that is there may hold the very same files, and then stays as it is.
    Raises what `check_output` raises, WriteFailed if it cannot be written.
    """
    place = Path(os.path.realpath(path)) if os.path.isdir(path) else Path(path)
    if is_temporary(place):
        with naming_failure(path):
            yield Path(path)
        return
    there = keep_equal and os.path.isdir(path) and bool(os.listdir(path))
    if not there:
        check_output(path)
    place = Path(os.path.realpath(path))
    with _written_beside(path, place) as temporary:
        with utf8_path(temporary) as name:
            yield name
        _settle(temporary)
        if there:
            if not _same_files(temporary, place):
                raise OutputExists(
                    f"{path} exists already and holds something else. Choose another output, or remove it first."
                )
        else:
            os.replace(temporary, place)
            _sync_directory(place.parent)


@contextlib.contextmanager
def replaced_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory with all that the directory `path` holds, which takes its place when the block ends.

    The files are links to those in `path`: replace them, do not write into them. After an error, or a kill at any moment,
    `path` is as it was; on success it is the new directory, at once. Raises WriteFailed, at once where `path` is a mount
    point, or has one in it, or is the working directory, which cannot be replaced.
    """
    place = Path(os.path.realpath(path))
    with naming_failure(path):
        _refuse_fixed(path, place)
        if any(point.is_relative_to(place) for point in _mount_points()):
            raise WriteFailed(f"cannot write {path}: a file system is mounted in it. Choose another directory.")
    with _written_beside(path, place) as temporary:
        shutil.copytree(place, temporary, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        yield temporary
        _sync_directory(temporary)
        exchange(temporary, place)
        _sync_directory(place.parent)


@contextlib.contextmanager
def naming_failure(path: str | Path, left: str = "Nothing was changed.") -> Iterator[None]:
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


@contextlib.contextmanager
def utf8_path(directory: Path) -> Iterator[Path]:
    """A name in UTF-8 of a directory that is there, since safetensors and tokenizers take no other."""
    text = str(directory)
    if text == text.encode(errors="replace").decode():
        yield directory
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Make the directories above `path`; those made here are removed again after an error, if nothing is in them."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


def check_output(path: str | Path, directory: bool = True) -> None:
    """Judge, before any work is done, whether an output can be written when it is done.

    directory: whether it will be a directory, which may be there if it is empty; a file must not be there.

    Raises OutputExists for what is there already, and WriteFailed where the system will not let it be written: a name that is
    too long, a parent that is a file or cannot be written to, a mount point or the working directory, which cannot be
    replaced. Temporaries of this output that killed processes left are removed.
    """
    path = Path(path)
    try:
        place = Path(os.path.realpath(path))
    except ValueError as error:  # of names that no system has
        raise WriteFailed(f"cannot write {path}: {error}. Choose another output.") from error
    if is_temporary(place):  # the output around it was judged
        return
    with naming_failure(path):
        remove_left(place)
        _refuse_existing(path, place, directory)
        _refuse_long(place)
        parent = next(parent for parent in place.parents if parent.exists())
        with temporary_directory(parent / place.name):  # no other way tells for sure that it may be written
            pass


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as `json_bytes`, atomically."""
    with atomic_write(path) as file:
        file.write(json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """`content` as indented JSON with sorted keys. The same content gives the same bytes.

    Halves of surrogate pairs, which paths that are not UTF-8 have, are written as JSON's escapes. Raises NonFiniteValue,
    naming the field, for NaN and infinity, which JSON has no words for.
    """
    try:
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        field = next(_not_finite(content), None)
        if field is None:
            raise
        raise NonFiniteValue(f"{field} is NaN or infinite, which cannot be written as JSON.") from error
    return text.encode(errors="backslashreplace")


def _not_finite(content: Any, field: str = "") -> Iterator[str]:
    """The fields that hold NaN or infinity, by their keys joined by dots."""
    if isinstance(content, float) and not math.isfinite(content):
        yield field
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, (list, tuple)) else ()
    for key, value in parts:
        yield from _not_finite(value, f"{field}.{key}" if field else str(key))


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


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises MissingFile, AbsurdShape, BadConfig."""
    if not file.is_file():
        raise MissingFile(f"{file} is missing.")
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise AbsurdShape(f"{file} has {file.stat().st_size} bytes; the limit is {_MAX_JSON_BYTES}.")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{file} is not JSON: {reason(error)}") from error
    if not isinstance(content, dict):
        raise BadConfig(f"{file}: expected an object, got {type(content).__name__}.")
    return content


def check_inside(directory: Path, name: str) -> Path:
    """The path of the file `name` in `directory`, once it is known to lie there.

    A symbolic link may stay in the directory, or lead from a snapshot of the hub library's cache to a blob of the same
    repository. Raises UnsafePath for all others, and for a name with path parts.
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
        place, directory = link.resolve(strict=True), directory.resolve()
    except (OSError, RuntimeError):  # it leads nowhere, or round in a circle
        return False
    # `models--org--name` holds `snapshots/COMMIT`, of links, and `blobs`.
    snapshots = [parent.parent for parent in (directory, *directory.parents) if parent.parent.name == "snapshots"]
    blobs = [path.parent / "blobs" for path in snapshots if path.parent.name.startswith("models--")]
    return any(place.is_relative_to(inside) for inside in (directory, *blobs))


@contextlib.contextmanager
def _written_beside(path: str | Path, place: Path) -> Iterator[Path]:
    """A temporary directory beside `place`; failures of what is written into it name `path`."""
    temporary = None
    try:
        with naming_failure(path), parents_of(place), temporary_directory(place) as temporary:
            yield temporary
    except WriteFailed as error:
        if temporary is None:
            raise
        text = re.sub(r"/proc/self/fd/\d+", lambda _: str(path), str(error))  # of `utf8_path`
        raise WriteFailed(text.replace(str(temporary), str(path))) from error.__cause__


def _settle(directory: Path) -> None:
    """Modes as the umask says, since libraries write some files for the owner alone; and all of it on the disk."""
    for file in directory.rglob("*"):
        os.chmod(file, (0o777 if file.is_dir() else 0o666) & ~_umask())
    os.chmod(directory, 0o777 & ~_umask())
    flush(directory)


def _same_files(one: Path, other: Path) -> bool:
    """Whether two directories hold the same files with the same bytes."""
    files = [sorted(file.relative_to(place) for file in place.rglob("*") if file.is_file()) for place in (one, other)]
    return files[0] == files[1] and len(filecmp.cmpfiles(one, other, files[0], shallow=False)[0]) == len(files[0])


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # not all file systems have links
        shutil.copy2(source, target, follow_symlinks=False)


def _refuse_existing(path: Path, place: Path, directory: bool) -> None:
    """Raise OutputExists unless `path` is free, or an empty directory that can be replaced where a directory will be."""
    try:
        is_empty = stat.S_ISDIR(os.stat(path).st_mode) and not os.listdir(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise OutputExists(f"{path} is a symbolic link that leads nowhere. Choose another output.") from None
        return
    if not directory or not is_empty:
        raise OutputExists(f"{path} exists already. Choose another output, or remove it first.")
    _refuse_fixed(path, place)


def _refuse_fixed(path: str | Path, place: Path) -> None:
    """Raise WriteFailed for a directory that no other can take the place of."""
    if os.path.ismount(place) or place in _mount_points():
        raise WriteFailed(f"cannot write {path}: it is a mount point, which cannot be replaced. Name a directory in it.")
    if os.path.samefile(place, os.curdir):
        raise WriteFailed(
            f"cannot write {path}: it is the working directory, which cannot be replaced. Name a directory in it."
        )


def _refuse_long(place: Path) -> None:
    """Raise OSError for a name, or a path with what will lie in it, that is longer than the system allows."""
    missing = [part.name for part in (place, *place.parents) if not part.exists()]
    limit = name_limit(place.parent)
    if any(len(os.fsencode(name)) > limit for name in missing) or len(os.fsencode(place)) > _LONGEST_PATH - _ROOM_INSIDE:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def _mount_points() -> set[Path]:
    """Where file systems are mounted, as Linux tells; `os.path.ismount` does not see a directory bound to another place."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return set()
    names = (re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), line.split(b" ")[4]) for line in lines)
    return {Path(os.fsdecode(name)) for name in names}


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
