"""A task: rows in three splits, from a directory, a hub data set, or built in."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset

from sparselet.errors import SparseletError, TaskError
from sparselet.io.atomic import write_text
from sparselet.tasks.builtin import BUILTIN, SIZES
from sparselet.tasks.long_context import LONG_CONTEXT, long_rows
from sparselet.tasks.row_files import ENDINGS, Choose, Numbered, read_file, split_files
from sparselet.tasks.rows import INPUT, TARGET, Prompt, Row, choose_columns, read_row

SPLITS = ("train", "validation", "test")
BUILTIN_PREFIX = "builtin:"


@dataclass(frozen=True)
class Task:
    """A named task with the splits that were loaded."""

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
            digest.update(json.dumps([split, [_identity(row) for row in self.splits[split]]]).encode())
        return digest.hexdigest()[:16]


def _identity(row: Row) -> list[object]:
    if isinstance(row.input, str):
        return [row.input, row.target]
    return [[[message.role, message.content] for message in row.input], row.target, row.first_learned]


def load_task(source: str | Path, splits: tuple[str, ...] = SPLITS, columns: Mapping[str, str] | None = None) -> Task:
    """Read a task.

    source: a directory with `train`, `validation` and `test` as `.jsonl`, `.json`, either of them with `.gz`, or `.parquet`;
        `builtin:NAME`, for a kind of LONG_CONTEXT as `builtin:needle:length=2048,seed=1`, length in words; or the name of a
        data set on the hub. A row has `input` and `target`, `prompt` and `completion` (each a text or a list of messages), or
        `messages`: the first of these that a file has. Other columns are not looked at.
    splits: those to read; all must be there.
    columns: where the rows call `input` and `target` otherwise, e.g. `{"input": "question", "target": "answer"}`.
    Raises TaskError, with file and line for a bad row.
    """
    names = {INPUT: INPUT, TARGET: TARGET, **(columns or {})}
    unknown = set(names) - {INPUT, TARGET}
    if unknown:
        raise TaskError(f"columns maps {INPUT!r} and {TARGET!r}, got {sorted(unknown)}.")

    def choose(present: list[str], where: str) -> tuple[str, ...]:
        return choose_columns(present, names, where)

    text = str(source)
    if text.startswith(BUILTIN_PREFIX):
        return _builtin(text.removeprefix(BUILTIN_PREFIX), splits)
    path = Path(source)
    if _is_directory(path):
        return Task(path.resolve().name, {split: _read_directory(path, split, choose) for split in splits})
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise TaskError(f"{path} is not a directory; a task is a directory with {', '.join(SPLITS)} as {', '.join(ENDINGS)}.")
    return Task(text.rpartition("/")[2], {split: _checked(_hub_rows(text, split, choose), choose, text) for split in splits})


def write_task(task: Task, directory: Path) -> Path:
    """Write the splits that were loaded as JSON lines into the new directory `directory`/NAME, and return it. Of a conversation
    the last answer is the target. Raises WriteFailed."""
    place = directory / task.name
    place.mkdir(parents=True)
    for split, rows in task.splits.items():
        lines = [{"prompt": _plain(row.input), "completion": row.target} for row in rows]
        write_text(place / f"{split}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return place


def _plain(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [vars(message) for message in prompt]


def _is_directory(path: Path) -> bool:
    try:
        path.resolve().name.encode()  # it is written into records
        return path.is_dir()
    except (OSError, ValueError) as error:  # too long; a NUL; not UTF-8
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise TaskError(f"{str(path)!r} cannot be a task's directory: {reason}.") from error


def _builtin(text: str, splits: tuple[str, ...]) -> Task:
    name, _, settings = text.partition(":")
    if name not in LONG_CONTEXT and text not in BUILTIN:
        raise TaskError(f"no built-in task is called {text!r}; there are {', '.join((*BUILTIN, *LONG_CONTEXT))}.")
    missing = [split for split in splits if split not in SIZES]
    if missing:
        raise TaskError(f"built-in task {name} has no split {missing[0]!r}; it has {', '.join(SIZES)}.")
    if name in LONG_CONTEXT:
        sizes = {"length": 512, "seed": 0, **_counts(text, settings)}
        return Task(text, {split: long_rows(name, sizes["length"], SIZES[split], sizes["seed"], split) for split in splits})
    pairs = BUILTIN[name]()
    return Task(name, {split: tuple(Row(*pair) for pair in pairs[split]) for split in splits})


def _counts(text: str, settings: str) -> dict[str, int]:
    """`length=2048,seed=1` as numbers. Raises TaskError."""
    parts = [part for part in settings.split(",") if part]
    if not all(re.fullmatch(r"(length|seed)=\d{1,9}", part) for part in parts):
        raise TaskError(f"task builtin:{text}: expected NAME:length=WORDS,seed=NUMBER.")
    return {key: int(value) for key, _, value in (part.partition("=") for part in parts)}


def _read_directory(directory: Path, split: str, choose: Choose) -> tuple[Row, ...]:
    files = split_files(directory, split)
    return tuple(row for file in files for row in _checked(read_file(file, choose), choose, str(file)))


def _hub_rows(name: str, split: str, choose: Choose) -> Numbered:
    where = f"{name} ({split})"
    try:
        table = load_dataset(name, split=split)
        table = table.select_columns(list(choose(table.column_names, where)))
        yield from ((f"{where}, row {number}", row) for number, row in enumerate(table, 1))
    except SparseletError:
        raise
    except Exception as error:  # no such directory, no such data set, no network: all mean it cannot be had
        raise TaskError(
            f"{name} is neither a directory here nor a data set on the hub with split {split!r}: {error}"
        ) from error


def _checked(numbered: Numbered, choose: Choose, where: str) -> tuple[Row, ...]:
    """The rows of a file; the first one's fields tell their form. Raises TaskError, also where there is none."""
    rows, columns = [], None
    for place, fields in numbered:
        if columns is None and isinstance(fields, Mapping):
            columns = choose(list(fields), place)
        rows.append(read_row(place, fields, columns or (INPUT, TARGET)))
    if not rows:
        raise TaskError(f"{where}: no rows.")
    return tuple(rows)
