"""A task: prompts and targets in three splits, from a directory, a hub data set, or built in."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from sparselet.builtin_tasks import BUILTIN
from sparselet.errors import SparseletError, TaskError

SPLITS = ("train", "validation", "test")
BUILTIN_PREFIX = "builtin:"


@dataclass(frozen=True)
class Row:
    """One example: the whole prompt, and the text to produce."""

    input: str
    target: str


@dataclass(frozen=True)
class Task:
    """A named task with the splits that were asked for."""

    name: str
    splits: Mapping[str, tuple[Row, ...]]

    def rows(self, split: str, limit: int | None = None) -> tuple[Row, ...]:
        """The first `limit` rows of a split, all by default. Raises TaskError for a split that was not loaded."""
        if split not in self.splits:
            raise TaskError(f"task {self.name} has no split {split!r}; it has {', '.join(self.splits) or 'none'}.")
        return self.splits[split][:limit]

    def fingerprint(self) -> str:
        """SHA-256 of all loaded rows, 16 hex digits: equal data, equal fingerprint."""
        digest = hashlib.sha256()
        for split in sorted(self.splits):
            digest.update(json.dumps([split, [[row.input, row.target] for row in self.splits[split]]]).encode())
        return digest.hexdigest()[:16]


def load_task(source: str | Path, splits: tuple[str, ...] = SPLITS, columns: Mapping[str, str] | None = None) -> Task:
    """Read a task.

    source: a directory with `train`, `validation` and `test` as `.jsonl` or `.parquet`, each row with `input` and
        `target`; `builtin:NAME`; or the name of a data set on the hub.
    splits: those to read; all must be there.
    columns: where the rows call `input` and `target` otherwise, e.g. `{"input": "question", "target": "answer"}`.
    Raises TaskError, with file and line for a bad row.
    """
    names = {"input": "input", "target": "target", **(columns or {})}
    unknown = set(names) - {"input", "target"}
    if unknown:
        raise TaskError(f"columns maps 'input' and 'target', got {sorted(unknown)}.")
    text = str(source)
    if text.startswith(BUILTIN_PREFIX):
        return _builtin(text.removeprefix(BUILTIN_PREFIX), splits)
    path = Path(source)
    if path.is_dir():
        return Task(path.resolve().name, {split: _read_split(path, split, names) for split in splits})
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise TaskError(f"{path} is not a directory; a task is a directory with {', '.join(SPLITS)} as .jsonl or .parquet.")
    return Task(text.rpartition("/")[2], {split: _read_hub(text, split, names) for split in splits})


def _builtin(name: str, splits: tuple[str, ...]) -> Task:
    if name not in BUILTIN:
        raise TaskError(f"no built-in task is called {name!r}; there are {', '.join(BUILTIN)}.")
    rows = {split: tuple(Row(*pair) for pair in pairs) for split, pairs in BUILTIN[name]().items()}
    missing = [split for split in splits if split not in rows]
    if missing:
        raise TaskError(f"built-in task {name} has no split {missing[0]!r}; it has {', '.join(rows)}.")
    return Task(name, {split: rows[split] for split in splits})


def _read_split(directory: Path, split: str, names: Mapping[str, str]) -> tuple[Row, ...]:
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    for suffix, reader in readers.items():
        file = directory / f"{split}{suffix}"
        if file.is_file():
            return _checked(reader(file), names, str(file))
    present = sorted(f.name for f in directory.iterdir() if f.suffix in readers)
    raise TaskError(
        f"{directory} has no split {split!r}: expected {split}.jsonl or {split}.parquet, "
        f"found {', '.join(present) or 'neither'}."
    )


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with open(file, encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield f"line {number}", json.loads(line)
                    except ValueError as error:
                        raise TaskError(f"{file}, line {number}: not JSON: {error}") from error
        except UnicodeDecodeError as error:
            raise TaskError(f"{file}: not UTF-8: {error}") from error


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        table = Dataset.from_parquet(str(file))
    except Exception as error:  # pyarrow and datasets raise many kinds, all meaning that the file cannot be read
        raise TaskError(f"{file}: not a Parquet file: {error}") from error
    for number, row in enumerate(table, 1):
        yield f"row {number}", row


def _read_hub(name: str, split: str, names: Mapping[str, str]) -> tuple[Row, ...]:
    try:
        table = load_dataset(name, split=split)
    except SparseletError:
        raise
    except Exception as error:  # no such directory, no such data set, no network: all mean it cannot be had
        raise TaskError(
            f"{name} is neither a directory here nor a data set on the hub with split {split!r}: {error}"
        ) from error
    return _checked(((f"row {i}", row) for i, row in enumerate(table, 1)), names, f"{name} ({split})")


def _checked(rows: Iterator[tuple[str, Any]], names: Mapping[str, str], where: str) -> tuple[Row, ...]:
    checked = []
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise TaskError(f"{where}, {place}: expected an object, got {type(row).__name__}.")
        for column in names.values():
            if column not in row:
                raise TaskError(f"{where}, {place}: no field {column!r}; the row has {', '.join(map(str, row)) or 'none'}.")
            if not isinstance(row[column], str):
                raise TaskError(f"{where}, {place}: {column!r} is {type(row[column]).__name__}, expected text.")
            if not row[column].strip():
                raise TaskError(f"{where}, {place}: {column!r} is empty.")
        checked.append(Row(row[names["input"]], row[names["target"]]))
    if not checked:
        raise TaskError(f"{where}: no rows.")
    return tuple(checked)
