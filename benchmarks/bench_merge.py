"""Time and memory of merging, against reading the same bytes, mergekit, and PEFT; docs/performance.md shows the outcome.

    python benchmarks/bench_merge.py --work WORK --mergekit-python PYTHON     the shapes of SmolLM2-135M, all libraries
    python benchmarks/bench_merge.py --work WORK --shapes phi3                the shapes of Phi-3-mini, sparselet alone
    python benchmarks/bench_merge.py --work WORK --clean                      delete what was written to WORK

Experts and checkpoints are written to WORK once (11.4 GB with mergekit, else 0.3 GB; Phi-3: 0.45 GB a layer). PYTHON is that
of an environment with mergekit 0.1.5. Needs Linux, and nothing else to be running: the script warns if something is.

All contestants take turns, round after round, each after a run of the floor, whose process first brings the experts back into
the page cache. mergekit, which takes minutes, has fewer rounds. Memory is measured in processes that do nothing else.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from merge_inputs import DENSITY, SHAPES, write_checkpoints, write_experts
from racing.options import FLOOR, ROOT
from racing.race import OURS, Contestant, Race
from racing.record import aim, found, middle, run_benchmark

from sparselet import METHODS
from sparselet.models import packaged_model

# TIES and Breadcrumbs keep half of an expert's entries, so that there is something to trim: of an expert of density 0.1 the
# published 0.2 (of the target's entries) would keep all.
KEPT = {"density": 0.05}
CRUMBS = {**KEPT, "gamma": 0.006}
Merge = tuple[str, dict[str, Any]]
OVERLAP, ARITHMETIC = ("overlap", {}), ("arithmetic", {})
TIES: dict[str, Merge] = {trim: ("ties", {**KEPT, "trim": trim}) for trim in ("target", "global")}
MAIN: list[Merge] = [OVERLAP, ("uniform", {}), ARITHMETIC, *TIES.values(), ("breadcrumbs", CRUMBS), ("dare", {})]
# mergekit's method, the parameters of each expert and of all, and ours that computes the same.
MERGEKIT: list[tuple[str, dict[str, Any], dict[str, Any], Merge]] = [
    ("task_arithmetic", {"weight": 1.0}, {}, ARITHMETIC),
    ("ram", {}, {"epsilon": 0.0}, OVERLAP),
    ("ties", {"weight": 1.0, **KEPT}, {}, TIES["target"]),
    ("breadcrumbs", {"weight": 1.0, **CRUMBS}, {}, ("breadcrumbs", CRUMBS)),
]
PEFT: list[Merge] = [("linear", {}), ("cat", {}), ("ties", {"density": 0.5}), ("dare_ties", {"density": 0.5})]
MEMORY, FILE, CHECKPOINT = "in memory", "to a file", "to a checkpoint"
DIFFERENCE = "merge difference"
MOST_MB = {"smollm2": 250, "phi3": 1.5 * 2**30 / 1e6}
LAYERS = {"smollm2": 30, "phi3": 4}  # of 30 and of 32


def name_of(method: str, parameters: dict[str, Any], way: str) -> str:
    values = ", ".join(f"{name} {value}" for name, value in parameters.items() if name != "weight")
    return f"{method} ({values}), {way}" if values else f"{method}, {way}"


def contestants(asked: argparse.Namespace) -> list[Contestant]:
    """The floor first. A LoRA of the job's rank has as many parameters as an expert has entries."""
    shapes = SHAPES[asked.shapes]
    sums, products = sum(m + n for m, n in shapes.values()), sum(m * n for m, n in shapes.values())
    experts = write_experts(
        asked.work / f"{asked.shapes}-{asked.layers}-layers" / "experts", shapes, asked.layers, asked.experts
    )
    job: dict[str, Any] = {
        "adapters": experts,
        "device": "cpu",
        "out": str(asked.work / "merged/ours"),
        "rank": round(DENSITY * products / sums),
    }
    if asked.shapes == "smollm2":
        job["model"] = "random:tiny" if asked.quick else str(packaged_model())
    entrants = [
        Contestant(FLOOR, "load_file and sum", "by_torch.py", {"do": "read", **job}, "by_torch.py"),
        Contestant(FLOOR, "read()", "by_torch.py", {"do": "read bytes", **job}, "by_torch.py"),
    ]

    def add(library: str, script: str, merges: list[Merge], *ways: str, **more: Any) -> None:
        for way in ways:
            for method, parameters in merges:
                merge = {"do": f"merge {way}", **job, "method": method, "parameters": parameters}
                entrants.append(Contestant(library, name_of(method, parameters, way), script, merge, script, **more))

    if asked.quick:
        add(OURS, "by_sparselet.py", [OVERLAP, TIES["global"]], MEMORY, FILE)
        add("PEFT", "by_peft.py", PEFT[:1], MEMORY)
    elif asked.shapes == "phi3":
        add(OURS, "by_sparselet.py", [OVERLAP, *TIES.values()], FILE)
    else:
        named = {method for method, _ in MAIN}
        add(OURS, "by_sparselet.py", MAIN, MEMORY, FILE)
        add(OURS, "by_sparselet.py", [(method, {}) for method in METHODS if method not in named], FILE, rounds=1)
        add(OURS, "by_sparselet.py", [OVERLAP, ARITHMETIC], CHECKPOINT)
        add("PEFT", "by_peft.py", PEFT, MEMORY)
    return entrants + (by_mergekit(asked, job) if asked.mergekit_python else [])


