"""Regular expressions from files, matched in bounded time: some take practically for ever on a short name."""

import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

from sparselet.errors import ConfigError, MissingExtra

LONGEST = 4096  # characters of an expression; longer ones are slow to compile
SECONDS = 1.0  # processor time for all matches of a call together, and
PER_MATCH = 20e-6  # seconds more for each pair of an expression and a name


def first_matches(patterns: Sequence[str], names: Iterable[str]) -> dict[str, int | None]:
    """For each name the position of the first pattern that matches its beginning, as `re.match` does; None if none matches.

    Raises ConfigError for an invalid regular expression, one of more than 4096 characters, or one that takes too long;
    MissingExtra.
    """
    return {name: None if match is None else match[0] for name, match in _first(patterns, list(names)).items()}


def groups(pattern: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """What the pattern's groups match, for each name that the pattern matches completely. Raises as `first_matches`."""
    complete = rf"(?:{pattern})\Z"
    return {name: match[1].groups() for name, match in _first([complete], list(names)).items() if match is not None}


def _first(patterns: Sequence[str], names: Sequence[str]) -> dict[str, tuple[int, Any] | None]:
    compiled = [_compiled(pattern) for pattern in patterns]
    end = time.process_time() + SECONDS + PER_MATCH * len(compiled) * len(names)
    return {name: _match(compiled, name, end) for name in names}


def _match(compiled: Sequence[Any], name: str, end: float) -> tuple[int, Any] | None:
    for place, pattern in enumerate(compiled):
        try:
            match = pattern.match(name, timeout=max(0.001, end - time.process_time()))
        except (TimeoutError, MemoryError) as error:
            raise ConfigError(
                f"{pattern.pattern!r:.200} takes too long to match {name!r:.100}; write it more simply."
            ) from error
        if match:
            return place, match
    return None


def _compiled(pattern: str) -> Any:
    """The expression compiled by `regex`, which has time limits, if the standard library accepts it too."""
    try:
        import regex
    except ModuleNotFoundError as error:
        raise MissingExtra("regular expressions from a file need regex: pip install 'sparselet[train]'.") from error
    if len(pattern) > LONGEST:
        raise ConfigError(f"{pattern!r:.60}… has {len(pattern)} characters; a regular expression has at most {LONGEST}.")
    try:
        re.compile(pattern)
        return regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ConfigError(f"{pattern!r:.200} is not a regular expression: {error}.") from error
