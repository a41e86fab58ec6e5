"""Refusing a method's parameter that is out of range, by name."""

import math
import sys
from collections.abc import Sequence

from sparselet.errors import ArgumentError


def require_finite_number(name: str, value: float) -> None:
    """Raise ArgumentError unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ArgumentError(f"{name} must be a finite number, got {value!r}.")


def require_fraction(name: str, value: float, *, zero: bool = False, one: bool = True) -> None:
    """Raise ArgumentError unless `value` lies between 0 and 1; `zero` and `one` say whether the ends are allowed."""
    require_finite_number(name, value)
    if not (0 < value < 1 or (zero and value == 0) or (one and value == 1)):
        raise ArgumentError(f"{name} must be in {'[' if zero else '('}0, 1{']' if one else ')'}, got {value!r}.")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ArgumentError unless `value` is one of `choices`."""
    if value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def require_sum(method: str, weights: Sequence[float]) -> float:
    """The sum of the weights. Raises ArgumentError if it is 0, but for rounding."""
    whole = math.fsum(weights)
    if abs(whole) <= 1e-9 * max(map(abs, weights)):
        raise ArgumentError(f"{method} divides by the sum of the weights, which is 0. Give other weights.")
    return whole


def require_seed(name: str, value: int) -> None:
    """Raise ArgumentError unless `value` is an integer in [0, 2⁶³)."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ArgumentError(f"{name} must be an integer of at least 0, got {value!r}.")
