"""Available memory, so that too large a request is refused, by name, before memory is allocated."""

import contextlib
import sys
from pathlib import Path

from sparselet.errors import NotEnoughMemory

_SMALL = 2**28  # bytes below which nothing is checked
_CGROUP = Path("/sys/fs/cgroup")


def require_memory(size: int, description: str) -> None:
    """Raise NotEnoughMemory, naming `description`, if `size` bytes are more than this process can get now."""
    free = available() if size > _SMALL else None
    if free is not None and size > free:
        raise NotEnoughMemory(f"{description} takes {size / 2**30:.1f} GiB of memory, but there are {free / 2**30:.1f} GiB.")


def available() -> int | None:
    """Bytes that this process can get now: the least that machine, control group and limit of the process leave. None where
    the system does not report them."""
    limits = [free for free in (_of_machine(), _of_group(), _of_process()) if free is not None]
    return max(0, min(limits)) if limits else None


def _of_machine() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 2**10
    return None


def _of_group() -> int | None:
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        return int((_CGROUP / "memory.max").read_text()) - int((_CGROUP / "memory.current").read_text())
    return None


def _of_process() -> int | None:
    if sys.platform != "linux":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    with contextlib.suppress(OSError, ValueError, IndexError):
        return limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return None
