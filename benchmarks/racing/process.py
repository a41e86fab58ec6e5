"""Processes that run the contestants' scripts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

BENCHMARKS = Path(__file__).parent.parent


class Worker:
    """A process that runs one of the scripts, and what it said of itself."""

    def __init__(self, script: Path, python: str = sys.executable) -> None:
        self._process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=script.parent,
        )
        self._about: dict[str, Any] | None = None

    @property
    def about(self) -> dict[str, Any]:
        """The versions of its packages, and what else it announces, once it has imported them."""
        if self._about is None:
            self._about = self._answer()
        return self._about

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        """A job's answer; see worker.py."""
        assert self.about
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self._process.args} ended with {self._process.wait()}; its message is above")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def environment() -> dict[str, str]:
    """That of a contestant: no hub, no threads of tokenizers, and the modules of this directory."""
    paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(paths)}


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def memory_of(process: int, kind: str = "VmHWM") -> int:
    """The highest memory of a process and those that it has started, or with VmRSS that of now, in bytes."""
    processes = [process, *(child.pid for child in psutil.Process(process).children(recursive=True))]
    found = [re.search(rf"{kind}:\s+(\d+)", Path(f"/proc/{each}/status").read_text()) for each in processes]
    return sum(1024 * int(match[1]) for match in found if match)
