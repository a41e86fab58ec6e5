"""Time and memory of merging, against reading the same bytes, mergekit, and PEFT; docs/performance.md shows the outcome.

    python benchmarks/bench_merge.py --work WORK --mergekit-python PYTHON     the shapes of SmolLM2-135M, all libraries
    python benchmarks/bench_merge.py --work WORK --shapes phi3                the shapes of Phi-3-mini, sparselet alone
    python benchmarks/bench_merge.py --work WORK --clean                      delete what was written to WORK

Experts and checkpoints are written to WORK once (11.4 GB with mergekit, else 0.3 GB; Phi-3: 0.45 GB a layer). PYTHON is that
of an environment with mergekit 0.1.5. Needs Linux, and nothing else to be running: the script warns if something is.

All contestants take turns, round after round, each after a run of the floor, which also brings the experts back into the
page cache; between two runs the disk is left to finish what was written (`os.sync`). Each library has one process, in which
its imports are not timed and each contestant has run once before the first round. The contestants that take longest have a
process for each run and fewer rounds. Memory is measured in processes that do nothing else.
"""

import argparse
import dataclasses
import datetime
import json
import operator
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merging.race import SCRIPTS, Contestant, Race
from racing.record import command_of, load_before, machine

ROOT = Path(__file__).parent.parent

# TIES and Breadcrumbs keep half of an expert's entries, so that there is something to trim: of an expert of density 0.1 the
# published 0.2 (of the target's entries) would keep all.
KEPT = {"density": 0.05}
CRUMBS = {**KEPT, "gamma": 0.006}
MAIN = [
    ("overlap", {}),
    ("uniform", {}),
    ("arithmetic", {}),
    ("ties", {**KEPT, "trim": "target"}),
    ("ties", {**KEPT, "trim": "global"}),
    ("breadcrumbs", CRUMBS),
    ("dare", {}),
]
# mergekit's method, the parameters of each expert and of all, and ours that computes the same.
MERGEKIT = [
    ("task_arithmetic", {"weight": 1.0}, {}, MAIN[2]),
    ("ram", {}, {"epsilon": 0.0}, MAIN[0]),
    ("ties", {"weight": 1.0, **KEPT}, {}, MAIN[3]),
    ("breadcrumbs", {"weight": 1.0, **CRUMBS}, {}, MAIN[5]),
]
MODEL_LAYERS = {"smollm2": 30, "phi3": 32}
NAMES = {"smollm2": "merge.json", "phi3": "merge_phi3.json"}
MOST_MB = {"smollm2": 250, "phi3": 1.5 * 2**30 / 1e6}
PEFT = [("linear", {}), ("cat", {}), ("ties", {"density": 0.5}), ("dare_ties", {"density": 0.5})]


def reading(rounds: int) -> list[Contestant]:
    return [Contestant("floor", "floor", "load_file and sum", {}, rounds), Contestant("floor", "read", "read()", {}, rounds)]


def ours(methods: Sequence[tuple[str, dict[str, Any]]], rounds: int, *how: str) -> list[Contestant]:
    return [Contestant("sparselet", h, method, parameters, rounds) for method, parameters in methods for h in how]


def by_peft(methods: Sequence[tuple[str, dict[str, Any]]], rounds: int, inputs: dict[str, Any]) -> list[Contestant]:
    job = {"rank": inputs["rank"], "adapters": len(inputs["experts"])}
    return [Contestant("PEFT", "in memory", name, parameters, rounds, job, "by_peft.py") for name, parameters in methods]


def by_mergekit(heavy_rounds: int, rounds: int) -> list[Contestant]:
    """mergekit on whole checkpoints and on tensors in memory, and our own way to a whole checkpoint."""
    found = [
        Contestant("sparselet", "to a checkpoint", method, parameters, rounds, script="by_export.py")
        for method, parameters in (MAIN[0], MAIN[2])
    ]
    for how in ("in memory", "to a checkpoint"):
        for method, each, shared, same in MERGEKIT:
            job = {"each": each, "shared": shared}
            same_as = same if how == "to a checkpoint" else None
            found.append(
                Contestant("mergekit", how, method, {**each, **shared}, heavy_rounds, job, "by_mergekit.py", True, same_as)
            )
    return found


