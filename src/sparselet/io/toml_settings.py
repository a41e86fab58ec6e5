"""TOML files, and their tables as frozen dataclasses: unknown keys, missing keys and wrong types are refused by name."""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from sparselet.errors import ConfigError
from sparselet.io.printable import reason

Settings = TypeVar("Settings")

_MAX_BYTES = 2**20
_TYPE_NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def read_toml(file: Path) -> dict[str, Any]:
    """The content of a TOML file of at most 1 MiB. Raises ConfigError."""
    try:
        with open(file, "rb") as opened:  # which may be a pipe, such as of a shell's <(…)
            raw = opened.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise ConfigError(f"{file} has more than {_MAX_BYTES} bytes, the limit for settings.")
        content = tomllib.loads(raw.decode())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not TOML: {reason(error)}") from error
    _refuse_long_integers(file, content)
    return content


def parse_table(settings: type[Settings], table: Mapping[str, Any], where: str = "") -> Settings:
    """The dataclass `settings` filled from a TOML table; lists become tuples, and whole numbers floats in fields of floats.

    Field types: text, numbers, booleans, `Any`, `Literal`, tuples and mappings of these, dataclasses (tables), and each of them
    `| None`. where: prefix of the keys in messages (`experts[0].`).

    Raises ConfigError for an unknown key, a missing key, and a value of another type; and what `settings` raises.
    """
    hints = get_type_hints(settings)
    for key in table:
        if key not in hints:
            raise ConfigError(f"unknown key {where + key!r}; the keys are {', '.join(hints)}.")
    for field in fields(settings):  # type: ignore[arg-type]
        if field.default is MISSING and field.default_factory is MISSING and field.name not in table:
            raise ConfigError(f"{where}{field.name} is missing.")
    return settings(**{key: _parse(value, hints[key], where + key) for key, value in table.items()})


def _parse(value: Any, hint: Any, key: str) -> Any:
    """A TOML value as a field's type. Raises ConfigError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return _parse(value, next(argument for argument in arguments if argument is not NoneType), key)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{key} must be a list, got {value!r}.")
        return tuple(_parse(entry, arguments[0], f"{key}[{i}]") for i, entry in enumerate(value))
    if is_dataclass(hint) or origin not in (None, Literal):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be a table, got {value!r}.")
        if is_dataclass(hint):
            return parse_table(hint, value, f"{key}.")  # type: ignore[arg-type]
        return {name: _parse(entry, arguments[1], f"{key}.{name}") for name, entry in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if hint in _TYPE_NAMES and type(value) is not hint:
        raise ConfigError(f"{key} must be {_TYPE_NAMES[hint]}, got {value!r}.")
    return value


def _refuse_long_integers(file: Path, value: Any) -> None:
    """Raise ConfigError for an integer that TOML does not have: beyond 64 bits."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{file} is not TOML: an integer is beyond 64 bits.")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_long_integers(file, part)
