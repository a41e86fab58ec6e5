"""The results of a study's units, in a local directory or on any file system that fsspec supports.

<out>/units/<key>/unit.json      the unit's settings
                  expert/        the trained or merged adapter or checkpoint
                  answers.jsonl  the answers of an evaluation
                  cost.json      time and memory
                  result.json    the result, written last: a unit that has it is done
<out>/failed/<key>.json          the error of the last attempt
"""

import contextlib
import hashlib
import json
import shutil
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from sparselet.errors import BadConfig, ConfigError, MissingExtra
from sparselet.io.atomic import atomic_directory, atomic_write
from sparselet.io.json_files import json_bytes, write_json
from sparselet.io.paths import cache_directory
from sparselet.io.temporaries import remove_all_left, scratch_directory
from sparselet.io.write_errors import convert_write_errors
from sparselet.studies.engine.unit import Unit
from sparselet.studies.engine.unit_results import UnitCost, UnitResult, result_from_json

Parsed = TypeVar("Parsed")

UNIT, RESULT, COST = "unit.json", "result.json", "cost.json"
EXPERT, ANSWERS = "expert", "answers.jsonl"
SCRATCH = "sparselet-study"  # name of the temporary directories for files that are uploaded to a URL


class Store:
    """Results by unit key.

    out: a directory, or a URL such as s3://bucket/study or file:///mnt/share/study; files for a URL are written to a temporary
        directory and uploaded when they are complete. path: the directory, or the temporary one.
    Raises ConfigError for a URL of an unknown protocol, MissingExtra if the protocol's package is not installed.
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
        """Whether `out` is a URL."""
        return self._remote is not None

    @property
    def lock(self) -> Path:
        """The file that a running study locks; for a URL, a file on this machine."""
        if self._remote is None:
            return self.path / "lock"
        return cache_directory() / "studies" / f"{hashlib.sha256(self.out.encode()).hexdigest()[:16]}.lock"

    def directory(self, unit: Unit) -> Path:
        """The directory for a unit's files. Removes temporary files of a killed attempt."""
        directory = self.path / "units" / unit.key
        with convert_write_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            for temporary in directory.glob(".*.tmp"):
                shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
        return directory

    def expert(self, key: str) -> Path:
        """The directory of the expert of a finished unit; downloaded once from a URL."""
        directory = self.path / "units" / key / EXPERT
        if self._remote is not None and not directory.exists():
            with atomic_directory(directory) as temporary:
                self._remote.get(f"{self._root}/units/{key}/{EXPERT}/", f"{temporary}/", recursive=True)
        return directory

    def publish(self, unit: Unit, result: UnitResult, cost: UnitCost) -> None:
        """Write a unit's result, after all its other files. Raises WriteFailed."""
        name = f"units/{unit.key}"
        inputs = [source.key for source in unit.inputs]
        write_json(
            self.path / name / UNIT, {"kind": unit.kind, "label": unit.label, "settings": unit.to_json(), "inputs": inputs}
        )
        write_json(self.path / name / COST, vars(cost))
        if self._remote is None:
            write_json(self.path / name / RESULT, result.to_json())
        else:
            self.upload(*(f"{name}/{file}" for file in (UNIT, COST, ANSWERS, EXPERT) if (self.path / name / file).exists()))
            self._write(f"{name}/{RESULT}", json_bytes(result.to_json()))

    def upload(self, *names: str) -> None:
        """Copy files and directories under `path` to the URL; does nothing if `out` is a directory. Raises WriteFailed."""
        for name in names if self._remote is not None else ():
            source = self.path / name
            files = [file for file in sorted(source.rglob("*")) if file.is_file()] if source.is_dir() else [source]
            for file in files:
                self._write(file.relative_to(self.path).as_posix(), file)

    def result(self, unit: Unit) -> UnitResult | None:
        """A unit's result; None if it is not done. Raises BadConfig for a damaged file."""
        return self._parse(f"units/{unit.key}/{RESULT}", lambda content: result_from_json(unit.kind, content))

    def results(self, units: Iterable[Unit]) -> dict[str, UnitResult]:
        """The results of the units that are done, by key. Raises BadConfig."""
        names = self._names("units/*/" + RESULT)
        results = {unit.key: self.result(unit) for unit in units if f"units/{unit.key}/{RESULT}" in names}
        return {key: result for key, result in results.items() if result is not None}

    def cost(self, key: str) -> UnitCost | None:
        """The cost of a unit; None if it is not done. Raises BadConfig."""
        return self._parse(f"units/{key}/{COST}", lambda content: UnitCost(**content))

    def fail(self, unit: Unit, error: str) -> None:
        """Write why a unit failed. Raises WriteFailed."""
        self._write(f"failed/{unit.key}.json", json_bytes({"label": unit.label, "kind": unit.kind, "error": error}))

    def failures(self) -> dict[str, str]:
        """Errors of failed units, by key."""
        keys = sorted(Path(name).stem for name in self._names("failed/*.json"))
        failures = {key: self.read(f"failed/{key}.json") for key in keys}
        return {key: str(failure.get("error")) for key, failure in failures.items() if failure is not None}

    def clear_failures(self, keys: Iterable[str]) -> None:
        """Remove the errors of units that are tried again. Raises WriteFailed."""
        remove_all_left(self.path / "failed")
        names = self._names("failed/*.json")
        for name in (f"failed/{key}.json" for key in keys):
            if name in names:
                with convert_write_errors(name):
                    (self.path / name).unlink() if self._remote is None else self._remote.rm_file(f"{self._root}/{name}")

    def _names(self, pattern: str) -> set[str]:
        """Files that match, relative to `out`."""
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
            raise BadConfig(f"{self.out}/{name} is not JSON: {error}. Remove it to run its unit again.") from error
        if not isinstance(content, dict):
            raise BadConfig(f"{self.out}/{name}: expected an object, got {type(content).__name__}. Remove it.")
        return content

    def _parse(self, name: str, convert: Callable[[dict[str, Any]], Parsed]) -> Parsed | None:
        """A JSON object under `out`, converted; None if there is no such file. Raises BadConfig."""
        content = self.read(name)
        try:
            return None if content is None else convert(content)
        except (KeyError, TypeError, ValueError) as error:
            raise BadConfig(
                f"{self.out}/{name} has wrong or missing fields: {error}. Remove it to run its unit again."
            ) from error

    def _write(self, name: str, content: bytes | Path) -> None:
        """Write a file under `out`, atomically where the file system supports that."""
        if self._remote is None:
            assert isinstance(content, bytes)
            with atomic_write(self.path / name) as file:
                file.write(content)
            return
        path = f"{self._root}/{name}"
        with convert_write_errors(f"{self.out}/{name}"):
            self._remote.makedirs(self._remote._parent(path), exist_ok=True)
            with self._remote.transaction, self._remote.open(path, "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    with open(content, "rb") as source:
                        shutil.copyfileobj(source, file, 2**24)