def field(asked: argparse.Namespace, inputs: dict[str, Any], methods: Sequence[str]) -> list[Contestant]:
    """Who takes part."""
    if asked.quick:
        once = ours(MAIN[4:5], 1, "to a file") + by_peft(PEFT[:1], 1, inputs)
        found = reading(asked.rounds)[:1] + ours(MAIN[:1], asked.rounds, "in memory", "to a file")
        return found + [dataclasses.replace(contestant, fresh=True) for contestant in once]
    if asked.shapes == "phi3":
        return reading(asked.rounds) + ours([MAIN[0], MAIN[3], MAIN[4]], asked.rounds, "to a file")
    named = {method for method, _ in MAIN}
    others = [(method, {}) for method in methods if method not in named]
    found = reading(asked.rounds) + ours(MAIN, asked.rounds, "in memory", "to a file") + ours(others, 1, "to a file")
    if not asked.skip_peft:
        found += by_peft(PEFT, asked.rounds, inputs)
    return found if asked.skip_mergekit else found + by_mergekit(asked.heavy_rounds, asked.rounds)


def rows_of(contestants: Sequence[Contestant], race: Race) -> list[dict[str, Any]]:
    """Each contestant's times, the median of their ratios to the floor just before them, and memory."""
    rows = []
    for place, (contestant, memory) in enumerate(zip(contestants, race.memory(contestants), strict=True)):
        answers = race.answers[place]
        seconds, ratios = [a["seconds"] for a in answers], [a.get("times_floor", 1.0) for a in answers]
        row = {name: getattr(contestant, name) for name in ("library", "how", "method", "parameters")}
        row |= {"seconds": seconds, "cpu_seconds": [a["cpu_seconds"] for a in answers], "ratios": ratios}
        row |= {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
        row |= {"times_floor": statistics.median(ratios), **memory}
        if place in race.differences:
            row["difference"] = race.differences[place]
        rows.append(row)
    return rows


def targets(shapes: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, and what came of it; only what was measured."""

    def found(library: str, how: str, method: str, value: str = "times_floor", **parameters: Any) -> float | None:
        for row in rows:
            is_it = (row["library"], row["how"], row["method"]) == (library, how, method)
            if is_it and parameters.items() <= row["parameters"].items():
                return row[value]
        return None

    ways = ("in memory", "to a file")
    aims: list[tuple[str, float | None, str, float | None]] = []
    if shapes == "smollm2":
        aims += [(f"overlap, {how}: times the floor", found("sparselet", how, "overlap"), "at most", 5) for how in ways]
        for how in ways:
            for trim in ("target", "global"):
                name = f"ties, {trim}, {how}: times the floor"
                aims.append((name, found("sparselet", how, "ties", trim=trim), "at most", 15))
        whole = "to a checkpoint"
        for own, theirs, limit in ((ways[1], whole, 30), (ways[0], ways[0], 30), (whole, whole, None)):
            slow, fast = found("mergekit", theirs, "task_arithmetic"), found("sparselet", own, "arithmetic")
            name = f"arithmetic, {own}: times as fast as mergekit's, {theirs}"
            aims.append((name, slow and fast and slow / fast, "at least", limit))
    for how in ways:
        peak = found("sparselet", how, "overlap", "peak_bytes")
        aims.append((f"overlap, {how}: MB over the import", peak and peak / 1e6, "at most", MOST_MB[shapes]))
    within = {"at most": operator.le, "at least": operator.ge}
    return [
        {
            "what": what,
            "found": value,
            "aim": f"{kind} {limit:.0f}" if limit else "none",
            "met": within[kind](value, limit) if limit else None,
        }
        for what, value, kind, limit in aims
        if value is not None
    ]


def prepare(asked: argparse.Namespace) -> dict[str, Any]:
    """Write what is missing of experts and checkpoints."""
    command = [sys.executable, str(SCRIPTS / "inputs.py"), str(asked.work), "--shapes", asked.shapes]
    command += ["--layers", str(asked.layers), "--experts", str(asked.experts)]
    if asked.shapes == "smollm2":
        command += ["--model", "small" if asked.quick else "packaged"]
    if asked.shapes == "smollm2" and not asked.skip_mergekit:
        command.append("--checkpoints")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed; its message is above")
    return json.loads(done.stdout)


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """The whole result, as it is written."""
    load = load_before()
    inputs = prepare(asked)
    started = datetime.datetime.now(datetime.UTC)
    with Race(inputs, asked.work / "merged", asked.mergekit_python) as race:
        contestants = field(asked, inputs, race.worker("by_sparselet.py").about["methods"])
        race.rounds(contestants)
        rows = rows_of(contestants, race)
    places = {str(asked.work): "WORK", str(asked.out): "OUT", str(asked.mergekit_python): "PYTHON"}
    settings = {name: getattr(asked, name) for name in ("shapes", "layers", "experts", "rounds", "heavy_rounds", "quick")}
    return {
        "command": command_of("bench_merge.py", places),
        "date": started.date().isoformat(),
        "minutes": round((datetime.datetime.now(datetime.UTC) - started).total_seconds() / 60, 1),
        "machine": {**machine(), "load_before": load},
        "versions": {"python": platform.python_version(), **race.versions},
        "settings": {**settings, "layers_of_model": MODEL_LAYERS[asked.shapes]},
        "inputs": {name: inputs[name] for name in ("bytes", "entries", "targets", "rank")},
        "rows": rows,
        "targets": targets(asked.shapes, rows),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where experts and checkpoints are written; not inside the repository")
    parser.add_argument("--out", type=Path, help="directory of the result (default: benchmarks/results)")
    parser.add_argument("--shapes", choices=NAMES, default="smollm2")
    parser.add_argument("--layers", type=int, help="default: 30 of SmolLM2-135M's 30, 4 of Phi-3-mini's 32")
    parser.add_argument("--experts", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heavy-rounds", type=int, default=2, help="rounds of mergekit, which takes minutes")
    parser.add_argument("--mergekit-python", metavar="PYTHON", help="of an environment with mergekit 0.1.5")
    parser.add_argument("--skip-mergekit", action="store_true")
    parser.add_argument("--skip-peft", action="store_true")
    parser.add_argument("--quick", action="store_true", help="2 experts of 2 layers, a few contestants: does it run at all?")
    parser.add_argument("--clean", action="store_true", help="delete what was written to WORK, and end")
    asked = parser.parse_args()
    if asked.quick:
        if asked.out is None:
            parser.error("--quick measures nothing worth keeping; give --out")
        asked.experts, asked.layers, asked.rounds, asked.skip_mergekit = 2, 2, 2, True
    elif asked.work is None:
        parser.error("give --work")
    if asked.work is not None and asked.work.resolve().is_relative_to(ROOT):
        parser.error(f"--work must not lie in {ROOT}")
    asked.layers = asked.layers or {"smollm2": 30, "phi3": 4}[asked.shapes]
    asked.skip_mergekit = asked.skip_mergekit or asked.shapes == "phi3"
    if not (asked.skip_mergekit or asked.mergekit_python or asked.clean):
        parser.error("give --mergekit-python, or --skip-mergekit")
    return asked


def main() -> None:
    asked = arguments()
    if asked.clean:
        for written in (*asked.work.glob("smollm2-*-layers"), *asked.work.glob("phi3-*-layers"), asked.work / "merged"):
            shutil.rmtree(written, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory(prefix="bench-merge-") as scratch:
        asked.work = asked.work or Path(scratch)
        results = measure(asked)
    out = asked.out or ROOT / "benchmarks/results"
    out.mkdir(parents=True, exist_ok=True)
    (out / NAMES[asked.shapes]).write_text(json.dumps(results, indent=2) + "\n")
    for target in results["targets"]:
        verdict = {True: "met", False: "MISSED", None: ""}[target["met"]]
        print(f"{verdict:6} {target['what']}: {target['found']:.1f} (aim: {target['aim']})")


if __name__ == "__main__":
    main()
