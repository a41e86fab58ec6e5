"""Writing files and directories whole or not at all.

Every write goes to a temporary name in the same directory (`sparselet.io.temporaries`), is flushed to the disk, and is then
renamed to the final name, so that a reader sees the previous file or the new one and never a part of either.
`paths.check_output` decides, before the work, whether that will be possible.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sparselet.errors import WriteFailed
from sparselet.io.paths import check_output, mount_points, parents_of, refuse_fixed, utf8_path
from sparselet.io.temporaries import exchange, is_temporary, temporary_directory, temporary_file
from sparselet.io.write_errors import convert_write_errors


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under `path` only when the block ends without an error.

    Raises WriteFailed (disk full, no permission); the temporary file is removed then.
    """
    path = Path(path)
    with convert_write_errors(path), parents_of(path), temporary_file(path) as temporary:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_directory(path.parent)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends without an error, and vanishes otherwise.

    Within another `atomic_directory` it is a plain directory, which appears with the outer one.

    Raises what `check_output` raises, WriteFailed if it cannot be written.
    """
    place = Path(os.path.realpath(path)) if os.path.isdir(path) else Path(path)
    if is_temporary(place):
        with convert_write_errors(path):
            yield Path(path)
        return
    check_output(path)
    place = Path(os.path.realpath(path))
    with _written_beside(path, place) as temporary:
        with utf8_path(temporary) as name:
            yield name
        _settle(temporary)
        os.replace(temporary, place)
        _sync_directory(place.parent)


@contextlib.contextmanager
def replaced_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory with all files of the directory `path`, which it replaces when the block ends.

    The files are links to those in `path`: replace them, do not write into them. After an error, or a kill at any moment,
    `path` is unchanged; on success it becomes the new directory in one step. Raises WriteFailed; before the block for a mount
    point, a directory that contains one, and the working directory, which cannot be replaced.
    """
    place = Path(os.path.realpath(path))
    with convert_write_errors(path):
        refuse_fixed(path, place)
        if any(point.is_relative_to(place) for point in mount_points()):
            raise WriteFailed(f"cannot write {path}: a file system is mounted in it. Choose another directory.")
    with _written_beside(path, place) as temporary:
        shutil.copytree(place, temporary, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        yield temporary
        _sync_directory(temporary)
        exchange(temporary, place)
        _sync_directory(place.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically; halves of surrogate pairs as escapes."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def flush(directory: Path) -> None:
    """Flush all files in a directory, and their names, to the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _sync_directory(path)
    _sync_directory(directory)


@contextlib.contextmanager
def _written_beside(path: str | Path, place: Path) -> Iterator[Path]:
    """A temporary directory beside `place`; errors of writing into it name `path`."""
    temporary = None
    try:
        with convert_write_errors(path), parents_of(place), temporary_directory(place) as temporary:
            yield temporary
    except WriteFailed as error:
        if temporary is None:
            raise
        text = re.sub(r"/proc/self/fd/\d+", lambda _: str(path), str(error))  # from `utf8_path`
        raise WriteFailed(text.replace(str(temporary), str(path))) from error.__cause__


def _settle(directory: Path) -> None:
    """Set modes by the umask, since libraries write some files for the owner alone, and flush all files to the disk."""
    for file in directory.rglob("*"):
        os.chmod(file, (0o777 if file.is_dir() else 0o666) & ~_umask())
    os.chmod(directory, 0o777 & ~_umask())
    flush(directory)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # not all file systems have links
        shutil.copy2(source, target, follow_symlinks=False)


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
