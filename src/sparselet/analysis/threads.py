"""One thread for work on many matrices of a few hundred rows."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch uses one thread within the block, or the function that this decorates.

    On matrices of this size its threads wait for one another longer than they work, many times so on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
