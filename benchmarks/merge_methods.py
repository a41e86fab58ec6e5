"""Train experts of four kinds on real tasks, merge them by six methods, and measure; docs/results.md shows the outcome.

    python benchmarks/merge_methods.py TASKS OUT

TASKS holds a directory for each task, with train, validation and test as .jsonl. What is in OUT already is not made again.
Takes some three hours on two cores. Writes benchmarks/results/merge_methods.json and learning_rate_baselines.json.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NAMES = ("num_to_words", "sst2", "restaurant_slots", "trec")
TRAINING = ["--train-rows", "300", "--validation-rows", "100", "--epochs", "2", "--batch-size", "8", "--no-chat-template"]
ASKING = ["--rows", "100", "--max-new-tokens", "24", "--no-chat-template"]

KINDS = {
    "element": [],
    "block": ["--block-size", "16"],
    "lora": ["--method", "lora"],
    "full-qkv": ["--method", "full-qkv"],
}
# Of several rates the one with the lowest mean validation loss on two of the tasks is taken.
RATES = {"element": ["1e-3", "2e-3"], "block": ["2e-3"], "lora": ["3e-4", "1e-3"], "full-qkv": ["3e-4", "1e-3"]}
CHOSEN_ON = ("num_to_words", "sst2")

# Published parameters; where the papers choose λ on validation data, 0.4 as Yadav et al. 2023 recommend without, and 1.
METHODS = {
    "overlap": ("overlap", []),
    "uniform": ("uniform", []),
    "arithmetic, λ = 0.4": ("arithmetic", ["scale=0.4"]),
    "arithmetic, λ = 1": ("arithmetic", ["scale=1.0"]),
    "ties": ("ties", []),
    "ties, density of non-zeros": ("ties", ["density_of=nonzeros"]),
    "breadcrumbs, λ = 0.4": ("breadcrumbs", ["scale=0.4"]),
    "dare, λ = 0.4": ("dare", ["scale=0.4"]),
    "dare, λ = 1": ("dare", ["scale=1.0"]),
}


def main() -> None:
    tasks, out = Path(sys.argv[1]), Path(sys.argv[2])
    losses = {kind: validation_losses(tasks, out, kind) for kind in KINDS}
    rates = {kind: min(found, key=lambda rate: sum(found[rate].values())) for kind, found in losses.items()}
    save("learning_rate_baselines", {kind: found for kind, found in losses.items() if len(found) > 1})
    experts = {kind: [train(tasks, out, name, kind, rates[kind]) for name in NAMES] for kind in KINDS}
    merged = {kind: {method: merge(out, kind, method, experts[kind]) for method in METHODS} for kind in KINDS}
    results: dict[str, Any] = {"rates": rates, "methods": METHODS, "base": {}, "individual": {}, "merged": {}}
    results["base"] = measure(tasks, out, "base", NAMES, [])["packaged:smollm2-135m"]
    for kind in KINDS:
        own = {}
        for name, expert in zip(NAMES, experts[kind], strict=True):
            own |= measure(tasks, out, f"{kind}-{name}", (name,), [expert])[str(expert)]
        results["individual"][kind] = own
        found = measure(tasks, out, kind, NAMES, list(merged[kind].values()))
        results["merged"][kind] = {method: found[str(path)] for method, path in merged[kind].items()}
        save("merge_methods", results)


def validation_losses(tasks: Path, out: Path, kind: str) -> dict[str, dict[str, float]]:
    """The best validation loss of each rate on the tasks that the rate is chosen on."""
    if len(RATES[kind]) == 1:
        return {RATES[kind][0]: {}}
    return {rate: {name: best_loss(train(tasks, out, name, kind, rate)) for name in CHOSEN_ON} for rate in RATES[kind]}


def best_loss(expert: Path) -> float:
    """The lowest validation loss of a run."""
    history = json.loads((expert / "run.json").read_text())["history"]
    return min(row["eval_loss"] for row in history if "eval_loss" in row)


def train(tasks: Path, out: Path, name: str, kind: str, rate: str) -> Path:
    """Train one expert, unless it is there."""
    path = out / f"{name}-{kind}-{rate}"
    if not path.is_dir():
        sparselet("train", "--task", tasks / name, "--out", path, "--learning-rate", rate, *KINDS[kind], *TRAINING)
    return path


def merge(out: Path, kind: str, method: str, experts: list[Path]) -> Path:
    """Merge one kind's experts, unless it is done."""
    name, parameters = METHODS[method]
    path = out / "-".join(["merged", kind, name, *parameters])
    if not path.is_dir():
        given = ["--set", *parameters] if parameters else []
        sparselet("merge", *experts, "--out", path, "--method", name, *given)
    return path


def measure(
    tasks: Path, out: Path, label: str, names: tuple[str, ...], adapters: list[Path], asking: list[str] = ASKING
) -> dict[str, Any]:
    """Scores of adapters on tasks, or of the base model; taken from the disk where they were measured before."""
    file = out / f"scores-{label}.json"
    if not file.is_file():
        option = ["--adapter", *adapters] if adapters else []
        file.write_text(sparselet("eval", "--task", *(tasks / name for name in names), *option, *asking))
    return json.loads(file.read_text())


def sparselet(*arguments: object) -> str:
    """Run a verb, show the command, and return its JSON."""
    command = ["sparselet", *map(str, arguments), "--json"]
    print(" ".join(command), file=sys.stderr, flush=True)
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def save(name: str, content: dict[str, Any]) -> None:
    """Write one file of results."""
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
