"""Write the measured tables of README.md, docs/results.md and docs/performance.md from benchmarks/results/*.json, and beside
each benchmark's JSON a Markdown file with all its contestants.

    python benchmarks/tables.py            rewrite them
    python benchmarks/tables.py --check    fail if a table differs from the results

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME.json holds its figures, or of NAME-MACHINE-DATE.json
the one with the latest date.
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from racing.record import BUSY
from study_tables import study_tables

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *(f"docs/{page}.md" for page in ("results", "performance", "profiles", "sparse-attention", "serving")))


def heading(
    results: dict[str, Any], versions: dict[str, str], packages: tuple[str, ...], where: str | None = None
) -> list[str]:
    """Command, date, machine and versions, and the head of the aims' table.

    With a warning where something was running in the minute before, be it another benchmark that had just ended.
    """
    machine = results["machine"]
    where = where or f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB"
    named = ", ".join(f"{package} {versions[package]}" for package in packages if package in versions)
    lines = [f"`{results['command']}`", "", f"{results['date']}, {where}; {named}.", ""]
    if machine["load_before"] > BUSY:
        told = f"The load average of the minute before was {machine['load_before']:.1f}"
        lines += [f"{told}: what ran then may still have run at the start.", ""]
    return [*lines, "| aim | | found |", "| --- | --- | ---: |"]


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


def merge_methods_table(results: dict[str, Any]) -> str:
    """Rouge-L of experts by themselves, and of each kind of expert merged by each method."""
    tasks = list(results["base"])
    lines = []
    for kind, merged in results["merged"].items():
        rows = {"base model": results["base"], "each task's own expert": results["individual"][kind], **merged}
        scores = {label: {task: found[task]["rougeL"] for task in tasks} for label, found in rows.items()}
        lines += [f"**{kind}**, learning rate {results['rates'][kind]}", "", markdown(tasks, scores)]
    return "\n".join(lines)


def profile_sizes_table(results: dict[str, Any]) -> str:
    """Rouge-L of the merge, and how much of the experts' gain it keeps, by the rank of profiles."""
    lines = ["| rank | MB of a profile | Rouge-L | kept, % |", "| --- | ---: | ---: | ---: |"]
    for rank, found in sorted(results.items(), key=lambda entry: entry[1]["bytes"]):
        lines.append(f"| {rank} | {short(found['bytes'] / 1e6)} | {found['rougeL']:.1f} | {found['kept']:.1f} |")
    return "\n".join(lines) + "\n"


def kinds_table(results: dict[str, Any]) -> str:
    """Validation loss by kind of expert, learning rate and task."""
    rows = {f"{kind}, {rate}": found for kind, rates in results.items() for rate, found in rates.items()}
    return loss_table(rows)


def aims_table(results: dict[str, Any]) -> str:
    """A benchmark's command, machine and aims, and a link to the table of all contestants, which `contestants_page` writes."""
    where = results["machine"].get("gpu") if results["settings"].get("device") == "cuda" else None
    lines = heading(results, results["versions"], ("sparselet", "torch", "transformers", "peft", "mergekit"), where)
    for aim in results["targets"]:
        value = "not measured" if aim["found"] is None else short(aim["found"])
        lines.append(f"| {aim['what']} | {aim['aim']} | {value}{' (missed)' if aim['met'] is False else ''} |")
    return "\n".join(lines) + f"\n\n[All contestants](../benchmarks/results/{results['stem']}.md)\n"


