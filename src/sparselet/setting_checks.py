"""Checks of numbers and choices in settings, by the types of a dataclass's fields."""

import math
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sparselet.errors import ConfigError

LARGEST = 2**32  # of counts, steps and seeds; numpy's generators take no larger seed


def check_settings(settings: Any) -> None:
    """Raise ConfigError, naming the field, for a value that is not a number, not finite, or not within ±2³² where the type is
    one, and for a value outside a Literal. settings: a dataclass; each value in tuples and mappings is checked."""
    for name, hint in get_type_hints(type(settings)).items():
        _check(name, vars(settings)[name], hint)


def check_at_least(settings: Any, bound: float, *names: str) -> None:
    """Raise ConfigError, naming the field, if one of these fields is below `bound`; None passes. settings: a dataclass."""
    for name in names:
        value = vars(settings)[name]
        if value is not None and value < bound:
            raise ConfigError(f"{name} must be at least {bound}, got {value}.")


def parse_count(name: str, value: Any) -> int | None:
    """A count from a whole number or text such as "200k", "1.5M" or "1e6"; None stays. Raises ConfigError, naming the field."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([kM]?)", str(value).strip())
    number = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6}[match[2]] if match and not isinstance(value, bool) else math.nan
    if value is not None and not (number.is_integer() and number < LARGEST):
        raise ConfigError(f"{name} must be a whole number below 2**32 such as 200k or 1.5M, got {value!r:.60}.")
    return None if value is None else int(number)


def check_seed(seed: Any) -> None:
    """Raise ConfigError unless `seed` is an integer in [0, 2³²)."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < LARGEST:
        raise ConfigError(f"seed must be an integer of at least 0 and below 2**32, got {seed!r:.60}.")


def _check(name: str, value: Any, hint: Any) -> None:
    literals = [part for part in get_args(hint) if get_origin(part) is Literal]
    types = (set(get_args(hint)) or {hint}) - {*literals}
    if any(value in get_args(literal) for literal in literals):
        return
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{name} must be one of {', '.join(map(str, get_args(hint)))}, got {value!r:.60}.")
    elif types & {int, float} and types <= {int, float, NoneType}:
        if value is not None or NoneType not in types:
            _check_number(name, value, float in types)
    elif get_origin(hint) is tuple and types & {int, float} and isinstance(value, (tuple, list)):
        for entry in value:
            _check_number(name, entry, float in types)
    elif isinstance(value, Mapping) and float in types:
        for key, entry in value.items():
            _check_number(f"{name}.{key}", entry, True)


def _check_number(name: str, value: Any, fractions: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float) if fractions else int):
        raise ConfigError(f"{name} must be {'a number' if fractions else 'a whole number'}, got {value!r:.60}.")
    if (isinstance(value, float) and not math.isfinite(value)) or not -LARGEST < value < LARGEST:
        raise ConfigError(f"{name} must be a finite number below 2**32, got {value!r:.60}.")
