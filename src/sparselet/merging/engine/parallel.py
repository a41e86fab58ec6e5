"""Working on several targets at once, within a bound on memory."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from sparselet.errors import ArgumentError

Item = TypeVar("Item")
Result = TypeVar("Result")

MEMORY = 160 * 2**20


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], bytes_of: Callable[[Item], int], workers: int | None = None
) -> Generator[Result]:
    """`work` on each item, by several threads; results come in the order of the items.

    bytes_of: what an item takes while it is worked on. Items are started ahead of the results only while all that are under
        way take less than 160 MiB together, and are no more than two a worker; one alone may take more.
    workers: threads; by default as many as torch would use. With one, torch's own threads work within each item; with more,
        each works with one thread, and torch's setting is restored at the end, which is when the generator is closed.

    Raises ArgumentError for no workers, at once; and what `work` raises, in the item's turn: later items are not started then.
    """
    if workers is not None and workers < 1:
        raise ArgumentError(f"workers must be at least 1, got {workers}.")
    workers = torch.get_num_threads() if workers is None else workers
    return (work(item) for item in items) if workers == 1 else _by_threads(work, items, bytes_of, workers)


def _by_threads(
    work: Callable[[Item], Result], items: Iterable[Item], bytes_of: Callable[[Item], int], workers: int
) -> Generator[Result]:
    pending: deque[tuple[Future[Result], int]] = deque()
    with _one_thread_each(), ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                size = bytes_of(item)
                while pending and (len(pending) >= 2 * workers or sum(s for _, s in pending) + size > MEMORY):
                    yield pending.popleft()[0].result()
                pending.append((pool.submit(work, item), size))
            while pending:
                yield pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.cancel()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
