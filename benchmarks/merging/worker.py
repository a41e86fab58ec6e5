"""A process that does one library's jobs when asked, and says what each took.

A job comes as one line of JSON on the standard input, `{"do": name, …}`, and is answered by one line on the standard output.
What a job needs in memory before it starts (a model with its adapters, dense tensors) is prepared outside the measurement.

Memory is that of /proc: `resident` now (VmRSS), and the `peak` since it was last reset (VmHWM), which is reset before each job.
`ru_maxrss` would not do: after fork and exec it begins at what the parent process had.
"""

import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Given the job, prepares it and returns what is to be measured.
Job = Callable[[dict[str, Any]], Callable[[], Any]]


def serve(jobs: dict[str, Job], packages: tuple[str, ...], **more: Any) -> None:
    """Announce the packages' versions and what else is given, then do jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the answers

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    imported = resident()
    answer({"versions": {package: version(package) for package in packages}, **more})
    for line in sys.stdin:
        job = json.loads(line)
        start = jobs[job["do"]](job)
        gc.collect()
        prepared = resident()
        reset_peak()
        wall, processor = time.perf_counter(), time.process_time()
        value = start()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        memory = {"prepared": prepared - imported, "peak": peak() - imported}
        found = value if isinstance(value, (int, float, str)) else None
        answer({"seconds": wall, "cpu_seconds": processor, **memory, "value": found})
        del start, value


def resident() -> int:
    """Bytes of this process in memory."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes in memory since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found.group(1))