def contestants_page(results: dict[str, Any]) -> str:
    """The Markdown file beside a benchmark's JSON: a table of each group."""
    lines = [f"`{results['command']}`, {results['date']}. Written by benchmarks/tables.py from {results['stem']}.json."]
    for group in dict.fromkeys(row["group"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["group"] == group]
        table = {"memory": memory_rows, "serve": serve_rows}.get(group)
        lines += ["", *(time_rows(group, rows) if table is None else table(rows))]
    different = [
        f"{r['name']} {r['value']['difference']:.0e}" for r in results["rows"] if (r.get("value") or {}).get("difference")
    ]
    if different and results["rows"][0]["group"] == "merge":
        lines += ["", f"mergekit's merged deltas differ from sparselet's by (ℓ2, relative): {'; '.join(different)}."]
    return "\n".join(lines) + "\n"


def time_rows(group: str, rows: list[dict[str, Any]]) -> list[str]:
    """Median seconds, and the median and quartiles of the ratios to the first row."""
    first = rows[0]["name"]
    lines = [f"| {group} | | seconds | × {first} (quartiles) | the same in CPU-seconds |", "| --- | --- |" + " ---: |" * 3]
    for row in rows:
        cells = [row["library"], row["name"]]
        if "error" in row:
            cells += ["failed: " + row["error"].replace("|", "/"), "", ""]
        else:
            cells.append(short(row["median"]))
            cells += [quartiles(row["times_floor"][kind]) if "times_floor" in row else "1" for kind in ("wall", "cpu")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def memory_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Median peaks in MB, and over the first row's."""
    lines = [f"| memory | | MB | over the {rows[0]['name']}'s |", "| --- | --- | ---: | ---: |"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['library']} | {row['name']} | failed: {row['error'].replace('|', '/')} | |")
            continue
        peak = statistics.median(row["peak_bytes"])
        lines.append(f"| {row['library']} | {row['name']} | {peak / 1e6:.0f} | {row['over_floor_bytes'] / 1e6:+.0f} |")
    return lines


def serve_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Median rates, times of answers, and each server's highest memory."""
    head = ("", "", "tokens/s", "× the floor", "first token, ms: p50, p95", "each token, ms: p50, p95", "MB")
    lines = [f"| {' | '.join(head)} |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for row in rows:
        value = row["value"]
        times = [f"{short(1e3 * value[f'{kind}_p50'])}, {short(1e3 * value[f'{kind}_p95'])}" for kind in ("first", "each")]
        rate = short(statistics.median(value["tokens_per_second"]))
        cells = [
            row["library"],
            row["name"],
            rate,
            short(value["times_floor"]),
            *times,
            f"{value['server_peak_bytes'] / 1e6:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def quartiles(values: list[float]) -> str:
    low, middle, high = (short(value) for value in values)
    return f"{middle} ({low} to {high})"


def short(value: float) -> str:
    """Three digits of a small number, none after the point of a large one."""
    if not value:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def study(results: dict[str, Any]) -> str:
    """A study's tables. Its cost.json lies beside, as NAME_cost.json."""
    cost = ROOT / f"benchmarks/results/{results['stem']}_cost.json"
    return study_tables(results, json.loads(cost.read_text()) if cost.exists() else {})


TRAINING = ("train", "memory", "switch")  # also measured on a GPU, by model
BENCHMARKS = (
    *("merge", "merge_phi3", "train_steps", "select", "end_to_end", "evaluate", "attention", "serve", "library", *TRAINING),
    *(f"{name}_cuda_{model}" for name in TRAINING for model in ("smollm2", "phi3")),
    *(f"{name}_cuda_smollm2" for name in ("select", "end_to_end", "evaluate")),
)

STUDIES = ("small", "medium", "recipes", "few", "ten", "twenty", "regions", "attention", "training")

TABLES = {
    "learning_rate_baselines": kinds_table,
    "merge_methods": merge_methods_table,
    "compare_scores": rows_table,
    "profile_sizes": profile_sizes_table,
    "demo": demo_table,
    "real_tasks": scores_table,
    "learning_rate": loss_table,
    **dict.fromkeys(BENCHMARKS, aims_table),
    **dict.fromkeys((f"study_{name}" for name in STUDIES), study),
}


def file_of(name: str) -> Path:
    """Where the figures of a table are; of several dates the latest, of several machines on it the last by name."""
    results = ROOT / "benchmarks/results"
    dated = sorted(results.glob(f"{name}-*-????-??-??.json"), key=lambda file: (file.stem[-len("0000-00-00") :], file.name))
    return dated[-1] if dated else results / f"{name}.json"


def load(file: Path) -> dict[str, Any]:
    """A file of results, with `stem`, its name, if it is a benchmark's or a study's."""
    results = json.loads(file.read_text())
    return {**results, "stem": file.stem} if {"rows", "tables"} & results.keys() else results


def fill(text: str) -> str:
    """The page with every table it has a place for; a place without a result says so."""
    for name, draw in TABLES.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if place.search(text):
            file = file_of(name)
            table = draw(load(file)) if file.exists() else "Not measured yet.\n"
            text = place.sub(lambda match, table=table: f"{match.group(1)}{table}{match.group(2)}", text)
    return text


def main() -> None:
    pages = {ROOT / page: fill((ROOT / page).read_text()) for page in PAGES}
    files = [file for name in BENCHMARKS if (file := file_of(name)).exists()]
    pages |= {file.with_suffix(".md"): contestants_page(load(file)) for file in files}
    if "--check" in sys.argv[1:]:
        wrong = [str(path.relative_to(ROOT)) for path, text in pages.items() if not path.exists() or path.read_text() != text]
        if wrong:
            sys.exit(f"{', '.join(wrong)} differ from benchmarks/results; run {Path(__file__).name}")
        return
    for path, text in pages.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
