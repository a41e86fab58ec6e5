"""Checks of a merge method's parameters; errors name the parameter."""

import math
import sys
from collections.abc import Sequence

from sparselet.errors import ArgumentError


def require_finite_number(name: str, value: float) -> None:
    """Raise ArgumentError unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ArgumentError(f"{name} must be a finite number, got {value!r}.")


def require_fraction(name: str, value: float, *, allow_zero: bool = False, allow_one: bool = True) -> None:
    """Raise ArgumentError unless `value` lies between 0 and 1. allow_zero, allow_one: whether the ends are allowed."""
    require_finite_number(name, value)
    if not (0 < value < 1 or (allow_zero and value == 0) or (allow_one and value == 1)):
        raise ArgumentError(f"{name} must be in {'[' if allow_zero else '('}0, 1{']' if allow_one else ')'}, got {value!r}.")


def require_flag(name: str, value: bool) -> None:
    """Raise ArgumentError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name} must be true or false, got {value!r}.")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ArgumentError unless `value` is one of `choices`."""
    if value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def require_sum(method: str, weights: Sequence[float]) -> float:
    """The sum of the weights. Raises ArgumentError if it is 0 up to rounding."""
    total = math.fsum(weights)
    if abs(total) <= 1e-9 * max(map(abs, weights)):
        raise ArgumentError(f"{method} divides by the sum of the weights, which is 0.")
    return total


def require_seed(name: str, value: int) -> None:
    """Raise ArgumentError unless `value` is an integer in [0, 2⁶³)."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ArgumentError(f"{name} must be an integer of at least 0, got {value!r}.")
