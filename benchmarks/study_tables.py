"""A study's tables and claims as Markdown, from its results.json and cost.json."""

import re
from collections.abc import Collection
from typing import Any

from sparselet.report.quantities import format_bytes, format_duration, format_number


def study_tables(results: dict[str, Any], cost: dict[str, Any]) -> str:
    """How it was run, every claim with its verdict, and every table with the paper's figures in italics."""
    lines = [*_heading(results, cost), *_claims(results["claims"], results["tables"])]
    for table in results["tables"].values():
        source = f" ({table['source']})" if table["source"] else ""
        lines += ["", f"**{_cell(table['title'])}**{source}", "", *_table(table)]
        lines += ["", table["note"]] if table["note"] else []
    return "\n".join(lines) + "\n"


def _heading(results: dict[str, Any], cost: dict[str, Any]) -> list[str]:
    """Command, date, machine, versions, and what it took; what the cost does not say is left out."""
    machine, units, held = cost.get("machine", {}), results["units"], [task["held"] for task in results["tasks"].values()]
    ran = [cost["date"]] if "date" in cost else []
    ran += [str(machine[key]) for key in ("gpu", "processor") if key in machine]
    ran += [f"{machine['cores']} cores"] if "cores" in machine else []
    packages = [f"{name} {version}" for name, version in cost.get("versions", {}).items()]
    took = [format_duration(cost["wall_seconds"])] if cost.get("wall_seconds") is not None else []
    took += [f"{cost['core_hours']:.1f} core-hours"] if "core_hours" in cost else []
    took += [f"at most {format_bytes(cost['peak_rss_bytes'])} in one process"] if "peak_rss_bytes" in cost else []
    about = "; ".join(", ".join(part) for part in (ran, packages, took) if part)
    did = f"{results['settings'].get('model', 'base model')}, {held.count('in')} held-in and {held.count('out')} held-out tasks"
    did += f": {units['train']} trainings, {units['merge']} merges, {units['evaluate']} evaluations"
    did += f", {units['analyse']} analyses" if units.get("analyse") else ""
    did += f"; {units['missing']} of them have no result." if units["missing"] else "."
    return [*([f"`{cost['command']}`", ""] if "command" in cost else []), *([f"{about}.", ""] if about else []), did, ""]


def _claims(claims: list[dict[str, Any]], tables: Collection[str]) -> list[str]:
    """Claims and verdicts; of a part of a study those about its tables, and the number of the others."""
    absent = [re.match(r"the study has no (\w+):", claim["why"]) for claim in claims]
    others = [match is not None and match[1] not in tables for match in absent]
    if all(others):
        return []
    lines = ["| claim | source | verdict | difference (95 % interval) | decided by |", "| --- | --- | --- | ---: | --- |"]
    for claim in [claim for claim, other in zip(claims, others, strict=True) if not other]:
        found = ""
        if claim["difference"] is not None:
            difference, low, high = (format_number(claim[key], sign=True) for key in ("difference", "low", "high"))
            found = f"{difference} ({low} to {high})"
        texts = (
            claim["text"],
            claim["source"],
            f"**{claim['verdict']}**" if claim["verdict"] == "reversed" else claim["verdict"],
            found,
            claim["where"],
        )
        lines.append(f"| {' | '.join(map(_cell, texts))} |")
    return [*lines, "", f"{sum(others)} more claims are about other parts of the study."] if any(others) else lines


def _table(table: dict[str, Any]) -> list[str]:
    """A column of the paper's figures beside each column that has some."""
    columns = zip(*(row["cells"] for row in table["rows"]), strict=True)
    beside = [any(cell and cell["paper"] is not None for cell in column) for column in columns]
    head = [
        text for name, paper in zip(table["columns"], beside, strict=True) for text in [name, *(["*paper*"] if paper else [])]
    ]
    lines = ["| | " + " | ".join(map(_cell, head)) + " |", "| --- |" + " ---: |" * len(head)]
    for row in table["rows"]:
        texts = []
        for cell, paper in zip(row["cells"], beside, strict=True):
            texts += [_mean(cell), *([_paper(cell)] if paper else [])]
        lines.append(f"| {_cell(row['label'])} | {' | '.join(texts)} |")
    return lines


def _mean(cell: dict[str, Any] | None) -> str:
    """Mean ± standard error, and how many units are missing."""
    if cell is None:
        return ""
    error = f" ± {format_number(cell['error'], cell['measure'], like=cell['mean'])}" if cell["error"] else ""
    return format_number(cell["mean"], cell["measure"]) + error + (f" ({cell['missing']} missing)" if cell["missing"] else "")


def _paper(cell: dict[str, Any] | None) -> str:
    """The paper's figure in italics."""
    return f"*{format_number(cell['paper'], cell['measure'])}*" if cell and cell["paper"] is not None else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
