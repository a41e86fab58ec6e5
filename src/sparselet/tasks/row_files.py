"""The files of a task's split and their rows: JSON lines, JSON arrays, Parquet."""

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from pyarrow import parquet

from sparselet.errors import TaskError
from sparselet.tasks.rows import TWICE

ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")  # in capitals too

LONGEST_LINE = 2**26  # bytes of one JSON line
LARGEST_JSON = 2**30  # bytes of a .json file, which is read in one piece
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")
_MAX_FILES = 12  # files that a message lists

Numbered = Iterator[tuple[str, Any]]  # file and line or row, for messages; and what stands there
# From the columns of a file and how it is called in messages, those that are read.
Choose = Callable[[list[str], str], tuple[str, ...]]


def split_files(directory: Path, split: str) -> list[Path]:
    """The file of a split, or its parts (`train-00000-of-00002.parquet`) in order.

    Raises TaskError where there is none, where several could be meant, or a part is missing.
    """
    try:
        present = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise TaskError(f"cannot read {directory}: {error.strerror}.") from error
    pattern = re.compile(rf"{re.escape(split)}(?:-(\d+)-of-(\d+))?((?i:{'|'.join(map(re.escape, ENDINGS))}))", re.ASCII)
    matches = [match for match in map(pattern.fullmatch, present) if match]
    if not matches:
        expected = f"{split}{ENDINGS[0]} (or {', '.join(ENDINGS[1:])})"
        names = ", ".join(present[:_MAX_FILES]) + (", …" if len(present) > _MAX_FILES else "")
        raise TaskError(f"{directory} has no split {split!r}: expected {expected}, found {names or 'nothing'}.")
    if len({(match[2], match[3]) for match in matches}) > 1 or (len(matches) > 1 and matches[0][1] is None):
        names = ", ".join(match[0] for match in matches[:_MAX_FILES])
        raise TaskError(f"{directory} has several files for the split {split!r}: {names}. Keep one of them.")
    if matches[0][1] is not None:
        parts, count = [int(match[1]) for match in matches], int(matches[0][2])
        missing = next((i for i in range(count) if i not in parts), None)
        if missing is not None or len(parts) != count:
            what = f"{len(parts)} parts instead of {count}" if missing is None else f"no part {missing} of {count}"
            raise TaskError(f"{directory} has {what} of the split {split!r}.")
        matches.sort(key=lambda match: int(match[1]))
    return [directory / match[0] for match in matches]


def read_file(file: Path, choose: Choose) -> Numbered:
    """What stands in a file, with file and line or row. Of Parquet only the columns that `choose` names are read.

    Raises TaskError for a file that cannot be read, and for bytes that are no UTF-8, JSON, gzip or Parquet.
    """
    if file.exists() and not file.is_file():
        raise TaskError(f"{file} is not a file.")
    try:
        if file.name.lower().endswith(".parquet"):
            yield from _parquet(file, choose)
        else:
            name = file.name.lower()
            read = _json_values if name.removesuffix(".gz").endswith(".json") else _json_lines
            with open(file, "rb") as raw:
                yield from read(file, gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TaskError(f"{file}: not a complete gzip file: {error}") from error
    except OSError as error:
        raise TaskError(f"cannot read {file}: {error.strerror or error}.") from error


def _json_lines(file: Path, stream: BinaryIO | gzip.GzipFile) -> Numbered:
    for number in itertools.count(1):
        place, line = f"{file}, line {number}", stream.readline(LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > LONGEST_LINE:
            raise TaskError(f"{place}: longer than {LONGEST_LINE:,} bytes.")
        text = _decoded(line.removeprefix(_BOM), file, number).rstrip("\r\n")
        if text.strip():
            content, end = _parsed(text, _space_end(text, 0), file, number)
            if _space_end(text, end) != len(text):
                raise TaskError(f"{place}: not JSON: more after the value, at column {end + 1}")
            yield place, content


def _json_values(file: Path, stream: BinaryIO | gzip.GzipFile) -> Numbered:
    """The elements of an array, or values one after another."""
    content = stream.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise TaskError(f"{file}: longer than {LARGEST_JSON:,} bytes, the limit of .json files. Write it as .jsonl.")
    text = _decoded(content.removeprefix(_BOM), file, 1)
    position = _space_end(text, 0)
    array = text[position : position + 1] == "["
    position, line, seen = _space_end(text, position + array), 1, 0
    while position < len(text):
        if array and text[position] == "]" and not seen:
            break
        line, seen = line + text.count("\n", seen, position), position
        value, end = _parsed(text, position, file, line)
        yield f"{file}, line {line}", value
        position = _space_end(text, end)
        if array:
            following = text[position : position + 1]
            if following == "]":
                break
            if following != ",":
                raise TaskError(f"{file}, line {line}: not JSON: expected a comma or the array's end after this row")
            position = _space_end(text, position + 1)
    if array and (position >= len(text) or _space_end(text, position + 1) != len(text)):
        what = "the array has no end" if position >= len(text) else "more after the array's end"
        raise TaskError(f"{file}, line {text.count(chr(10)) + 1}: not JSON: {what}")


def _decoded(content: bytes, file: Path, line: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise TaskError(f"{file}, line {line}: not UTF-8: {error.reason}, {content[error.start : error.end]!r}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, with TWICE for what occurs twice in it."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        content[key] = TWICE if key in content else value
    return content


# Numbers are never read, and Python refuses the longest integers.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=float)


def _parsed(text: str, position: int, file: Path, line: int) -> tuple[Any, int]:
    """The JSON value that begins at `position`, and where it ends. line: of the position, for messages."""
    try:
        return _DECODER.raw_decode(text, position)
    except RecursionError as error:
        raise TaskError(f"{file}, line {line}: nested too deeply.") from error
    except json.JSONDecodeError as error:
        line += text.count("\n", position, error.pos)
        raise TaskError(f"{file}, line {line}: not JSON: {error.msg}, at column {error.colno}") from error


def _space_end(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _parquet(file: Path, choose: Choose) -> Numbered:
    try:
        opened = parquet.ParquetFile(file)
        columns = choose(opened.schema_arrow.names, str(file))
        twice = [column for column in columns if opened.schema_arrow.names.count(column) > 1]
        if twice:
            raise TaskError(f"{file}: the column {twice[0]!r} occurs twice.")
        number = 0
        for batch in opened.iter_batches(columns=list(columns)):
            arrays = {column: batch.column(batch.schema.get_field_index(column)) for column in columns}
            for i in range(batch.num_rows):
                number += 1
                place = f"{file}, row {number}"
                yield place, {column: _value(place, column, array[i]) for column, array in arrays.items()}
    except TaskError:
        raise
    except Exception as error:  # pyarrow raises many kinds, all meaning that the file cannot be read
        raise TaskError(f"{file}: not a Parquet file that can be read: {error}") from error


def _value(place: str, column: str, scalar: pyarrow.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise TaskError(
            f"{place}: {column!r} is not UTF-8: {error.reason}, {error.object[error.start : error.end]!r}"
        ) from error
    except Exception as error:  # a type that has no like in Python
        raise TaskError(f"{place}: {column!r} is {scalar.type}, expected text.") from error
