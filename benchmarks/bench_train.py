"""Time of a training step, against the frozen model's forward and backward pass, PEFT's methods, and fine-tuning.

    python benchmarks/bench_train.py                                       SmolLM2-135M, 8 × 128 tokens, float32, on the CPU
    python benchmarks/bench_train.py --device cuda --model phi3 --dtype bf16 --batch 4 --tokens 1024
    python benchmarks/bench_train.py --steps --rounds 10                   steps of the few whose process stays, more often
    python benchmarks/bench_train.py --quick --out OUT                     a tiny model: does it run, and is it right?

The floor is forward and backward with every weight frozen and the gradient taken back to the first target's input: what any
adapter must do. A step of the others is zero_grad, forward, backward and fused AdamW. All take turns, round after round, each
after a run of the floor, and each in a process of its own. The parts of sparselet's step are also measured by themselves.
Needs Linux, and nothing else to be running: the script warns if something is.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from racing.options import FLOOR, job_of, parser_of, process_of, read, result_name
from racing.race import OURS, Contestant, Race
from racing.record import aim, found, middle, run_benchmark

from sparselet.delta import BlockSize

# (density, block size) of the adapters.
MASKS: list[tuple[float, BlockSize]] = [*((0.1, size) for size in (1, 16, 64, 128, "row", "column")), (0.01, 1)]
LARGEST_TILE = {"smollm2": 64, "phi3": 128, "tiny": 128}  # that divides every target
COMPARED: list[BlockSize] = [1, 16, "row"]  # those whose parts are measured
PARTS = ("product", "gather", "gradient", "optimizer", "weights")
# Library, name, script and variant of everyone else.
PEERS: list[tuple[str, str, str, dict[str, Any]]] = [
    *(("PEFT", f"LoRA r {rank}", "by_peft.py", {"kind": "lora", "rank": rank}) for rank in (8, 64, 128)),
    ("PEFT", "SHiRA 0.1", "by_peft.py", {"kind": "shira", "density": 0.1}),
    ("PEFT", "Super-Tuning 0.1", "by_peft.py", {"kind": "supertuning", "density": 0.1}),
    ("torch", "QKV fine-tuning", "by_torch.py", {"kind": "qkv"}),
    ("torch", "full fine-tuning", "by_torch.py", {"kind": "full"}),
    ("torch", "side product, dense mask 0.1", "by_torch.py", {"kind": "side product", "density": 0.1}),
]
# On the CPU only these keep their processes from round to round: all of them together would need more memory than many machines
# have. The others build anew, and make some steps before the one that is measured: the first ones wait for memory.
STAYING = (FLOOR, "element 0.1", "tiles of 16, 0.1", "rows, 0.1", "LoRA r 128")
WARM = 3
STEPS = {"cpu": 1, "cuda": 5}  # of a run
PARTS_REPEATED = {"cpu": 5, "cuda": 20}


def masks_of(model: str) -> list[tuple[float, BlockSize]]:
    """The masks that fit a model's targets."""
    return [(density, block) for density, block in MASKS if isinstance(block, str) or block <= LARGEST_TILE[model]]


def name_of(density: float, block: BlockSize) -> str:
    if block == 1:
        return f"element {density:g}"
    return f"{block}s, {density:g}" if isinstance(block, str) else f"tiles of {block}, {density:g}"


def contestants(asked: argparse.Namespace) -> list[Contestant]:
    """The floor first."""
    shared = job_of(asked)

    def one(library: str, name: str, script: str, variant: dict[str, Any], do: str = "step", **more: Any) -> Contestant:
        of = FLOOR if library == FLOOR else more.pop("beside", name)
        process = process_of(asked, script, of) if of in STAYING or asked.device != "cpu" else None
        warm = 1 if process else WARM
        job = {"do": do, "repeat": STEPS[asked.device], **shared, "variant": variant, "warm": warm, **more}
        return Contestant(library, name, script, job, process)

    entrants = [one(FLOOR, "frozen model", "by_torch.py", {"kind": "floor"})]
    for density, block in masks_of(asked.model):
        variant = {"density": density, "block": block}
        entrants.append(one(OURS, name_of(density, block), "by_sparselet.py", variant))
    entrants += [one(*peer) for peer in PEERS]
    for initial in ("dense", "gradient"):
        variant = {"density": 0.1, "block": 1, "initial": initial}
        entrants.append(one(OURS, f"selection ({initial})", "by_sparselet.py", variant, "select", repeat=1))
    for block in COMPARED:
        for part in PARTS:
            name, variant = name_of(0.1, block), {"density": 0.1, "block": block}
            more = {"part": part, "beside": name, "repeat": PARTS_REPEATED[asked.device]}
            entrants.append(one(OURS, f"{name}: {part}", "by_sparselet.py", variant, "part", **more))
    return entrants


def only_steps(entrants: Sequence[Contestant]) -> list[Contestant]:
    """Those whose process stays: a round of them is a step each and not a model built anew."""
    return [one for one in entrants if one.name in STAYING or one.library == FLOOR]


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at: step, step over LoRA r 128, and all that is not the frozen model or the dense product."""
    aims = []
    for kind, label in (("wall", ""), ("cpu", ", CPU")):
        for block in COMPARED:
            name, most = name_of(0.1, block), 1.015 if block == "row" else 1.06
            row = found(rows, OURS, name)
            aims.append(aim(f"step, {name}: times the floor{label}", middle(row.get("times_floor"), kind), "at most", most))
            over = row.get("times", {}).get("PEFT: LoRA r 128")
            aims.append(aim(f"step, {name}: times LoRA r 128's{label}", middle(over, kind), "at most", 0.95))
            counted = ("gather", "optimizer", "weights", "weights")  # a step builds its weights forward and backward
            parts = [middle(found(rows, OURS, f"{name}: {part}").get("times_floor"), kind) for part in counted]
            rest = None if None in parts else sum(part for part in parts if part is not None)
            what = f"gather, optimizer and weights twice, {name}: times the floor{label}"
            aims.append(aim(what, rest, "at most", 0.01))
    step = middle(found(rows, OURS, name_of(0.1, 1)).get("times_floor"), "wall")
    for initial in ("dense", "gradient"):
        selection = middle(found(rows, OURS, f"selection ({initial})").get("times_floor"), "wall")
        aims.append(aim(f"selection ({initial}): times an ordinary step", selection and step and selection / step))
    return aims


def check(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong: everyone starts from the same model, so their first losses agree, and their steps make it smaller."""
    floor = rows[0]["value"]["first"]
    stepping = [row for row in rows[1:] if isinstance(row.get("value"), dict) and "last" in row["value"]]
    wrong = [
        f"{row['name']}: the first loss is {row['value']['first']}, the floor's {floor}"
        for row in stepping
        if abs(row["value"]["first"] - floor) > 0.02 * floor
    ]
    return wrong + [f"{row['name']}: training makes the loss no smaller" for row in stepping if not _falls(row["value"])]


def _falls(value: dict[str, float]) -> bool:
    return value["last"] < value["first"]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", action="store_true", help=f"of {', '.join(STAYING[1:])} and the floor only")
    asked = read(parser)

    def measure(race: Race) -> dict[str, Any]:
        entrants = only_steps(contestants(asked)) if asked.steps else contestants(asked)
        rows = race.group("step", entrants, asked.rounds)
        aims = [one for one in targets(rows) if one["found"] is not None or not asked.steps]
        return {"rows": rows, "targets": aims, "wrong": check(rows)}

    run_benchmark("bench_train.py", asked, result_name(asked, "train_steps" if asked.steps else "train"), measure)


if __name__ == "__main__":
    main()
