"""Choosing masks, and the gradient at a mask, against torch.topk and the dense product.

    python benchmarks/bench_select.py                                      the CPU
    python benchmarks/bench_select.py --device cuda --dtype bf16
    python benchmarks/bench_select.py --quick --out OUT                    small shapes: does it run, and is it right?

`top_k` chooses a tenth of one target of 9216×3072 (Phi-3-mini's fused projection), `top_k_global` a tenth of all entries of
SmolLM2-135M's 90 targets, and of eight of 9216×3072. Their floor is torch.topk of the same scores in one tensor. The masked
gradient is that of a 2048×2048 target for 1024 tokens, over the dense product. Masks and scores are random.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from bench_train import name_of
from racing.options import FLOOR, job_of, parser_of, process_of, read, result_name
from racing.race import OURS, Contestant, Race
from racing.record import aim, found, middle, run_benchmark

DENSITY = 0.1
FUSED, LAYER = (9216, 3072), [(576, 576), (192, 576), (192, 576)]
SELECTIONS = {"one of 9216×3072": [FUSED], "SmolLM2's 90": LAYER * 30, "eight of 9216×3072": [FUSED] * 8}
SQUARE, TOKENS = (2048, 2048), 1024
MASKS = [(density, block) for density in (0.1, 0.01) for block in (1, 16, 32, 64, 128, "row", "column")]
ANY = "torch.topk, in no order"


def selecting(asked: argparse.Namespace, label: str) -> list[Contestant]:
    """torch.topk of all scores together first. Processes keep their inputs, so that each group has its own."""
    shapes = SELECTIONS[label]
    shapes = [(rows // 16, columns // 16) for rows, columns in shapes] if asked.quick else shapes
    job = {**job_of(asked), "shapes": list(shapes), "density": DENSITY}
    call = "top_k" if len(shapes) == 1 else "top_k_global"
    torch_, ours = (process_of(asked, script, label) for script in ("by_torch.py", "by_sparselet.py"))
    return [
        Contestant(FLOOR, "torch.topk", "by_torch.py", {"do": "topk", **job, "sorted": True}, torch_),
        Contestant("torch", ANY, "by_torch.py", {"do": "topk", **job, "sorted": False}, torch_),
        Contestant(OURS, call, "by_sparselet.py", {"do": "select top", **job}, ours),
    ]


def gradients(asked: argparse.Namespace) -> list[Contestant]:
    """The dense product first."""
    shape, tokens = ((256, 256), 64) if asked.quick else (SQUARE, TOKENS)
    job = {**job_of(asked), "shape": shape, "tokens": tokens, "repeat": 3 if asked.device == "cpu" else 50}
    floor = Contestant(FLOOR, "dense product", "by_torch.py", {"do": "dense product", **job}, "by_torch.py")
    return [floor] + [
        Contestant(
            OURS,
            name_of(density, block),
            "by_sparselet.py",
            {"do": "masked gradient", **job, "density": density, "block": block},
            "by_sparselet.py",
        )
        for density, block in MASKS
    ]


def checked(race: Race, contestants: Sequence[Contestant], rows: Sequence[dict[str, Any]], do: str) -> None:
    """Put into each of our rows what comparing it with torch's found."""
    for one, row in zip(contestants, rows, strict=True):
        if one.library == OURS:
            row["value"] = race.ask(one, do=do, repeat=1)["value"]


def check(rows: Sequence[dict[str, Any]], tolerance: float) -> list[str]:
    """What is wrong: a choice that torch.topk would not make, a gradient that is not the dense one's."""
    own = [row for row in rows if row["library"] == OURS]
    return [f"{row['group']}, {row['name']}: {row['value']}" for row in own if not _right(row["value"], tolerance)]


def _right(value: dict[str, float], tolerance: float) -> bool:
    return value["same"] == 1 if "same" in value else value["difference"] <= tolerance


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    aims = []
    for place, label in enumerate(SELECTIONS):
        call = "top_k" if place == 0 else "top_k_global"
        row = found(rows, OURS, call, label)
        aims.append(
            aim(f"{call}, {label}: times torch.topk", middle(row.get("times_floor"), "wall"), "at most", None if place else 1.0)
        )
        over = row.get("times", {}).get(f"torch: {ANY}")
        aims.append(aim(f"{call}, {label}: times {ANY}", middle(over, "wall")))
    for (density, block), limit in zip(MASKS, [1.1, *[None] * 6, 0.45, *[None] * 6], strict=True):
        name = name_of(density, block)
        over = found(rows, OURS, name, "gradient").get("times_floor")
        aims.append(aim(f"masked gradient, {name}: times the dense product", middle(over, "wall"), "at most", limit))
    return aims


def main() -> None:
    asked = read(parser_of(__doc__))
    if not asked.quick:
        asked.model = "smollm2"  # the shapes stand above; only the file's name depends on it

    def measure(race: Race) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for label in (*SELECTIONS, "gradient"):
            contestants = gradients(asked) if label == "gradient" else selecting(asked, label)
            measured = race.group(label, contestants, asked.rounds)
            checked(race, contestants, measured, "same gradient" if label == "gradient" else "same top")
            rows += measured
        return {"rows": rows, "targets": targets(rows), "wrong": check(rows, 1e-5 if asked.dtype == "float32" else 1e-2)}

    run_benchmark("bench_select.py", asked, result_name(asked, "select"), measure)


if __name__ == "__main__":
    main()
