"""Killing a process at a chosen moment of its work on files, and doing the same again.

A moment is an event of Python's audit hooks that changes files (opening to write, `mkdir`, `rename`, `remove`, …), a flush to
the disk, or an exchange of directories: the process is sent a signal just before it happens. All moments are tried, rather
than a sample, with SPARSELET_KILLS=all.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sparselet.io import atomic, temporaries

EVENTS = {"os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.link", "os.chmod", "os.symlink", "os.truncate"}
ALL = os.environ.get("SPARSELET_KILLS") == "all"  # every moment, which takes long, rather than a sample


class Clock:
    """Counts moments, and sends this process a signal at one of them."""

    def __init__(self, at: int, number: int) -> None:
        self.now, self.at, self.number = 0, at, number

    def tick(self) -> None:
        self.now += 1
        if self.now == self.at:
            os.kill(os.getpid(), self.number)

    def audit(self, event: str, arguments: tuple) -> None:
        writing = event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)) and "/dev/" not in str(arguments[0])
        if writing or event in EVENTS:
            self.tick()

    def ticking(self, function: Callable) -> Callable:
        def call(*args, **kwargs):
            self.tick()
            return function(*args, **kwargs)

        return call


def run(work: Callable[[], object], at: int = 0, number: int = signal.SIGKILL) -> tuple[int, int]:
    """Do `work` in a child that gets a signal at moment `at`. Its exit code (1 for an error), and how many moments it has."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 99
        try:
            torch.set_num_threads(1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            clock = Clock(at, number)
            os.fsync = clock.ticking(os.fsync)
            atomic.exchange = clock.ticking(temporaries.exchange)
            sys.addaudithook(clock.audit)
            try:
                work()
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            except KeyboardInterrupt:
                code = 130
            except Exception:
                code = 1
            os.write(writing, str(clock.now).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as answer:
        moments = answer.read()
    return os.waitstatus_to_exitcode(status), int(moments or 0)


def moments(total: int, sample: int) -> Sequence[int]:
    """All moments, or so many of them, evenly spread up to the last."""
    assert total > sample
    return range(1, total + 1) if ALL else [total * (i + 1) // sample for i in range(sample)]


def tree(directory: Path) -> dict[str, bytes | None]:
    """All that lies in a directory: the bytes of its files, None for directories."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))
    }
