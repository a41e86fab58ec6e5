"""How large a profile must be: ten experts merged by regmean with profiles of several ranks (docs/profiles.md).

    python benchmarks/profile_sizes.py TASKS OUT

TASKS holds a directory for each task, with train, validation and test as .jsonl. What is in OUT already is not made again, such
as an expert OUT/experts/TASK. Takes about an hour on two cores. Writes benchmarks/results/profile_sizes.json.
"""

import shutil
import statistics
import sys
from pathlib import Path

from merge_methods import measure, save, sparselet

from sparselet.profiles.file import PROFILE_FILE

NAMES = (
    *("num_to_words", "restaurant_slots", "antonyms", "trec", "tatoeba_en_de"),
    *("winobias", "stsb_paraphrase", "sst2", "qamr", "commonsense_qa"),
)
TRAINING = ["--train-rows", "192", "--validation-rows", "64", "--epochs", "2", "--batch-size", "8"]
FORM = ["--no-chat-template", "--max-input-length", "256"]
ASKING = ["--rows", "60", "--max-new-tokens", "40", *FORM]
PROFILES = {
    "1": ["--rank", "1"],
    "8": ["--rank", "8"],
    "32": ["--rank", "32"],
    "128": ["--rank", "128"],
    "full": ["--full"],
    "32, of 1,024 tokens": ["--rank", "32", "--tokens", "1024"],
}


def main() -> None:
    tasks, out = Path(sys.argv[1]), Path(sys.argv[2])
    experts = {name: train(tasks, out, name) for name in NAMES}
    base = score(tasks, out, "base", NAMES, [])
    own = statistics.mean(score(tasks, out, name, (name,), [experts[name]]) for name in NAMES)
    results: dict[str, dict[str, float]] = {}
    for rank, flags in PROFILES.items():
        place = out / f"rank {rank}"
        profiled = {name: profile(tasks, place, name, experts[name], flags) for name in NAMES}
        if not (place / "merged").is_dir():
            sparselet("merge", *profiled.values(), "--method", "regmean", "--out", place / "merged")
        merged = score(tasks, out, place.name, NAMES, [place / "merged"])
        size = statistics.mean((path / PROFILE_FILE).stat().st_size for path in profiled.values())
        results[rank] = {"bytes": size, "rougeL": merged, "kept": 100 * (merged - base) / (own - base)}
        save("profile_sizes", results)


def train(tasks: Path, out: Path, name: str) -> Path:
    """Train the default expert of a task, unless it is there."""
    path = out / "experts" / name
    if not path.is_dir():
        sparselet("train", "--task", tasks / name, "--out", path, *TRAINING, *FORM)
    return path


def profile(tasks: Path, place: Path, name: str, expert: Path, flags: list[str]) -> Path:
    """A copy of an expert with a profile of its own, unless it is there."""
    path = place / name
    if not (path / PROFILE_FILE).is_file():
        shutil.copytree(expert, path, ignore=shutil.ignore_patterns(PROFILE_FILE), dirs_exist_ok=True)
        sparselet("profile", path, "--task", tasks / name, "--rows", "192", *flags, *FORM)
    return path


def score(tasks: Path, out: Path, label: str, names: tuple[str, ...], adapters: list[Path]) -> float:
    """Mean Rouge-L over the tasks, of one adapter or of the base model."""
    (scores,) = measure(tasks, out, label, names, adapters, ASKING).values()
    return statistics.mean(found["rougeL"] for found in scores.values())


if __name__ == "__main__":
    main()
