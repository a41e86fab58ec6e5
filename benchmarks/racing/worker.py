"""A process that does one library's jobs when asked, and says what each took.

A job comes as one line of JSON on the standard input, `{"do": name, …}`, and is answered by one line on the standard output.
What a job needs in memory before it starts (a model with its adapters, dense tensors) is prepared outside the measurement.
With `repeat` it is done so many times over, and the times are those of one. What goes wrong is answered as `error`.

Memory is that of /proc: `resident` now (VmRSS), and the `peak` since it was last reset (VmHWM), which is reset before each job.
`ru_maxrss` would not do: after fork and exec it begins at what the parent process had. Once a job has used a GPU, the time is
that until the GPU is done, `device_seconds` is its own measure of it (CUDA events), and `device_peak` what torch had allocated.
"""

import gc
import json
import os
import re
import sys
import time
import traceback
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
    gc.freeze()  # looking through all that was imported takes longer than many a job
    answer({"versions": {package: version(package) for package in packages}, **more})
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer(measured(jobs[job["do"]](job), job.get("repeat", 1), imported))
        except Exception as error:  # the race decides what becomes of it
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}".strip()[:300]})
        gc.collect()  # models are full of cycles; before the next job makes its own


def measured(start: Callable[[], Any], repeat: int, imported: int) -> dict[str, Any]:
    """Seconds of one run, bytes over those `imported`, and what was returned, if JSON can hold it."""
    gc.collect()
    gpu = _gpu()
    before = gpu.memory_allocated() if gpu else 0
    if gpu:
        gpu.synchronize()
        gpu.reset_peak_memory_stats()
    marks = [gpu.Event(enable_timing=True) for _ in range(2)] if gpu else []
    prepared = resident()
    reset_peak()
    wall, processor = time.perf_counter(), time.process_time()
    if gpu:
        marks[0].record()
    value = start()
    for _ in range(repeat - 1):
        value = start()
    if gpu:
        marks[1].record()
        gpu.synchronize()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    found = {"seconds": wall / repeat, "cpu_seconds": processor / repeat}
    found |= {"prepared": prepared - imported, "peak": peak() - imported}
    if gpu:
        found["device_seconds"] = marks[0].elapsed_time(marks[1]) / 1000 / repeat
        found |= {"device_prepared": before, "device_peak": gpu.max_memory_allocated()}
    return {**found, "value": _plain(value)}


def resident() -> int:
    """Bytes of this process in memory."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes in memory since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _gpu() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if getattr(value, "ndim", None) == 0:  # a scalar tensor, read only now that the clock has stopped
        return value.item()
    return value if isinstance(value, (int, float, str)) else None


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found.group(1))
