"""Loading an adapter and switching between two, against PEFT's LoRA of rank 64.

    python benchmarks/bench_switch.py                                      SmolLM2-135M, float32, on the CPU
    python benchmarks/bench_switch.py --device cuda --model phi3 --dtype bf16
    python benchmarks/bench_switch.py --quick --out OUT                    a tiny model: does it run, and is it exact?

Two sparse adapters of density 0.1 and two LoRA adapters of rank 64, all random, are written to a temporary directory. Loading
is measured with the files in the page cache. A switch takes one adapter out of the model and puts the other in; afterwards the
base weights are compared, bit for bit, with what they were before. The floor of loading reads the sparse adapter's file and
sums it; that of switching overwrites and reads as many entries of flat tensors as a switch must.
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

from racing.options import FLOOR, job_of, parser_of, read, result_name
from racing.race import OURS, Contestant, Race
from racing.record import aim, found, middle, run_benchmark

DENSITY, RANK = 0.1, 64
SWITCHES = 4  # in a run; an even number ends where it began
LAYERS = {"smollm2": 30, "phi3": 32, "tiny": 2}
SHAPES = {
    "smollm2": [(576, 576), (192, 576), (192, 576)],
    "phi3": [(9216, 3072)],
    "tiny": [(256, 256), (128, 256), (128, 256)],
}
# Library, name, script, what it does, and whose base weights are then compared.
SWITCHING = [
    (OURS, "unmerge and merge", "by_sparselet.py", "merge"),
    (OURS, "apply_temporarily, in and out", "by_sparselet.py", "enter and exit"),
    (OURS, "set_adapter (unmerged)", "by_sparselet.py", "set_adapter"),
    ("PEFT", "LoRA r 64, unmerge and merge", "by_peft.py", "merge"),
    ("PEFT", "LoRA r 64, set_adapter (unmerged)", "by_peft.py", "set_adapter"),
    ("PEFT", "LoRA r 64, hot swap (unmerged, from the file)", "by_peft.py", "hotswap"),
]
LOADING = [
    (OURS, "SparseAdapter.load", "by_sparselet.py", "load file"),
    (OURS, "load_adapter", "by_sparselet.py", "load"),
    ("PEFT", "LoRA r 64, load_adapter", "by_peft.py", "load"),
]


def prepared(asked: argparse.Namespace, race: Race, work: str) -> None:
    """Write the adapters."""
    shared = {**job_of(asked), "out": work, "density": DENSITY, "rank": RANK}
    for library, script in ((OURS, "by_sparselet.py"), ("PEFT", "by_peft.py")):
        answer = race.ask(Contestant(library, "write", script, {"do": "write", **shared}, script))
        if "error" in answer:
            raise SystemExit(f"{library}'s adapters could not be written: {answer['error']}")


def loading(asked: argparse.Namespace, work: str) -> list[Contestant]:
    """The floor first."""
    shared = {**job_of(asked), "work": work}
    floor = Contestant(
        FLOOR, "read and sum", "by_torch.py", {"do": "read", **shared, "adapters": [f"{work}/sparse-b"]}, "by_torch.py"
    )
    return [floor, *(Contestant(lib, name, script, {"do": do, **shared}, script) for lib, name, script, do in LOADING)]


def switching(asked: argparse.Namespace, work: str) -> list[Contestant]:
    """The floor first."""
    shared = {**job_of(asked), "work": work, "repeat": SWITCHES}
    shapes = SHAPES[asked.model] * LAYERS[asked.model]
    job = {"do": "rewrite", **shared, "density": DENSITY, "shapes": shapes}
    floor = Contestant(FLOOR, "overwrite and read", "by_torch.py", job, "by_torch.py")
    return [floor, *(Contestant(lib, n, script, {"do": do, **shared}, script) for lib, n, script, do in SWITCHING)]


def exactness(race: Race, contestants: Sequence[Contestant], rows: Sequence[dict[str, Any]]) -> None:
    """Put into each row how many entries of the base weights came back changed."""
    for one, row in zip(contestants[1:], rows[1:], strict=True):
        if "error" not in row:
            row["value"] = race.ask(one, do="changed", of=one.job["do"], repeat=1).get("value")


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, and how many base entries each leaves changed."""
    aims = []
    for _, name, _, _ in LOADING[:2]:
        over = found(rows, OURS, name, "load").get("times", {}).get("PEFT: LoRA r 64, load_adapter")
        aims.append(aim(f"{name}: times LoRA's load_adapter", middle(over, "wall"), "at most", 0.04))
    for _, name, _, _ in SWITCHING[:2]:
        times = found(rows, OURS, name, "switch").get("times", {})
        over = times.get("PEFT: LoRA r 64, unmerge and merge")
        aims.append(aim(f"{name}: times LoRA's unmerge and merge", middle(over, "wall"), "at most", 0.12))
        swap = times.get("PEFT: LoRA r 64, hot swap (unmerged, from the file)")
        aims.append(aim(f"{name}: times LoRA's hot swap", middle(swap, "wall")))
        changed = (found(rows, OURS, name, "switch").get("value") or {}).get("changed")
        aims.append(aim(f"{name}: base entries changed after switching back", changed, "at most", 0))
    return aims


def main() -> None:
    asked = read(parser_of(__doc__))

    def measure(race: Race) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="bench-switch-") as work:
            prepared(asked, race, work)
            rows = race.group("load", loading(asked, work), asked.rounds)
            switchers = switching(asked, work)
            switched = race.group("switch", switchers, asked.rounds)
            exactness(race, switchers, switched)
        rows += switched
        return {"rows": rows, "targets": targets(rows)}

    run_benchmark("bench_switch.py", asked, result_name(asked, "switch"), measure)


if __name__ == "__main__":
    main()
