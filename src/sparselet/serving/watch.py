"""`DirectoryWatcher`: experts that are put into a directory are served, changed ones read again, removed ones unloaded."""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from sparselet.adapter_format import CONFIG_FILE
from sparselet.errors import ConfigError, SparseletError
from sparselet.io.printable import printable
from sparselet.io.temporaries import is_temporary
from sparselet.serving.registry import ExpertRegistry

logger = logging.getLogger("sparselet")

Signature = tuple[tuple[str, int, int, int], ...]  # name, size, time of change and inode of each file of an expert


class DirectoryWatcher:
    """Looks at a directory of experts every `interval` seconds.

    An expert that is new or has changed is read, and one that is gone is unloaded, once two looks in a row see the same. What
    cannot be read, or does not fit the base model, is reported once, and read again when its files change; what is served under
    its name goes on. A directory that is gone as a whole, such as a lost mount, changes nothing. An expert that was renamed or
    unloaded by the admin API keeps that name, or stays unloaded, until its files change.

    Make it before the registry reads the directory, so that no change in between is missed. Raises ConfigError.
    """

    def __init__(self, directory: str | Path, interval: float = 1.0) -> None:
        if not Path(directory).is_dir() or (Path(directory) / CONFIG_FILE).exists():
            raise ConfigError(f"{directory} is no directory of experts; set `watch` to one, which may be empty.")
        self.directory, self.interval = Path(os.path.realpath(directory)), interval
        self._read = self._last = self._experts()
        self._ended = threading.Event()

    @contextlib.contextmanager
    def watching(self, registry: ExpertRegistry) -> Iterator[None]:
        """Within the block a thread looks."""
        thread = threading.Thread(target=self._run, args=(registry,), name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def look(self, registry: ExpertRegistry) -> None:
        """Compare the directory with the last two looks, and change the registry accordingly."""
        registry.follow()
        experts = self._experts()
        for name, path in registry.paths().items():
            if path.parent == self.directory and path not in experts and path not in self._last:
                registry.unload(name)
                logger.info("%s was removed, and is served no longer.", printable(path))
        for path, signature in experts.items():
            if signature == self._last.get(path) and signature != self._read.get(path):
                self._read[path] = signature
                self._load(registry, path)
        self._read = {path: signature for path, signature in self._read.items() if path in experts}
        self._last = experts

    def _load(self, registry: ExpertRegistry, path: Path) -> None:
        names = registry.paths()
        if names.get(path.name, path) != path:
            logger.warning("%s is not served: %s is the name of %s.", printable(path), path.name, printable(names[path.name]))
            return
        for name in [name for name, place in names.items() if place == path] or [path.name]:
            try:
                registration = registry.load(name, str(path))
                logger.info("%s is served as %s, %s.", printable(path), name, registration.expert.digest)
            except SparseletError as error:
                logger.warning("%s is not served as it is now: %s", printable(path), printable(error))

    def _run(self, registry: ExpertRegistry) -> None:
        failed = False
        while not self._ended.wait(self.interval):
            try:
                self.look(registry)
                failed = False
            except (OSError, SparseletError) as error:
                if not failed:
                    logger.warning("looking at %s fails: %s", printable(self.directory), printable(error))
                failed = True

    def _experts(self) -> dict[Path, Signature]:
        """The experts in the directory. Links are left out, as the registry reads nothing outside; so are temporary ones."""
        experts = {}
        for child in self.directory.iterdir():
            if child.is_symlink() or is_temporary(child) or not (child / CONFIG_FILE).exists():
                continue
            with contextlib.suppress(FileNotFoundError):  # it is being removed
                experts[child] = _signature(child)
        return experts


def _signature(expert: Path) -> Signature:
    with os.scandir(expert) as entries:
        files = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in files))
