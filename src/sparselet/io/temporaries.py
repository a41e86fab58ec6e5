"""Temporary files and directories, recognised and removed once the process that made them has been killed.

The temporaries of `name` lie beside it and are called `.name.<16 hex digits>.tmp`. The process that creates one holds a lock
(`flock`) on it until it has its final name or is removed. A lock ends with its process, however that ends, so a temporary
without a lock was left by a killed process; the next process that writes `name` removes it and logs that.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger("sparselet")

_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}\.tmp", re.DOTALL)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h


@contextlib.contextmanager
def temporary_directory(path: Path) -> Iterator[Path]:
    """A new, locked directory beside `path`; removed when the block ends, unless it was renamed."""
    remove_left(path)
    temporary, lock = path, None
    try:
        while lock is None:  # another process may have removed it as left behind, before it was locked
            temporary = _new_name(path)
            os.mkdir(temporary, 0o700)
            lock = _lock(temporary)
        yield temporary
    finally:
        if temporary != path:
            _remove(temporary)
        _unlock(lock)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A new, locked, empty file beside `path`; removed when the block ends, unless it was renamed."""
    remove_left(path)
    temporary, lock = path, None
    try:
        while lock is None:
            temporary = _new_name(path)
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            lock = _lock(temporary)
        yield temporary
    finally:
        if temporary != path:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        _unlock(lock)


@contextlib.contextmanager
def scratch_directory(name: str) -> Iterator[Path]:
    """A directory below the system's temporary directory; those of the same name that killed processes left are removed."""
    with temporary_directory(_scratch(name)) as directory:
        yield directory


def remove_scratch(name: str) -> None:
    """Remove the scratch directories of this name that killed processes left."""
    remove_left(_scratch(name))


@contextlib.contextmanager
def held(directory: Path) -> Iterator[bool]:
    """Lock a directory for the block. Yields False where another process holds it."""
    lock = _lock(directory)
    try:
        yield lock is not None
    finally:
        _unlock(lock)


def remove_directory(directory: Path) -> None:
    """Remove a directory in one step: after a kill in between, only a temporary is left."""
    with temporary_directory(directory) as temporary:
        os.rename(directory, temporary)


def remove_left(path: Path) -> None:
    """Remove the temporaries of `path` that killed processes left, and restore a directory that `exchange` had set aside."""
    name = re.escape(_stem(path)) + r"\.[0-9a-f]{16}"
    for aside in _find(path.parent, re.compile(name + r"\.old")):
        if not os.path.lexists(path):
            os.rename(aside, path)
            logger.info("restored %s, which a killed process was replacing.", path)
        else:
            shutil.rmtree(aside, ignore_errors=True)
    _remove_left(path.parent, re.compile(name + r"\.tmp"))


def remove_all_left(directory: Path) -> None:
    """Remove the temporaries in a directory that killed processes left, of whatever name."""
    _remove_left(directory, _TEMPORARY)


def is_temporary(path: Path) -> bool:
    """Whether a path has the name of a temporary."""
    return bool(_TEMPORARY.fullmatch(path.name))


def fitting_name(parent: Path, name: str, ending: str) -> str:
    """`name + ending`; where that is longer than names may be, the beginning of `name`, a digest of it, and `ending`."""
    limit = name_limit(parent) - len(os.fsencode(ending))
    if len(os.fsencode(name)) <= limit:
        return name + ending
    digest, kept = "-" + hashlib.sha256(os.fsencode(name)).hexdigest()[:16], name
    while len(os.fsencode(kept)) > limit - len(digest):
        kept = kept[:-1]
    return kept + digest + ending


def name_limit(directory: Path) -> int:
    """The bytes that a file's name may have in a directory, which need not exist yet."""
    existing = next(parent for parent in (directory, *directory.absolute().parents) if os.path.isdir(parent))
    try:
        return os.pathconf(existing, "PC_NAME_MAX")
    except (OSError, ValueError):
        return 255


def exchange(first: Path, second: Path) -> None:
    """Exchange two directories of one file system, in one step where the system can (Linux).

    Elsewhere `second` is for a moment only a directory `.old` beside it, from where `remove_left` restores it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = os.fsencode(first), os.fsencode(second)
        if not libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), str(second))
    aside = _new_name(second).with_suffix(".old")
    os.rename(second, aside)
    try:
        os.rename(first, second)
    except BaseException:
        os.rename(aside, second)
        raise
    os.rename(aside, first)


def _scratch(name: str) -> Path:
    return Path(tempfile.gettempdir()).absolute() / f"{name}-{os.getuid()}"


def _find(directory: Path, pattern: re.Pattern[str]) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(directory) if pattern.fullmatch(entry.name)]
    except OSError:  # the directory does not exist, or cannot be read
        return []


def _remove_left(directory: Path, pattern: re.Pattern[str]) -> None:
    for temporary in _find(directory, pattern):
        with contextlib.suppress(OSError):  # it is another user's, or another process removes it as well
            lock = _lock(temporary, needed=True)
            if lock is None:
                continue
            try:
                shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
                logger.info("removed %s, which a killed process left.", temporary)
            finally:
                os.close(lock)


def _lock(path: Path, needed: bool = False) -> int | None:
    """An open descriptor that holds the lock on a file or directory; None if another process holds it or has removed the file.

    needed: raise OSError where the file system has no locks; otherwise the descriptor is returned without a lock.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        if not needed:
            return descriptor
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _remove(directory: Path) -> None:
    """Remove a directory if it exists, completely even after an interrupt."""
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        pass
    except OSError:
        try:
            shutil.rmtree(directory, ignore_errors=True)
        except KeyboardInterrupt:
            shutil.rmtree(directory, ignore_errors=True)
            raise


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _stem(path: Path) -> str:
    room = "." * len(".0123456789abcdef.tmp")
    return fitting_name(path.parent, f".{path.name}", room)[: -len(room)]


def _new_name(path: Path) -> Path:
    return path.parent / f"{_stem(path)}.{secrets.token_hex(8)}.tmp"
