"""A worker process: jobs come as JSON lines on standard input, reports go as JSON lines to standard output.

It ends, in the middle of a job too, when standard input does: its parent is gone or has no more work.
"""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TextIO

from transformers.utils import logging as transformers_logging

from sparselet.studies.engine.jobs import Job
from sparselet.studies.engine.perform import Performer, Places, Report
from sparselet.studies.engine.store import Store

SECOND = 1.0


def main() -> None:
    """Work until standard input ends. The first line tells where: `out`, `tasks` and `model`."""
    out = _own_stdout()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    quiet()
    start = json.loads(lines.get())
    performer = Performer(Store(start["out"]), Places(start["tasks"], start["model"]))
    _say(out, {"what": "ready"})
    while True:
        job = Job.from_json(json.loads(lines.get()))
        performer.perform(job, seldom(lambda report: _say(out, asdict(report))))
        _say(out, {"what": "end", "key": job.key})


def quiet() -> None:
    """No progress bars or advice of libraries."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def seldom(tell: Callable[[Report], None]) -> Callable[[Report], None]:
    """`tell`, with progress at most once a second."""
    last = -SECOND

    def telling(report: Report) -> None:
        nonlocal last
        if report.what == "progress" and time.monotonic() - last < SECOND:
            return
        last = time.monotonic()
        tell(report)

    return telling


def _own_stdout() -> TextIO:
    """What was standard output; whatever else is printed goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def _read(lines: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _say(out: TextIO, content: Mapping[str, Any]) -> None:
    out.write(json.dumps(content) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
