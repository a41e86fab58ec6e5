"""`Latest`: values that are computed once and kept while they are used, within a bound."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Latest(Generic[Key, Value]):
    """Values by key, of which those used last stay. Any thread may use it.

    limit: of the sum of the values' sizes. size_of: a value's size; by default each counts 1. size: the sum.
    """

    def __init__(self, limit: int, size_of: Callable[[Value], int] | None = None) -> None:
        self.limit, self.size = limit, 0
        self._size_of = size_of or (lambda _: 1)
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        """The kept value, which is used now; None if there is none."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def keep(self, key: Key, value: Value) -> Value:
        """Keep a value, in place of one with its key. The least recently used ones leave, and it is returned."""
        with self._lock:
            replaced = self._values.pop(key, None)
            self._values[key] = value
            self.size += self._size_of(value) - (0 if replaced is None else self._size_of(replaced))
            while self.size > self.limit:
                _, removed = self._values.popitem(last=False)
                self.size -= self._size_of(removed)
        return value
