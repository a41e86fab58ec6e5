"""A study's results.json and cost.json with invented numbers, in the shapes of the paper's tables."""

import random
from typing import Any

HELD_IN = ("sentiment", "number_words", "restaurant_slots", "question_kind", "paraphrase", "restaurant_text")
HELD_OUT = ("common_sense", "headline", "entailment")
DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.5, 0.8, 1.0)
COLUMNS = ["individual", "held-in", "held-out"]


def results() -> dict[str, Any]:
    """The whole file; the same at every call."""
    draw = random.Random(7)
    tables = {
        "density": _density(draw),
        "merging": _merging(draw),
        "scores": _scores(draw),
        "layer_drop": _layer_drop(draw),
        "second_stage": _second_stage(draw),
        "interference": _interference(draw),
        "n_experts": _n_experts(draw),
        "targets": _targets(draw),
        "selection": _selection(draw),
        "learning_rates": _over(
            draw, "Learning rate", "Figure 9", ("sparse", "LoRA", "full"), (1e-5, 1e-4, 1e-3), "learning rate"
        ),
        "block_sizes": _over(draw, "Size of a block", "Figure 10", ("block-sparse",), (8, 16, 32, 64, 128), "block size"),
    }
    return {
        "name": "sparse_adapters",
        "preset": "small",
        "tables": tables,
        "claims": _claims(),
        "settings": {
            "model": "packaged:smollm2-135m",
            "held_in": list(HELD_IN),
            "held_out": list(HELD_OUT),
            "epochs": 2,
            "seeds": [0],
        },
        "tasks": {
            name: {"held": held, "fingerprint": f"{k:02x}" * 16}
            for k, (name, held) in enumerate([*((n, "in") for n in HELD_IN), *((n, "out") for n in HELD_OUT)])
        },
        "base": "5c" * 32,
        "units": {"train": 84, "merge": 61, "evaluate": 702, "missing": 5},
    }


