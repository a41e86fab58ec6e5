"""One of torch's threads, where more would wait for one another."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch uses one thread within the block, or the function that this decorates.

    For work that is spread over threads already, and on matrices of a few hundred rows, where torch's threads wait for one
    another longer than they work, many times so on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
