"""The cost of a library of experts: a profile, a merge of twenty with and without profiles, and the route of a prompt.

    python benchmarks/bench_library.py --work WORK                  SmolLM2-135M, 20 experts of its query, key and value layers
    python benchmarks/bench_library.py --quick --out OUT            a tiny model, 2 experts: does it run?

A profile is of 32 rows of 128 random tokens; its floor is the model's forward pass over these rows. A merge is from files to a
file, of synthetic experts of density 0.1 with profiles of rank 32 beside them; its floor is to load all experts and to sum
every tensor. A route is of one prompt of 64 tokens; its floor is the model's forward pass over it. WORK keeps the experts (0.3
GB) for the next run.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contestants.models import config_of
from merge_inputs import SHAPES, write_experts, write_profiles
from racing.options import FLOOR, job_of, parser_of, read, result_name
from racing.race import OURS, Contestant, Race
from racing.record import aim, found, middle, run_benchmark

from sparselet.profiles.profile import RANK

LAYERS, EXPERTS = 30, 20
QUICK_SHAPES = {name: (rows // 8, columns // 8) for name, (rows, columns) in SHAPES["smollm2"].items()}
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "overlap": ("overlap", {}),
    "tsv": ("tsv", {}),
    "actmat": ("actmat", {}),
    "regmean": ("regmean", {}),
    "regmean, mask full": ("regmean", {"mask": "full"}),
}
MERGED = "merge of {}"
PROFILES = {f"rank {RANK}": RANK, "full": None}


def groups_of(asked: argparse.Namespace, experts: Sequence[str]) -> dict[str, list[Contestant]]:
    """The contestants of each group, its floor first."""
    rows = {**job_of(asked), "rows": 2 if asked.quick else 32, "tokens": asked.tokens}
    prompt = {**rows, "rows": 1, "tokens": 64, "adapters": list(experts), "repeat": 1 if asked.quick else 10}
    merge = {"adapters": list(experts), "device": "cpu", "out": str(asked.work / "merged")}
    ours, torch_ = "by_sparselet.py", "by_torch.py"

    def floor(name: str, do: str, job: dict[str, Any]) -> Contestant:
        return Contestant(FLOOR, name, torch_, {"do": do, **job}, torch_)

    def own(name: str, do: str, job: dict[str, Any]) -> Contestant:
        return Contestant(OURS, name, ours, {"do": do, **job}, ours)

    return {
        "profile": [floor("forward", "forward", rows)]
        + [own(name, "profile", {**rows, "rank": rank}) for name, rank in PROFILES.items()],
        MERGED.format(len(experts)): [floor("load_file and sum", "read", merge)]
        + [
            own(name, "merge to a file", {**merge, "method": method, "parameters": parameters})
            for name, (method, parameters) in MERGES.items()
        ],
        "route": [floor("forward of one prompt", "forward", prompt), own(f"among {len(experts)}", "route", prompt)],
    }


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds, times the floor, and the memory of merges. There is no aim: the methods are as they are defined."""
    aims = []
    for row in rows:
        if row["library"] == OURS and row["group"] != "memory":
            what = f"{row['group']}, {row['name']}"
            aims.append(aim(f"{what}: seconds", row["median"]))
            aims.append(aim(f"{what}: times the floor, CPU", middle(row.get("times_floor"), "cpu")))
    for name in MERGES:
        peak = found(rows, OURS, name, "memory").get("peak_bytes")
        aims.append(aim(f"merge, {name}: MB over the import", peak and peak[0] / 1e6))
    return aims


def measure(asked: argparse.Namespace, race: Race) -> dict[str, Any]:
    shapes, layers, count = (QUICK_SHAPES, 2, 2) if asked.quick else (SHAPES["smollm2"], LAYERS, EXPERTS)
    experts = write_experts(asked.work / "experts", shapes, layers, count)
    write_profiles(experts, layers, shapes["q_proj"][1], RANK, config_of(asked.model).hidden_size)
    rows: list[dict[str, Any]] = []
    try:
        groups = groups_of(asked, experts)
        for name, contestants in groups.items():
            rows += race.group(name, contestants, asked.rounds)
        rows += race.peaks([one.alone() for one in groups[MERGED.format(count)]], 1)
    finally:
        shutil.rmtree(asked.work / "merged", ignore_errors=True)
    return {"rows": rows, "targets": targets(rows)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, help="where experts are written (default: a directory that is deleted)")
    asked = read(parser)
    with tempfile.TemporaryDirectory(prefix="bench-library-") as scratch:
        places = {str(asked.work): "WORK"}
        asked.work = asked.work or Path(scratch)
        run_benchmark("bench_library.py", asked, result_name(asked, "library"), lambda race: measure(asked, race), places)


if __name__ == "__main__":
    main()