def by_mergekit(asked: argparse.Namespace, job: dict[str, Any]) -> list[Contestant]:
    """Each run has a process, and each checkpoint a directory, for `compare`."""
    directory = asked.work / f"smollm2-{asked.layers}-layers" / "checkpoints"
    job = {**job, "checkpoints": write_checkpoints(directory, Path(job["model"]), job["adapters"])}
    entrants = []
    for way in (MEMORY, CHECKPOINT):
        for method, each, shared, _ in MERGEKIT:
            merge = {
                **job,
                "do": f"merge {way}",
                "method": method,
                "each": each,
                "shared": shared,
                "out": str(asked.work / "merged" / method),
            }
            name = name_of(method, {**each, **shared}, way)
            entrants.append(
                Contestant("mergekit", name, "by_mergekit.py", merge, None, asked.heavy_rounds, asked.mergekit_python)
            )
    return entrants


def compare(race: Race, entrants: list[Contestant], rows: list[dict[str, Any]]) -> None:
    """Put into the rows of mergekit's checkpoints by how much their deltas differ from ours."""
    same = {method: ours for method, _, _, ours in MERGEKIT}
    for one, row in zip(entrants, rows, strict=True):
        if one.library == "mergekit" and one.job["do"].endswith(CHECKPOINT) and "error" not in row:
            method, parameters = same[one.job["method"]]
            job = {
                **one.job,
                "do": "merge difference",
                "method": method,
                "parameters": parameters,
                "checkpoint": one.job["out"],
            }
            row["value"] = race.ask(Contestant(OURS, one.name, "by_sparselet.py", job, "by_sparselet.py"))["value"]


def targets(shapes: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured ratios and memory beside the aims."""

    def times(library: str, merge: Merge, way: str) -> float | None:
        return middle(found(rows, library, name_of(*merge, way), "merge").get("times_floor"), "wall")

    aims = []
    if shapes == "smollm2":
        aims += [aim(f"overlap, {way}: times the floor", times(OURS, OVERLAP, way), "at most", 5) for way in (MEMORY, FILE)]
        for way in (MEMORY, FILE):
            for trim, merge in TIES.items():
                aims.append(aim(f"ties, {trim}, {way}: times the floor", times(OURS, merge, way), "at most", 15))
        for own, theirs, limit in ((FILE, CHECKPOINT, 30), (MEMORY, MEMORY, 30), (CHECKPOINT, CHECKPOINT, None)):
            slow, fast = times("mergekit", ("task_arithmetic", {}), theirs), times(OURS, ARITHMETIC, own)
            what = f"arithmetic, {own}: times as fast as mergekit's, {theirs}"
            aims.append(aim(what, slow and fast and slow / fast, "at least", limit))
    for way in (MEMORY, FILE):
        peak = found(rows, OURS, name_of(*OVERLAP, way), "memory").get("peak_bytes")
        aims.append(aim(f"overlap, {way}: MB over the import", peak and peak[0] / 1e6, "at most", MOST_MB[shapes]))
    return [one for one in aims if one["found"] is not None]


def measure(asked: argparse.Namespace, race: Race) -> dict[str, Any]:
    entrants = contestants(asked)
    try:
        rows = race.group("merge", entrants, asked.rounds)
        compare(race, entrants, rows)
        rows += race.peaks([one.alone() for one in entrants], 1)
    finally:
        shutil.rmtree(asked.work / "merged", ignore_errors=True)
    return {"rows": rows, "targets": targets(asked.shapes, rows)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where experts and checkpoints are written; not inside the repository")
    parser.add_argument("--out", type=Path, help="directory of the result (default: benchmarks/results)")
    parser.add_argument("--shapes", choices=LAYERS, default="smollm2")
    parser.add_argument("--layers", type=int, help="default: 30 of SmolLM2-135M's 30, 4 of Phi-3-mini's 32")
    parser.add_argument("--experts", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heavy-rounds", type=int, default=2, help="rounds of mergekit, which takes minutes")
    parser.add_argument("--mergekit-python", metavar="PYTHON", help="of an environment with mergekit 0.1.5; else without it")
    parser.add_argument("--quick", action="store_true", help="2 experts of 2 layers, a few contestants: does it run at all?")
    parser.add_argument("--clean", action="store_true", help="delete what was written to WORK, and end")
    asked = parser.parse_args()
    if asked.quick:
        if asked.out is None:
            parser.error("--quick measures nothing worth keeping; give --out")
        asked.experts, asked.layers, asked.rounds = 2, 2, 2
    elif asked.work is None:
        parser.error("give --work")
    if asked.work is not None and asked.work.resolve().is_relative_to(ROOT):
        parser.error(f"--work must not lie in {ROOT}")
    asked.layers = asked.layers or LAYERS[asked.shapes]
    asked.out = asked.out or ROOT / "benchmarks/results"
    return asked


def main() -> None:
    asked = arguments()
    if asked.clean:
        for written in (*asked.work.glob("smollm2-*-layers"), *asked.work.glob("phi3-*-layers"), asked.work / "merged"):
            shutil.rmtree(written, ignore_errors=True)
        sys.exit()
    name = "merge" if asked.shapes == "smollm2" else "merge_phi3"
    with tempfile.TemporaryDirectory(prefix="bench-merge-") as scratch:
        places = {str(asked.work): "WORK", str(asked.mergekit_python): "PYTHON"}
        asked.work = asked.work or Path(scratch)
        run_benchmark("bench_merge.py", asked, name, lambda race: measure(asked, race), places)


if __name__ == "__main__":
    main()
