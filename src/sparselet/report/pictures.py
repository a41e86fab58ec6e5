"""The demo's picture: scores by task, and the change of each layer by each expert."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np

from sparselet.io.atomic import atomic_write
from sparselet.report.summary import TargetSummary

matplotlib.use("Agg")  # before pyplot: there may be no screen
from matplotlib import pyplot as plt

# Okabe and Ito's palette, which colour-blind readers can distinguish.
DEMO_COLOURS = {"base": "#999999", "own expert": "#0072B2", "merged": "#E69F00"}


def draw_demo(
    scores: Mapping[str, Mapping[str, float]],
    changes: Mapping[str, Mapping[str, Mapping[str, TargetSummary]]],
    path: str | Path,
) -> None:
    """Write one PNG: bars of Rouge-L by task for base, own expert and merged; below, a heat map for each expert.

    scores: `{"base" | "own expert" | "merged": {task: Rouge-L}}`. changes: `{expert: layer_table(adapter)}`.
    """
    figure = plt.figure(figsize=(10, 4 + 1.3 * len(changes)), layout="constrained")
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=[3, 1.2 * len(changes)]))
    _bars(top.subplots(), scores)
    _heat_maps(bottom, changes)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
    plt.close(figure)


def _bars(axes: Any, scores: Mapping[str, Mapping[str, float]]) -> None:
    tasks = list(next(iter(scores.values())))
    width = 0.8 / len(scores)
    for i, (name, by_task) in enumerate(scores.items()):
        places = np.arange(len(tasks)) + (i - (len(scores) - 1) / 2) * width
        bars = axes.bar(places, [by_task[task] for task in tasks], width * 0.92, color=DEMO_COLOURS.get(name), label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=9)
    axes.set_xticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
    axes.set_ylim(0, 112)
    axes.set_ylabel("Rouge-L")
    axes.set_title("Who gained what: Rouge-L on test rows", loc="left", fontsize=12)
    axes.legend(ncols=len(scores), loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _heat_maps(figure: Any, changes: Mapping[str, Mapping[str, Mapping[str, TargetSummary]]]) -> None:
    all_axes = np.atleast_1d(figure.subplots(len(changes), 1, sharex=True))
    largest = max(cell.rms for table in changes.values() for row in table.values() for cell in row.values())
    image = None
    for axes, (expert, table) in zip(all_axes, changes.items(), strict=True):
        layers = list(dict.fromkeys(layer for row in table.values() for layer in row))
        grid = [[row[layer].rms if layer in row else 0.0 for layer in layers] for row in table.values()]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=largest)
        axes.set_yticks(range(len(table)), [name.rpartition(".")[2] for name in table], fontsize=8)
        axes.set_title(expert.replace("_", " "), loc="left", fontsize=9)
    all_axes[-1].set_xlabel("layer")
    figure.suptitle("Where each expert changed the model", x=0.01, ha="left", fontsize=12)
    figure.colorbar(image, ax=list(all_axes), label="RMS change", pad=0.01)
