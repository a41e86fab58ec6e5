"""Write the measured tables of README.md, docs/results.md and docs/performance.md from benchmarks/results/*.json.

    python benchmarks/tables.py            rewrite them
    python benchmarks/tables.py --check    fail if a table is not what the results say

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME.json holds its figures.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

BUSY = 0.5  # a load above this means that something else was running
ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/results.md", "docs/performance.md")


def demo_table(results: dict[str, Any]) -> str:
    """Rouge-L of base, experts and merged model on the demo's tasks."""
    tasks = list(results["base"])
    rows = {"base": results["base"]}
    rows |= {f"expert {name}": found for name, found in results["experts"].items()}
    rows["merged"] = results["merged"]
    return markdown(tasks, rows) + f"\nKept of the experts' gain: {100 * results['retention']:.0f} %.\n"


def scores_table(results: dict[str, Any]) -> str:
    """Rouge-L, with exact match in brackets, of everything that `sparselet eval --json` measured."""
    tasks = list(next(iter(results.values())))
    lines = ["| | " + " | ".join(tasks) + " | mean |", "| --- |" + " ---: |" * (len(tasks) + 1)]
    for path in sorted(results, key=_order):
        found = [results[path][task] for task in tasks]
        cells = [f"{f['rougeL']:.1f} ({f['exact_match']:.0f})" for f in found]
        lines.append(f"| {Path(path).name} | {' | '.join(cells)} | {sum(f['rougeL'] for f in found) / len(found):.1f} |")
    return "\n".join(lines) + "\n"


def _order(path: str) -> tuple[int, int, str]:
    """The base model, then for each kind of mask the experts, the merged and the uniformly merged model."""
    name = Path(path).name
    kinds, places = ("element", "block"), ("merged", "uniform")
    kind = next((i for i, k in enumerate(kinds, 1) if name.endswith(k)), 0)
    return kind, next((i for i, p in enumerate(places, 1) if name.startswith(p)), 0), name


def loss_table(results: dict[str, Any]) -> str:
    """Validation loss by learning rate and task."""
    tasks = list(next(iter(results.values())))
    lines = ["| learning rate | " + " | ".join(tasks) + " | mean |", "| --- |" + " ---: |" * (len(tasks) + 1)]
    for rate, found in results.items():
        values = [found[task] for task in tasks]
        lines.append(f"| {rate} | " + " | ".join(f"{v:.4f}" for v in values) + f" | {sum(values) / len(values):.4f} |")
    return "\n".join(lines) + "\n"


def markdown(columns: list[str], rows: dict[str, dict[str, float]]) -> str:
    """Rows of numbers to one decimal, with their mean."""
    lines = ["| | " + " | ".join(columns) + " | mean |", "| --- |" + " ---: |" * (len(columns) + 1)]
    for name, row in rows.items():
        values = [row[column] for column in columns]
        lines.append(f"| {name} | " + " | ".join(f"{v:.1f}" for v in values) + f" | {sum(values) / len(values):.1f} |")
    return "\n".join(lines) + "\n"


def rows_table(results: dict[str, Any]) -> str:
    """Rows of Rouge-L by task, as they are in the file."""
    return markdown(list(next(iter(results.values()))), results)


def race_tables(results: dict[str, Any]) -> str:
    """What `bench_merge.py` measured: command and machine, what was aimed at, and every contestant."""
    machine, settings = results["machine"], results["settings"]
    versions: dict[str, str] = {}
    for found in results["versions"].values():
        versions |= found if isinstance(found, dict) else {}
    named = ", ".join(f"{name} {versions[name]}" for name in ("sparselet", "torch", "mergekit", "peft") if name in versions)
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB"
    lines = [f"`{results['command']}`", "", f"{results['date']}, {where}; {named}.", ""]
    if machine["load_before"] > BUSY:
        load = machine["load_before"]
        lines += [f"The load average of the minute before was {load:.1f}: what ran then may still have run at the start.", ""]
    lines += ["| aim | | found |", "| --- | --- | ---: |"]
    for aim in results["targets"]:
        lines.append(f"| {aim['what']} | {aim['aim']} | {aim['found']:.1f}{' (missed)' if aim['met'] is False else ''} |")
    part = settings["layers"] / settings["layers_of_model"]
    scaled = f" scaled to {settings['layers_of_model']} layers |" if part < 1 else ""
    lines += ["", f"| | method | result | seconds (least to most) |{scaled} × floor | MB |"]
    lines += ["| --- | --- | --- |" + " ---: |" * (4 if scaled else 3)]
    for row in results["rows"]:
        parameters = ", ".join(f"{name} {value}" for name, value in row["parameters"].items() if name != "weight")
        cells = [row["library"], f"{row['method']} ({parameters})" if parameters else row["method"], row["how"]]
        cells.append(f"{row['median']:.2f} ({row['min']:.2f} to {row['max']:.2f})")
        cells += [f"{row['median'] / part:.1f}"] if scaled else []
        lines.append(f"| {' | '.join(cells)} | {row['times_floor']:.1f} | {row['peak_bytes'] / 1e6:.0f} |")
    differences = [f"{row['method']} {row['difference']:.0e}" for row in results["rows"] if "difference" in row]
    if differences:
        lines += ["", f"mergekit's merged deltas differ from sparselet's by (ℓ2, relative): {', '.join(differences)}."]
    return "\n".join(lines) + "\n"


def merge_methods_table(results: dict[str, Any]) -> str:
    """Rouge-L of experts by themselves, and of each kind of expert merged by each method."""
    tasks = list(results["base"])
    lines = []
    for kind, merged in results["merged"].items():
        rows = {"base model": results["base"], "each task's own expert": results["individual"][kind], **merged}
        scores = {label: {task: found[task]["rougeL"] for task in tasks} for label, found in rows.items()}
        lines += [f"**{kind}**, learning rate {results['rates'][kind]}", "", markdown(tasks, scores)]
    return "\n".join(lines)


def kinds_table(results: dict[str, Any]) -> str:
    """Validation loss by kind of expert, learning rate and task."""
    rows = {f"{kind}, {rate}": found for kind, rates in results.items() for rate, found in rates.items()}
    return loss_table(rows)


TABLES = {
    "learning_rate_baselines": kinds_table,
    "merge_methods": merge_methods_table,
    "compare_scores": rows_table,
    "demo": demo_table,
    "real_tasks": scores_table,
    "learning_rate": loss_table,
    "merge": race_tables,
    "merge_phi3": race_tables,
}


def fill(text: str) -> str:
    """The page with every table it has a place for."""
    for name, draw in TABLES.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if place.search(text):
            table = draw(json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()))
            text = place.sub(lambda match, table=table: f"{match.group(1)}{table}{match.group(2)}", text)
    return text


def main() -> None:
    wrong = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        filled = fill(text)
        if "--check" in sys.argv[1:]:
            wrong += [page] if filled != text else []
        else:
            path.write_text(filled)
    if wrong:
        sys.exit(f"the tables of {', '.join(wrong)} are not what benchmarks/results says; run {Path(__file__).name}")


if __name__ == "__main__":
    main()