def cost() -> dict[str, Any]:
    """What the study took."""
    return {
        "units": {
            "train": {"count": 84, "seconds": 7011.2, "cpu_seconds": 7350.0},
            "merge": {"count": 61, "seconds": 0.0, "cpu_seconds": 0.0},
            "evaluate": {"count": 697, "seconds": 2417.9, "cpu_seconds": 2500.1},
        },
        "core_hours": 2.74,
        "peak_rss_bytes": 2_310_000_000,
        "wall_seconds": 5240.0,
        "versions": {"python": "3.11.2", "sparselet": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        "machine": {"processor": "AMD EPYC", "cores": 2, "memory_gib": 24.0},
        "date": "2026-11-22",
        "command": "sparselet study studies/sparse_adapters.toml --preset small --out OUT",
    }


def cell(draw: random.Random, near: float | None, tasks=HELD_IN, paper: float | None = None, **changes: Any) -> dict[str, Any]:
    """A cell with a mean near this one; without numbers if it is None."""
    by_task = {} if near is None else {name: min(100.0, max(0.0, draw.gauss(near, 14))) for name in tasks}
    found = {
        "mean": None,
        "error": None,
        "count": len(by_task),
        "measure": "rougeL",
        "paper": paper,
        "missing": 0,
        "tasks": by_task,
    }
    if by_task:
        found["mean"] = sum(by_task.values()) / len(by_task)
        found["error"] = (sum((v - found["mean"]) ** 2 for v in by_task.values()) / len(by_task) / (len(by_task) - 1)) ** 0.5
    else:
        found["missing"] = len(tasks)
    return {**found, **changes}


def table(
    title: str, source: str, columns: list[str], rows: dict[str, list], charts: list | None = None, note: str = ""
) -> dict:
    told = [{"label": label, "cells": cells} for label, cells in rows.items()]
    return {"title": title, "source": source, "note": note, "columns": columns, "charts": charts or [], "rows": told}


def _chart(kind: str = "dots", **changes: Any) -> dict[str, Any]:
    return {"kind": kind, "x_label": "", "x": [], "series": [], "log": False, "columns": [], **changes}


def _density(draw: random.Random) -> dict:
    rows: dict[str, list] = {}
    x: list[float | None] = []
    series: list[str] = []
    kinds = {
        "element-sparse": DENSITIES,
        "block-sparse": (0.05, 0.1, 0.5),
        "LoRA": (0.01, 0.05, 0.1, 0.5),
        "full fine-tuning": (1.0,),
    }
    for kind, found in kinds.items():
        for number in found:
            height = 66 + 9 * number**0.3 - 6 * (kind == "LoRA") - 2 * len(rows) / 10
            rows[f"{kind}, {number:g}" if len(found) > 1 else kind] = [
                cell(draw, height),
                cell(draw, height - 16 - 20 * number),
                cell(draw, 34 - 5 * number, HELD_OUT),
            ]
            x.append(number)
            series.append(kind)
    rows["base model"] = [None, cell(draw, 15), cell(draw, 28, HELD_OUT)]
    x.append(None)
    series.append("base model")
    charts = [_chart("lines", x_label="fraction of the targets' entries", x=x, series=series, log=True)]
    note = "LoRA's ranks are those of nearest size. The paper's curves are not printed as numbers."
    return table("Quality against density", "Figure 3, Figure 11", list(COLUMNS), rows, charts, note)


def _merging(draw: random.Random) -> dict:
    paper = {
        "full, uniform": (45.33, 38.98, 100.0),
        "full, arithmetic": (39.40, 25.31, 100.0),
        "full, ties": (50.21, 46.16, 100.0),
        "full, breadcrumbs": (39.44, 25.33, 100.0),
        "LoRA, uniform": (45.96, 44.01, 1.54),
        "element-sparse, overlap": (51.44, 43.09, 2.37),
        "block-sparse, overlap": (50.37, 43.61, 2.37),
        "multitask": (77.15, 54.00, 100.0),
    }
    rows = {
        label: [
            cell(draw, held_in - 4, paper=held_in),
            cell(draw, held_out - 9, HELD_OUT, paper=held_out),
            cell(draw, None, paper=part, mean=part, count=6, measure="percent", missing=0),
        ]
        for label, (held_in, held_out, part) in paper.items()
    }
    rows["full, breadcrumbs"][1] = cell(draw, None, HELD_OUT, paper=25.33)
    charts = [_chart(columns=["held-in", "held-out"])]
    return table("Merged models", "Table 1", ["held-in", "held-out", "% trained"], rows, charts)


def _scores(draw: random.Random) -> dict:
    paper = {
        "mcs": (77.54, 51.44, 43.03),
        "cs": (75.92, 49.49, 43.16),
        "gm": (76.64, 48.04, 42.89),
        "wm": (77.28, 47.37, 36.54),
    }
    paper |= {"gd": (76.23, 46.23, 43.38), "mcs_neg": (None,) * 3, "random": (None,) * 3}
    rows = {
        label: [
            cell(draw, 72, paper=alone),
            cell(draw, 47, paper=held_in),
            cell(draw, 34, HELD_OUT, paper=held_out),
        ]
        for label, (alone, held_in, held_out) in paper.items()
    }
    return table("Which score chooses the entries", "Table 2", list(COLUMNS), rows, [_chart()])


def _layer_drop(draw: random.Random) -> dict:
    layers = {"sparse": (30.0, 0.0, 32.0), "sparse, layer drop": (21.3, 1.1, 20.02)}
    scores = {"sparse": (51.44, 43.03), "sparse, layer drop": (48.45, 41.29)}
    rows = {
        label: [
            cell(draw, 48, paper=scores[label][0]),
            cell(draw, 33, HELD_OUT, paper=scores[label][1]),
            cell(draw, None, mean=mean, error=error, count=6, measure="active_layers", paper=paper, missing=0),
        ]
        for label, (mean, error, paper) in layers.items()
    }
    return table("Dropping layers", "Table 3, Equations 5 and 6", ["held-in", "held-out", "active layers"], rows, [_chart()])


def _second_stage(draw: random.Random) -> dict:
    paper = {"sparse, 1 epoch": (69.7, 50.96), "sparse, 5 epochs": (76.45, None), "all, 1 epoch": (73.9, 43.04)}
    paper |= {"all, 5 epochs": (76.72, None), "multitask": (77.15, 54.0)}
    rows = {
        label: [cell(draw, held_in - 8, paper=held_in), cell(draw, 44, HELD_OUT, paper=held_out) if held_out else None]
        for label, (held_in, held_out) in paper.items()
    }
    rows["all, 5 epochs"][0] = cell(draw, None, paper=76.72)
    return table("Training on after merging", "Table 4", ["held-in", "held-out"], rows, [_chart()])


def _interference(draw: random.Random) -> dict:
    rows = {
        "element-sparse": [cell(draw, 74, paper=77.54), cell(draw, 61), cell(draw, 47, paper=51.44)],
        "block-sparse": [cell(draw, 71), cell(draw, 62), cell(draw, 49, paper=50.37)],
    }
    columns = ["expert alone", "own mask only", "merged"]
    return table("Where merging hurts", "Figure 5", columns, rows, [_chart()], "The paper prints losses of 20.61 and 13.05.")


def _n_experts(draw: random.Random) -> dict:
    kinds = (
        "element-sparse, overlap",
        "block-sparse, overlap",
        "LoRA, uniform",
        "full, uniform",
        "full, arithmetic",
        "full, ties",
        "full, breadcrumbs",
    )
    rows, x, series = {}, [], []
    for k, kind in enumerate(kinds):
        for n in (2, 4, 6):
            rows[f"{kind}, N = {n}"] = [cell(draw, 70 - 3 * k - 4 * n)]
            x.append(n)
            series.append(kind)
    chart = _chart("lines", x_label="merged experts", x=x, series=series)
    return table("More and more experts", "Figure 6", ["held-in"], rows, [chart], "4 draws each; the error is over draws.")


def _targets(draw: random.Random) -> dict:
    labels = ("query, key, value", "query, key, value and output", "MLP down projection")
    rows = {label: [cell(draw, 72 - 3 * k), cell(draw, 47), cell(draw, 33, HELD_OUT)] for k, label in enumerate(labels)}
    return table("Which layers to train", "Figure 7", list(COLUMNS), rows, [_chart()])


def _selection(draw: random.Random) -> dict:
    rows = {label: [cell(draw, height)] for label, height in (("once, before training", 65), ("every 100 steps", 71))}
    return table("Selecting once or again and again", "Figure 8", ["individual"], rows, [_chart()])


def _over(
    draw: random.Random, title: str, source: str, kinds: tuple[str, ...], numbers: tuple[float, ...], x_label: str
) -> dict:
    rows = {f"{kind}, {number:g}": [cell(draw, 60 + 3 * k)] for kind in kinds for k, number in enumerate(numbers)}
    series = [kind for kind in kinds for _ in numbers]
    chart = _chart("lines", x_label=x_label, x=list(numbers) * len(kinds), series=series, log=True)
    return table(title, source, ["individual"], rows, [chart])


def _claims() -> list[dict[str, Any]]:
    return [
        {
            "text": "Merged sparse experts are better on held-in tasks than merged LoRA.",
            "source": "Section 4.2, Table 1",
            "verdict": "holds",
            "difference": 6.1,
            "low": 1.9,
            "high": 10.4,
            "where": "merging: element-sparse, overlap / held-in vs LoRA, uniform / held-in",
            "why": "the whole interval lies above 0",
        },
        {
            "text": "Multitask training is better on held-out tasks than any merged model.",
            "source": "Section 4.2",
            "verdict": "undecided",
            "difference": -2.8,
            "low": -9.0,
            "high": 3.1,
            "where": "merging: multitask / held-out vs full, ties / held-out",
            "why": "the interval has 0 in it",
        },
        {
            "text": "Sparse experts of density 0.01 are better than full fine-tuning.",
            "source": "Section 4.1, Figure 3",
            "verdict": "not tested",
            "difference": None,
            "low": None,
            "high": None,
            "where": "density: element-sparse, 0.01 / individual vs full fine-tuning / individual",
            "why": "4 of 12 units have no result",
        },
    ]
