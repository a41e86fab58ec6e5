"""Memory of training, against the frozen model's forward and backward pass, PEFT's methods, and fine-tuning.

    python benchmarks/bench_memory.py                                      SmolLM2-135M, 8 × 128 tokens, float32, on the CPU
    python benchmarks/bench_memory.py --device cuda --model phi3 --dtype bf16 --batch 4 --tokens 1024
    python benchmarks/bench_memory.py --quick --out OUT                    a tiny model: does it run?

Every run is a fresh process: imports, the model, then three steps, or a selection phase of two selections. Its peak resident
size is taken over what it had after its imports, and then over that of the floor. The C library is told to give what is freed
back at once: it would keep holes of many MB between small tensors, more or fewer by chance. On a GPU it is the most that torch
had allocated there, the model included.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from bench_train import PEERS, masks_of, name_of
from racing.options import FLOOR, job_of, parser_of, read, result_name
from racing.race import OURS, Contestant, Race
from racing.record import aim, found, run_benchmark

STEPS = 3
DENSE_BYTES = 20  # aimed at, for each entry of the targets, while a dense selection phase lasts


def contestants(asked: argparse.Namespace) -> list[Contestant]:
    """The floor first."""
    shared = {**job_of(asked), "repeat": STEPS, "warm": 0, "keep": False}

    def one(library: str, name: str, script: str, variant: dict[str, Any], do: str = "step", **more: Any) -> Contestant:
        # torch counts what is allocated on a GPU, so that no new process is needed there.
        process = None if asked.device == "cpu" else script
        return Contestant(library, name, script, {"do": do, **shared, "variant": variant, **more}, process)

    entrants = [one(FLOOR, "frozen model", "by_torch.py", {"kind": "floor"})]
    for density, block in masks_of(asked.model):
        entrants.append(one(OURS, name_of(density, block), "by_sparselet.py", {"density": density, "block": block}))
    for initial in ("gradient", "dense"):
        for density, block in ((0.1, 1), (0.1, 16), (0.1, "row")):
            variant = {"density": density, "block": block, "initial": initial}
            name = f"selecting ({initial}), {name_of(density, block)}"
            entrants.append(one(OURS, name, "by_sparselet.py", variant, "selection phase", repeat=1))
    entrants += [one(*peer) for peer in PEERS]
    return entrants


def targets(asked: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at; the two figures in MB are for SmolLM2-135M at 8 × 128 tokens in float32 on the CPU."""
    usual = (asked.device, asked.model, asked.batch, asked.tokens, asked.dtype) == ("cpu", "smollm2", 8, 128, "float32")
    after, gradient = (110, 150) if usual else (None, None)

    def over(name: str) -> float | None:
        found_ = found(rows, OURS, name).get("over_floor_bytes")
        return None if found_ is None else found_ / 1e6

    entries = found(rows, "torch", "QKV fine-tuning").get("value", {}).get("trained")
    dense = entries and DENSE_BYTES * entries / 1e6
    aims = []
    for name in (name_of(0.1, 1), name_of(0.1, 16), name_of(0.1, "row")):
        aims.append(aim(f"{name}, after selection: MB over the floor", over(name), "at most", after))
        for initial, limit in (("gradient", gradient), ("dense", dense)):
            phase = f"selecting ({initial})"
            aims.append(aim(f"{name}, {phase}: MB over the floor", over(f"{phase}, {name}"), "at most", limit))
    return aims


def main() -> None:
    asked = read(parser_of(__doc__))
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # glibc's own first value, which it otherwise raises

    def measure(race: Race) -> dict[str, Any]:
        rows = race.peaks(contestants(asked), asked.rounds)
        return {"rows": rows, "targets": targets(asked, rows)}

    run_benchmark("bench_memory.py", asked, result_name(asked, "memory"), measure)


if __name__ == "__main__":
    main()
