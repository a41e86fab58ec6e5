"""Where a study's results lie: a directory here, or one on any file system that fsspec knows.

<out>/units/<key>/unit.json      what the unit is
                  expert/        what was trained or merged
                  answers.jsonl  what was answered
                  cost.json      time and memory it took
                  result.json    its result, written last: a unit is done once it is there
<out>/failed/<key>.json          why the last attempt failed
"""

import contextlib
import hashlib
import json
import shutil
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import fsspec

from sparselet.errors import BadConfig, ConfigError, MissingExtra
from sparselet.io.atomic import atomic_directory, atomic_write
from sparselet.io.json_files import json_bytes, write_json
from sparselet.io.paths import cache_directory
from sparselet.io.temporaries import remove_all_left, scratch_directory
from sparselet.io.write_errors import convert_write_errors
from sparselet.studies.engine.unit import Unit

UNIT, RESULT, COST = "unit.json", "result.json", "cost.json"
EXPERT, ANSWERS = "expert", "answers.jsonl"
SCRATCH = "sparselet-study"  # the name of the temporary directories for what goes to a URL


class Store:
    """Results by unit key.

    out: a directory, or a URL such as s3://bucket/study or file:///mnt/share/study, whose files are made in a temporary
        directory here and copied there once they are whole. path: the directory, or that temporary one.
    Raises ConfigError for a URL of no known kind, MissingExtra where its package is not installed.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = str(out)
        self._remote: Any = None  # an AbstractFileSystem of fsspec
        if "://" not in self.out:
            self.path = Path(out).absolute()
            return
        try:
            self._remote, self._root = fsspec.core.url_to_fs(self.out)
        except ImportError as error:
            raise MissingExtra(f"{self.out} cannot be reached: {error}.") from error
        except ValueError as error:
            raise ConfigError(f"out: {self.out} cannot be reached: {error}.") from error
        scratch = contextlib.ExitStack()
        self.path = scratch.enter_context(scratch_directory(SCRATCH))
        weakref.finalize(self, scratch.close)

    @property
    def is_remote(self) -> bool:
        """Whether it is a URL."""
        return self._remote is not None

    @property
    def lock(self) -> Path:
        """The file that one study at a time holds; of a URL one study on this machine."""
        if self._remote is None:
            return self.path / "lock"
        return cache_directory() / "studies" / f"{hashlib.sha256(self.out.encode()).hexdigest()[:16]}.lock"

    def directory(self, unit: Unit) -> Path:
        """Where a unit's files are made. Half-written ones of an attempt that was killed are removed."""
        directory = self.path / "units" / unit.key
        with convert_write_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            for left in directory.glob(".*.tmp"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        return directory

    def expert(self, key: str) -> Path:
        """The directory with what a finished unit trained or merged; fetched from a URL, once."""
        directory = self.path / "units" / key / EXPERT
        if self._remote is not None and not directory.exists():
            with atomic_directory(directory) as made:
                self._remote.get(f"{self._root}/units/{key}/{EXPERT}/", f"{made}/", recursive=True)
        return directory

    def publish(self, unit: Unit, result: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
        """Write a unit's result, after all its other files. Raises WriteFailed."""
        directory = self.path / "units" / unit.key
        inputs = [one.key for one in unit.inputs]
        about = {"kind": unit.kind, "label": unit.label, "settings": dict(unit.settings), "inputs": inputs}
        write_json(directory / UNIT, about)
        write_json(directory / COST, cost)
        if self._remote is None:
            write_json(directory / RESULT, result)
        else:
            there = f"units/{unit.key}"
            self.upload(*(f"{there}/{name}" for name in (UNIT, COST, ANSWERS, EXPERT) if (directory / name).exists()))
            self._write(f"{there}/{RESULT}", json_bytes(result))

    def upload(self, *names: str) -> None:
        """Copy files and directories made under `path` to the URL; nothing to do for a directory. Raises WriteFailed."""
        for name in names if self._remote is not None else ():
            here = self.path / name
            files = [file for file in sorted(here.rglob("*")) if file.is_file()] if here.is_dir() else [here]
            for file in files:
                self._write(file.relative_to(self.path).as_posix(), file)

    def result(self, key: str) -> dict[str, Any] | None:
        """A unit's result; None if it is not done. Raises BadConfig for a file that cannot be read as one."""
        return self.read(f"units/{key}/{RESULT}")

    def results(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The results of those units that are done."""
        done = self._names("units/*/" + RESULT)
        found = {key: self.result(key) for key in keys if f"units/{key}/{RESULT}" in done}
        return {key: result for key, result in found.items() if result is not None}

    def cost(self, key: str) -> dict[str, Any] | None:
        """What a unit that is done took: seconds, cpu_seconds, peak_bytes, bytes, host."""
        return self.read(f"units/{key}/{COST}")

    def fail(self, unit: Unit, error: str) -> None:
        """Keep why a unit failed. Raises WriteFailed."""
        self._write(f"failed/{unit.key}.json", json_bytes({"label": unit.label, "kind": unit.kind, "error": error}))

    def failures(self) -> dict[str, str]:
        """Why units failed, by key."""
        keys = [Path(name).stem for name in self._names("failed/*.json")]
        found = {key: self.read(f"failed/{key}.json") for key in keys}
        return {key: str(about.get("error")) for key, about in sorted(found.items()) if about is not None}

    def forgive(self, keys: Iterable[str]) -> None:
        """Forget the failures of units that are tried again. Raises WriteFailed."""
        remove_all_left(self.path / "failed")
        names = self._names("failed/*.json")
        for name in (f"failed/{key}.json" for key in keys):
            if name in names:
                with convert_write_errors(name):
                    (self.path / name).unlink() if self._remote is None else self._remote.rm_file(f"{self._root}/{name}")

    def _names(self, pattern: str) -> set[str]:
        """Files that match, as seen from `out`."""
        if self._remote is None:
            return {file.relative_to(self.path).as_posix() for file in self.path.glob(pattern)}
        self._remote.invalidate_cache()
        prefix = self._root.rstrip("/") + "/"
        return {str(file).removeprefix(prefix) for file in self._remote.glob(f"{self._root}/{pattern}")}

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON object under `out`; None if there is no such file. Raises BadConfig."""
        try:
            data = (self.path / name).read_bytes() if self._remote is None else self._remote.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        try:
            content = json.loads(data)
        except ValueError as error:
            raise BadConfig(f"{self.out}/{name} is not JSON: {error}. Remove it, and its unit is done again.") from error
        if not isinstance(content, dict):
            raise BadConfig(f"{self.out}/{name}: expected an object, got {type(content).__name__}. Remove it.")
        return content

    def _write(self, name: str, content: bytes | Path) -> None:
        """Write a file under `out` that is there whole or not at all, where the file system can do that."""
        if self._remote is None:
            assert isinstance(content, bytes)
            with atomic_write(self.path / name) as file:
                file.write(content)
            return
        there = f"{self._root}/{name}"
        with convert_write_errors(f"{self.out}/{name}"):
            self._remote.makedirs(self._remote._parent(there), exist_ok=True)
            with self._remote.transaction, self._remote.open(there, "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    with open(content, "rb") as source:
                        shutil.copyfileobj(source, file, 2**24)
