"""`ExpertRegistry`: the experts that requests may name, and the state file by which a restarted server has the same ones."""

import contextlib
import fcntl
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparselet.adapter import expert_profile
from sparselet.adapter_format import CONFIG_FILE
from sparselet.errors import BadConfig, ConfigError, RequestRefused, SparseletError, UnknownExpert, UnsafePath
from sparselet.expert import Expert
from sparselet.io.json_files import read_object, write_json
from sparselet.io.printable import printable
from sparselet.profiles.profile import Profile
from sparselet.serving.served_expert import FitCheck, ServedExpert, serve_expert

logger = logging.getLogger("sparselet")

BASE_NAME, ROUTE_NAME, MERGE_NAME = "base", "route", "merge"  # model names with a meaning of their own
STATE_FILE, MERGED_DIRECTORY, STATE_VERSION = "serving.json", "merged", 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class Registration:
    """A name's expert, the directory it was read from, and the profile that lies there, if any."""

    expert: ServedExpert
    path: Path
    profile: Profile | None = None


@dataclass(frozen=True)
class _State:
    """A state file. unloaded: directories that were unloaded. digests: of experts by name, where they were known."""

    paths: dict[str, Path]
    unloaded: set[Path]
    digests: dict[str, str]


class ExpertRegistry:
    """Experts by name.

    open_expert: opens a directory. fits: the check against the base model. base: the base model itself, served as `base`.
    directories: each an expert, or a directory of experts, which are served by the names of their directories.
    state: a directory; `serving.json` in it records every change, `merged/` holds saved merges. Several servers of the same
        directories may share it: each begins a change with what the file has, and takes over the others' by `follow`.

    An expert that cannot be read at the start is reported and left out; the others are served. Raises ConfigError for a
    directory that does not exist, two experts of one name, and a name that cannot be served.

    refused: the names that are not served, and why.
    """

    def __init__(
        self,
        open_expert: Callable[[Path], Expert],
        fits: FitCheck,
        base: ServedExpert,
        directories: Sequence[Path],
        state: Path,
    ) -> None:
        self.base, self.state = base, state
        self._open, self._fits = open_expert, fits
        self._lock = threading.Lock()
        self._roots = [Path(os.path.realpath(directory)) for directory in (*directories, state / MERGED_DIRECTORY)]
        self._registrations: dict[str, Registration] = {}
        self.refused: dict[str, SparseletError] = {}
        self._written = self._state_signature()
        recorded = self._read_state()
        self._paths, self._unloaded = recorded.paths, recorded.unloaded  # of all names, also of those that could not be read
        for directory in directories:
            for path in _experts_in(directory):
                if path not in self._unloaded and path not in self._paths.values():
                    self._refuse_twice(path)
                    self._paths[path.name] = path
        for name, path in self._paths.items():
            self._try_read(name, path)

    def __getitem__(self, name: str) -> ServedExpert:
        """The expert of this name, or the base model. Raises UnknownExpert."""
        if name == BASE_NAME:
            return self.base
        registration = self._registrations.get(name)
        if registration is None:
            raise UnknownExpert(f"no expert is called {name!r:.100}; /v1/models lists the names.")
        return registration.expert

    def registrations(self) -> dict[str, Registration]:
        """All experts by name, in the order of their names."""
        return dict(sorted(self._registrations.copy().items()))

    def paths(self) -> dict[str, Path]:
        """The directories of all names, also of those that could not be read."""
        return self._paths

    def load(self, name: str, path: str) -> Registration:
        """Read an expert from a directory in the served ones, in place of the one that has the name, if any.

        path: absolute, or relative to a served directory. If the expert cannot be read or does not fit, the previous one stays.
        Raises RequestRefused (the name), UnsafePath, and what opening and checking raise.
        """
        self._check_name(name)
        registration = self._read(self._inside(path))
        with self._changing():
            self._set({**self._paths, name: registration.path}, {name: registration})
        return registration

    def save(self, name: str, expert: ServedExpert) -> Registration:
        """Write an expert that was merged in memory into `state`, and serve it under a new name.

        Raises RequestRefused for a name that is taken; WriteFailed.
        """
        self._check_name(name)
        assert expert.adapter is not None
        path = Path(os.path.realpath(self.state / MERGED_DIRECTORY / expert.digest))
        registration = Registration(expert, path)
        with self._changing():
            self._require_free(name)
            if not path.exists():
                expert.adapter.save(path)
            self._set({**self._paths, name: path}, {name: registration})
        return registration

    def unload(self, name: str) -> None:
        """Serve this name no longer; requests that have begun are answered. Raises UnknownExpert."""
        with self._changing():
            self._require(name)
            self._set({key: path for key, path in self._paths.items() if key != name})

    def rename(self, name: str, new: str) -> None:
        """Serve an expert under another name. Raises UnknownExpert, RequestRefused."""
        self._check_name(new)
        with self._changing():
            self._require(name)
            self._require_free(new)
            registration, error = self._registrations.get(name), self.refused.get(name)
            self._set(
                {new if key == name else key: path for key, path in self._paths.items()},
                {} if registration is None else {new: registration},
            )
            if error is not None:
                self.refused[new] = error

    def follow(self) -> None:
        """Take over what other servers with the same `state` have changed. Raises BadConfig."""
        if self._state_signature() != self._written:
            with self._lock:
                self._follow()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Within the block no other thread or server changes the names, which are those that the state file has now."""
        self.state.mkdir(parents=True, exist_ok=True)
        with self._lock:
            directory = os.open(self.state, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(directory, fcntl.LOCK_EX)
                self._follow()
                yield
            finally:
                os.close(directory)

    def _follow(self) -> None:
        written = self._state_signature()
        if written == self._written:
            return
        recorded = self._read_state()
        own = {name: path for name, path in self._paths.items() if path not in recorded.unloaded | {*recorded.paths.values()}}
        paths = {**own, **recorded.paths}
        for name in self._paths.keys() - paths.keys():
            self._registrations.pop(name, None)
            self.refused.pop(name, None)
        for name, path in paths.items():
            served = self._registrations.get(name)
            if served is None or served.path != path or recorded.digests.get(name) not in (None, served.expert.digest):
                self._try_read(name, path)
        self._paths, self._unloaded, self._written = paths, recorded.unloaded, written

    def _try_read(self, name: str, path: Path) -> None:
        """Serve a directory under a name; what cannot be read is reported, and leaves what has the name."""
        try:
            self._registrations[name] = self._read(path)
            self.refused.pop(name, None)
        except SparseletError as error:
            self.refused[name] = error
            logger.warning("%s is not served: %s", name, printable(error))

    def _read(self, path: Path) -> Registration:
        opened = self._open(path)
        expert, profile = serve_expert(opened, self._fits), expert_profile(opened)
        same = [r.expert for r in self._registrations.copy().values() if r.expert.digest == expert.digest]
        return Registration(same[0] if same else expert, path, profile)

    def _set(self, paths: dict[str, Path], registrations: Mapping[str, Registration] | None = None) -> None:
        """Record the names and paths, and the paths that have no name any more, on the disk first. registrations: new ones."""
        changed = registrations or {}
        served = {name: r for name, r in {**self._registrations, **changed}.items() if name in paths}
        unloaded = (self._unloaded | {*self._paths.values()}) - {*paths.values()}
        experts = {name: str(path) for name, path in paths.items()}
        content = {
            "version": STATE_VERSION,
            "experts": experts,
            "digests": {name: registration.expert.digest for name, registration in served.items()},
            "unloaded": sorted(map(str, unloaded)),
        }
        write_json(self.state / STATE_FILE, content)
        self._paths, self._unloaded, self._written = paths, unloaded, self._state_signature()
        self._registrations = served
        self.refused = {name: error for name, error in self.refused.items() if name in paths and name not in changed}

    def _state_signature(self) -> tuple[int, ...]:
        """Changes whenever the state file is written."""
        try:
            status = (self.state / STATE_FILE).stat()
        except FileNotFoundError:
            return ()
        return status.st_mtime_ns, status.st_ino, status.st_size

    def _read_state(self) -> "_State":
        """What the state file records. Raises BadConfig."""
        file = self.state / STATE_FILE
        if not file.exists():
            return _State({}, set(), {})
        content = read_object(file)
        experts, unloaded, digests = content.get("experts"), content.get("unloaded"), content.get("digests")
        if content.get("version") != STATE_VERSION or not isinstance(experts, dict) or not isinstance(unloaded, list):
            raise BadConfig(f"{file} is no registry of version {STATE_VERSION}; remove it to begin with the directories alone.")
        paths = {name: Path(str(path)) for name, path in experts.items() if _NAME.fullmatch(name)}
        outside = [name for name, path in paths.items() if not self._is_inside(path)]
        for name in outside:
            logger.warning("%s is not served: %s is in none of the served directories now.", name, printable(paths[name]))
        kept = {name: path for name, path in paths.items() if name not in outside}
        return _State(kept, {Path(str(path)) for path in unloaded}, digests if isinstance(digests, dict) else {})

    def _inside(self, path: str) -> Path:
        """The real path of a directory in the served ones. Raises UnsafePath."""
        if "\0" not in path:
            for root in self._roots:
                place = Path(os.path.realpath(root / path))
                if place.is_dir() and self._is_inside(place):
                    return place
        raise UnsafePath(f"{printable(path)!r:.200} is no directory in the served ones.")

    def _is_inside(self, path: Path) -> bool:
        return any(Path(os.path.realpath(path)).is_relative_to(root) for root in self._roots)

    def _refuse_twice(self, path: Path) -> None:
        """Raise ConfigError for a directory whose name is taken or cannot be served."""
        if not _NAME.fullmatch(path.name) or path.name in (BASE_NAME, ROUTE_NAME, MERGE_NAME):
            raise ConfigError(f"{path}: {_NAME_RULE} Rename the directory.")
        if path.name in self._paths:
            raise ConfigError(f"{path} and {self._paths[path.name]} are both called {path.name}; rename one directory.")

    def _check_name(self, name: str) -> None:
        if not _NAME.fullmatch(name) or name in (BASE_NAME, ROUTE_NAME, MERGE_NAME):
            raise RequestRefused(f"{_NAME_RULE} Got {name!r:.100}.", "name")

    def _require(self, name: str) -> None:
        if name not in self._paths:
            raise UnknownExpert(f"no expert is called {name!r:.100}; /v1/models lists the names.")

    def _require_free(self, name: str) -> None:
        if name in self._paths:
            raise RequestRefused(f"an expert is called {name} already; unload or rename it first.", "name")


_NAME_RULE = (
    f"a name has 1 to 96 letters of A-Z, a-z, 0-9, '.', '_' and '-', begins with a letter or digit, and is not "
    f"{BASE_NAME}, {ROUTE_NAME} or {MERGE_NAME}."
)


def _experts_in(directory: Path) -> list[Path]:
    """The directory if it is an expert, else the experts in it. Raises ConfigError."""
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory; set `experts` to experts or directories of experts.")
    if (directory / CONFIG_FILE).exists() or (directory / "config.json").exists():
        return [Path(os.path.realpath(directory))]
    children = sorted(child for child in directory.iterdir() if (child / CONFIG_FILE).exists())
    return [place for child in children if (place := Path(os.path.realpath(child))).is_relative_to(os.path.realpath(directory))]
