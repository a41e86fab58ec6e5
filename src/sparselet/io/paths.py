"""Paths, checked before they are used: whether an output can be written, and whether a file lies in its directory."""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from sparselet.errors import OutputExists, UnsafePath, WriteFailed
from sparselet.io.temporaries import is_temporary, name_limit, remove_left, temporary_directory
from sparselet.io.write_errors import convert_write_errors

_LONGEST_PATH = 4095  # bytes of a path, Linux's
_ROOM_INSIDE = 160  # bytes for the longest name of a file in an output, in its temporary directory


def check_output(path: str | Path, directory: bool = True) -> None:
    """Check, before any work is done, that an output can be written afterwards.

    directory: whether it will be a directory, which may exist if it is empty; a file must not exist.

    Raises OutputExists for an output that exists already, and WriteFailed where the system does not allow writing it: a name
    that is too long, a parent that is a file or cannot be written to, a mount point or the working directory, which cannot be
    replaced. Temporaries of this output that killed processes left are removed.
    """
    path = Path(path)
    try:
        place = Path(os.path.realpath(path))
    except ValueError as error:  # a name that no system allows
        raise WriteFailed(f"cannot write {path}: {error}. Choose another output.") from error
    if is_temporary(place):  # the output around it was checked
        return
    with convert_write_errors(path):
        remove_left(place)
        _refuse_existing(path, place, directory)
        _refuse_long(place)
        parent = next(parent for parent in place.parents if parent.exists())
        with temporary_directory(parent / place.name):  # the only sure check that it may be written
            pass


def refuse_fixed(path: str | Path, place: Path) -> None:
    """Raise WriteFailed for a directory that cannot be replaced by another one."""
    if os.path.ismount(place) or place in mount_points():
        raise WriteFailed(f"cannot write {path}: it is a mount point, which cannot be replaced. Name a directory in it.")
    if os.path.samefile(place, os.curdir):
        raise WriteFailed(
            f"cannot write {path}: it is the working directory, which cannot be replaced. Name a directory in it."
        )


def mount_points() -> set[Path]:
    """Where file systems are mounted, on Linux; `os.path.ismount` misses directories that are bound to another path."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return set()
    names = (re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), line.split(b" ")[4]) for line in lines)
    return {Path(os.fsdecode(name)) for name in names}


def check_inside(directory: Path, name: str) -> Path:
    """The path of the file `name` in `directory`.

    A symbolic link may stay in the directory, or lead from a snapshot of the hub library's cache to a blob of the same
    repository. Raises UnsafePath for every other link, and for a name with path parts.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UnsafePath(f"{name!r} is not a plain file name; path parts are not allowed.")
    path = directory / name
    if path.is_symlink() and not _stays_inside(path, directory):
        raise UnsafePath(f"{path} is a symbolic link that leaves its directory or leads nowhere. Copy the file itself there.")
    return path


def cache_directory() -> Path:
    """The directory of converted models and locks: $SPARSELET_CACHE, or `sparselet` in the user's cache directory."""
    own = os.environ.get("SPARSELET_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparselet"


@contextlib.contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Create the missing directories above `path`; after an error they are removed again if they are empty."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


@contextlib.contextmanager
def utf8_path(directory: Path) -> Iterator[Path]:
    """A UTF-8 name of an existing directory, since safetensors and tokenizers take no other."""
    text = str(directory)
    if text == text.encode(errors="replace").decode():
        yield directory
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _stays_inside(link: Path, directory: Path) -> bool:
    try:
        place, directory = link.resolve(strict=True), directory.resolve()
    except (OSError, RuntimeError):  # its target does not exist, or it is part of a circle
        return False
    # `models--org--name` holds `snapshots/COMMIT`, with links, and `blobs`.
    snapshots = [parent.parent for parent in (directory, *directory.parents) if parent.parent.name == "snapshots"]
    blobs = [path.parent / "blobs" for path in snapshots if path.parent.name.startswith("models--")]
    return any(place.is_relative_to(inside) for inside in (directory, *blobs))


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
    refuse_fixed(path, place)


def _refuse_long(place: Path) -> None:
    """Raise OSError for a name, or a path with room for the files in it, that is longer than the system allows."""
    missing = [part.name for part in (place, *place.parents) if not part.exists()]
    limit = name_limit(place.parent)
    if any(len(os.fsencode(name)) > limit for name in missing) or len(os.fsencode(place)) > _LONGEST_PATH - _ROOM_INSIDE:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
