"""JSON files: read within bounds, written with the same bytes for the same content."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparselet.errors import AbsurdShape, BadConfig, MissingFile, NonFiniteValue
from sparselet.io.atomic import atomic_write
from sparselet.io.printable import reason

_MAX_JSON_BYTES = 64 * 2**20


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as `json_bytes`, atomically."""
    with atomic_write(path) as file:
        file.write(json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """`content` as indented JSON with sorted keys. The same content gives the same bytes.

    Halves of surrogate pairs, which paths that are not UTF-8 have, are written as JSON's escapes. Raises NonFiniteValue,
    naming the field, for NaN and infinity, which JSON has no words for.
    """
    try:
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        field = next(_not_finite(content), None)
        if field is None:
            raise
        raise NonFiniteValue(f"{field} is NaN or infinite, which cannot be written as JSON.") from error
    return text.encode(errors="backslashreplace")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises MissingFile, AbsurdShape, BadConfig."""
    if not file.is_file():
        raise MissingFile(f"{file} is missing.")
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise AbsurdShape(f"{file} has {file.stat().st_size} bytes; the limit is {_MAX_JSON_BYTES}.")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{file} is not JSON: {reason(error)}") from error
    if not isinstance(content, dict):
        raise BadConfig(f"{file}: expected an object, got {type(content).__name__}.")
    return content


def _not_finite(content: Any, field: str = "") -> Iterator[str]:
    """The fields that hold NaN or infinity, by their keys joined by dots."""
    if isinstance(content, float) and not math.isfinite(content):
        yield field
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, (list, tuple)) else ()
    for key, value in parts:
        yield from _not_finite(value, f"{field}.{key}" if field else str(key))
