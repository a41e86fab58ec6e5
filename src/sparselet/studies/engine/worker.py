"""A worker process: reads jobs as JSON lines from standard input, writes events as JSON lines to standard output.

It exits, also in the middle of a job, when standard input is closed: its parent is gone or has no more work.
"""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TextIO

from transformers.utils import logging as transformers_logging

from sparselet.studies.engine.job_runner import JobRunner, StudySources
from sparselet.studies.engine.jobs import EmitEvent, Event, Job
from sparselet.studies.engine.store import Store

SECOND = 1.0


def main() -> None:
    """Run jobs until standard input is closed. The first line has `out`, `tasks` and `model`."""
    out = _redirect_stdout()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    silence_libraries()
    start = json.loads(lines.get())
    runner = JobRunner(Store(start["out"]), StudySources(start["tasks"], start["model"]))
    _write_line(out, {"state": "ready"})
    while True:
        job = Job.from_json(json.loads(lines.get()))
        runner.run(job, throttle(lambda event: _write_line(out, asdict(event))))
        _write_line(out, asdict(Event("end", job.key)))


def silence_libraries() -> None:
    """Turn off progress bars and warnings of transformers."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def throttle(emit: EmitEvent) -> EmitEvent:
    """`emit`, with progress at most once a second."""
    last = -SECOND

    def emit_if_due(event: Event) -> None:
        nonlocal last
        if event.state == "progress" and time.monotonic() - last < SECOND:
            return
        last = time.monotonic()
        emit(event)

    return emit_if_due


def _redirect_stdout() -> TextIO:
    """The original standard output; all other prints go to standard error from now on."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def _read(lines: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _write_line(out: TextIO, content: Mapping[str, Any]) -> None:
    out.write(json.dumps(content) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
