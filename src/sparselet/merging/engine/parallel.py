"""Work on several targets at once, within a bound on memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from sparselet.errors import ArgumentError
from sparselet.kernels.threads import one_thread

Item = TypeVar("Item")
WorkResult = TypeVar("WorkResult")

MAX_MEMORY = 160 * 2**20


def map_in_order(
    work: Callable[[Item], WorkResult], items: Iterable[Item], bytes_of: Callable[[Item], int], workers: int | None = None
) -> Generator[WorkResult]:
    """`work` on each item, by several threads; results come in the order of the items.

    bytes_of: the memory that work on an item takes. Items are started ahead of the results while all running ones take less
        than 160 MiB together and are at most two per worker; a single item may take more.
    workers: threads; by default as many as torch uses. With one worker, torch's own threads work within each item; with more,
        each uses one thread, and torch's setting is restored when the generator is closed.

    Raises ArgumentError at once for less than one worker; and what `work` raises, in the item's turn: later items are then not
    started.
    """
    if workers is not None and workers < 1:
        raise ArgumentError(f"workers must be at least 1, got {workers}.")
    workers = torch.get_num_threads() if workers is None else workers
    return (work(item) for item in items) if workers == 1 else _by_threads(work, items, bytes_of, workers)


def _by_threads(
    work: Callable[[Item], WorkResult], items: Iterable[Item], bytes_of: Callable[[Item], int], workers: int
) -> Generator[WorkResult]:
    pending: deque[tuple[Future[WorkResult], int]] = deque()
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                size = bytes_of(item)
                while pending and (len(pending) >= 2 * workers or sum(s for _, s in pending) + size > MAX_MEMORY):
                    yield pending.popleft()[0].result()
                pending.append((pool.submit(work, item), size))
            while pending:
                yield pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.cancel()
