"""What a benchmark writes beside its figures: the command, the machine, and what was aimed at."""

import argparse
import datetime
import json
import operator
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from racing.process import progress
from racing.race import Race

BUSY = 0.5  # a load above this means that something else is running
WITHIN = {"at most": operator.le, "at least": operator.ge}


def load_before() -> float:
    """The load of the last minute, with a warning where it spoils what is to be measured."""
    load = os.getloadavg()[0]
    if load > BUSY:
        progress(f"the load is {load:.1f}: other processes are running, and times will mean little")
    return load


def machine() -> dict[str, Any]:
    """The processor, its cores that may be used, the memory, and how many threads were asked for."""
    processor = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "processor": processor.group(1) if processor else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.group(1)) / 2**20, 1) if memory else None,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def command_of(script: str, places: Mapping[str, str]) -> str:
    """The command as given, with the names in `places` for paths of this machine."""
    threads = [f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"] if "OMP_NUM_THREADS" in os.environ else []
    words = [*threads, "python", f"benchmarks/{script}", *(places.get(word, word) for word in sys.argv[1:])]
    return shlex.join(words)


def settings_of(asked: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON, without those that name places of this machine."""
    return {key: value for key, value in vars(asked).items() if not isinstance(value, Path)}


def aim(what: str, found: float | None, kind: str = "at most", limit: float | None = None) -> dict[str, Any]:
    """A figure beside what was aimed at; without a limit it is only told. `found` is None for what was not measured."""
    met = None if limit is None or found is None else WITHIN[kind](found, limit)
    return {"what": what, "found": found, "aim": f"{kind} {limit:g}" if limit is not None else "none", "met": met}


def found(rows: Sequence[Mapping[str, Any]], library: str, name: str, group: str | None = None) -> Mapping[str, Any]:
    """A contestant's row, or an empty one if it was not measured."""
    for row in rows:
        if (row["library"], row["name"]) == (library, name) and group in (None, row["group"]) and "error" not in row:
            return row
    return {}


def middle(ratios: Mapping[str, Sequence[float]] | None, kind: str) -> float | None:
    """The median of a row's ratios, of wall time or of CPU time."""
    return None if not ratios else ratios[kind][1]


def run_benchmark(
    script: str,
    asked: argparse.Namespace,
    name: str,
    measure: Callable[[Race], dict[str, Any]],
    places: Mapping[str, str] | None = None,
) -> None:
    """Measure, and write NAME-MACHINE-DATE.json: command, machine, versions, settings, and `rows` and `targets` of `measure`.

    places: names for paths in the command. Exits with the list `wrong` of `measure`, if it is not empty.
    """
    load, started = load_before(), datetime.datetime.now(datetime.UTC)
    with Race(together=asked.quick) as race:
        content = measure(race)
    results = {
        "command": command_of(script, {str(asked.out): "OUT", **(places or {})}),
        "date": started.date().isoformat(),
        "minutes": round((datetime.datetime.now(datetime.UTC) - started).total_seconds() / 60, 1),
        "machine": {**machine(), **race.about, "load_before": load},
        "versions": {"python": platform.python_version(), **race.versions},
        "settings": settings_of(asked),
        **content,
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / f"{name}-{slug(results)}-{results['date']}.json").write_text(json.dumps(results, indent=2) + "\n")
    print_targets(results["targets"])
    if results.get("wrong"):
        sys.exit("\n".join(results["wrong"]))


def slug(results: Mapping[str, Any]) -> str:
    """The machine in a file's name: `amd-epyc-2-cores`, or the GPU that was measured, `nvidia-h100-80gb-hbm3`."""
    about = results["machine"]
    gpu = about.get("gpu") if results["settings"].get("device") == "cuda" else None
    return re.sub("[^a-z0-9]+", "-", (gpu or f"{about['processor']} {about['cores']} cores").lower()).strip("-")


def print_targets(targets: Sequence[Mapping[str, Any]]) -> None:
    for target in targets:
        verdict = {True: "met", False: "MISSED", None: ""}[target["met"]]
        value = "not measured" if target["found"] is None else f"{target['found']:.3g}"
        print(f"{verdict:6} {target['what']}: {value} (aim: {target['aim']})")
