"""One test over many files, which names each that fails."""

from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def for_every(items: Iterable[Item]) -> Callable[[Callable[[Item], None]], Callable[[], None]]:
    """Make one test of a check of one item: a test for each item costs more than what it checks."""

    def decorate(check: Callable[[Item], None]) -> Callable[[], None]:
        def test() -> None:
            failures = {}
            for item in items:
                try:
                    check(item)
                except AssertionError as error:
                    failures[str(item)] = str(error)
            assert not failures, "\n".join(f"{item}: {reason}" for item, reason in failures.items())

        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        return test

    return decorate
