"""Sparse attention against dense, one layer of SmolLM2-135M's shapes: prompts, and one new token.

    python benchmarks/bench_attention.py                                   the CPU
    python benchmarks/bench_attention.py --device cuda --dtype bf16
    python benchmarks/bench_attention.py --quick --out OUT                 short prompts: does it run, and is it right?

The floor is `scaled_dot_product_attention` of the same queries (9 heads of 64), keys and values (3 heads), all random. Each
pattern is measured whole, and without choosing its keys; blocks also by the compiled kernel that prompts on CUDA take. A
density is the share of dense attention's pairs that is used.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from racing.options import FLOOR, parser_of, read, result_name
from racing.race import OURS, Contestant, Race
from racing.record import aim, found, middle, run_benchmark

LENGTHS, QUICK = (512, 2048, 8192), (64, 128)
CHOSEN, COMPILED = "keys chosen", "keys chosen, by flex_attention"
PROMISE = 2.0  # times its density, at the longest prompt: what the first pattern is to be within
COMPILED_FROM = 1024  # tokens; shorter prompts are not compiled for


def patterns_of(length: int, new: bool) -> list[str]:
    """Patterns that keep an eighth of the keys, or 256."""
    kept = max(256, length // 8)
    if new:
        return [f"quest:budget={kept}", f"snapkv:budget={kept}"]
    blocks = [f"block:block={block},top={kept // block}" for block in (64, 16)]
    return [*blocks, f"window:window={kept}", f"vertical-slash:vertical={kept // 2},slash={max(1, kept // 128)}"]


def contestants_of(asked: argparse.Namespace, length: int, new: bool) -> list[Contestant]:
    """Dense attention first, then each pattern with and without the choice of keys."""
    job = {"length": length, "new": new, "dtype": asked.job_dtype, "device": asked.device, "repeat": 20 if new else 1}
    floor = Contestant(FLOOR, "dense", "by_torch.py", {"do": "dense attention", **job}, "by_torch.py")
    contestants = [floor]
    for pattern in patterns_of(length, new):
        own = {"do": "sparse attention", "pattern": pattern, **job}
        ways = {pattern: {"choosing": True}, f"{pattern}, {CHOSEN}": {"choosing": False}}
        if length >= COMPILED_FROM and pattern.startswith("block:"):
            ways[f"{pattern}, {COMPILED}"] = {"choosing": False, "compiled": True}
        script = "by_sparselet.py"
        contestants += [Contestant(OURS, name, script, {**own, **way}, script) for name, way in ways.items()]
    return contestants


def label_of(length: int, new: bool) -> str:
    return f"a token after {length}" if new else f"a prompt of {length}"


def targets(rows: Sequence[dict[str, Any]], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Times the floor, and at the longest prompt also times what the density promises."""
    aims = []
    for new in (False, True):
        for length in lengths:
            for place, pattern in enumerate(patterns_of(length, new)):
                label = label_of(length, new)
                row = found(rows, OURS, pattern, label)
                share, density = middle(row.get("times_floor"), "cpu"), row["value"]["density"]
                aims.append(aim(f"{label}, {pattern}, density {density:.2f}: times dense, CPU", share))
                if not new and length == lengths[-1] and share is not None:
                    limit = None if place else PROMISE
                    aims.append(aim(f"{label}, {pattern}: the same over its density", share / density, "at most", limit))
    return aims


def main() -> None:
    asked = read(parser_of(__doc__))
    asked.job_dtype = {"bf16": "bfloat16"}.get(asked.dtype, asked.dtype)
    asked.model = "tiny" if asked.quick else "smollm2"
    lengths, tolerance = QUICK if asked.quick else LENGTHS, 1e-4 if asked.dtype == "float32" else 2e-2

    def measure(race: Race) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for new in (False, True):
            for length in lengths:
                contestants = contestants_of(asked, length, new)
                measured = race.group(label_of(length, new), contestants, asked.rounds)
                for contestant, row in zip(contestants[1:], measured[1:], strict=True):
                    row["value"] = race.ask(contestant, do="same attention", repeat=1)["value"]
                rows += measured
        wrong = [f"{r['group']}, {r['name']}" for r in rows if r["value"] and not r["value"]["difference"] <= tolerance]
        return {"rows": rows, "targets": targets(rows, lengths), "wrong": wrong}

    run_benchmark("bench_attention.py", asked, result_name(asked, "attention"), measure)


if __name__ == "__main__":
    main()
