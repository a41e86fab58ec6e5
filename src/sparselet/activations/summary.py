"""Sparsity of probed states by groups of rows, with and without outlier channels, beside a Gaussian and the rows' losses."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from sparselet.activations.correlation import Correlation, spearman, spearman_within
from sparselet.activations.probe import Probe
from sparselet.activations.statistics import Sparsity, gaussian_sparsity, outlier_channels, sparsity, without_channels
from sparselet.intervals import MeanInterval, mean_interval

STATISTICS = tuple(field.name for field in fields(Sparsity))
CORRELATED = ("hoyer", "gini", "top5", "effective_rank")  # those whose correlation with the loss is measured


@dataclass(frozen=True)
class ProbeGroup:
    """Rows that belong together, `count` of them. pair: the group whose rows these are in another form, one by one."""

    name: str
    count: int
    pair: str | None = None


@dataclass(frozen=True)
class GroupSparsity:
    """Means over a group's rows. difference: paired, minus those of the group's `pair`; None without one."""

    name: str
    means: dict[str, MeanInterval]
    difference: dict[str, MeanInterval] | None


@dataclass(frozen=True)
class LayerSparsity:
    """One layer, raw or without its outlier channels.

    removed: the channels that are left out. null: the statistics of Gaussian vectors of the same width. pooled, within:
    Spearman's ρ of a statistic with the row's loss, over all rows and within groups. by_row: [rows] of each statistic.
    """

    layer: int
    removed: tuple[int, ...]
    groups: tuple[GroupSparsity, ...]
    null: dict[str, float]
    pooled: dict[str, Correlation]
    within: dict[str, Correlation]
    by_row: dict[str, np.ndarray]


def summarize(probed: Probe, groups: Sequence[ProbeGroup], outliers: float = 0.01, seed: int = 0) -> list[LayerSparsity]:
    """Two entries for each layer of `probed`, raw and without outliers, whose rows are those of the groups one after another.

    A row's statistic is the mean over its positions. outliers: fraction of the channels that count as such, at each
    layer those with the largest mean energy over all rows. seed: of the bootstraps.
    """
    summaries = []
    for layer, states in zip(probed.layers, probed.states, strict=True):
        channels = outlier_channels(states.flatten(0, 1), outliers)
        for removed in (torch.empty(0, dtype=torch.int64), channels):
            kept = without_channels(states.flatten(0, 1), removed).view(*states.shape[:2], -1)
            summaries.append(_summary(layer, removed, kept, probed.losses.numpy(), groups, seed))
    return summaries


def _summary(
    layer: int, removed: Tensor, states: Tensor, losses: np.ndarray, groups: Sequence[ProbeGroup], seed: int
) -> LayerSparsity:
    measured = sparsity(states.flatten(0, 1))
    by_row = {name: vars(measured)[name].view(states.shape[:2]).mean(1).numpy() for name in STATISTICS}
    ends = np.cumsum([group.count for group in groups])
    rows = {group.name: slice(end - group.count, end) for group, end in zip(groups, ends, strict=True)}
    summaries = []
    for group in groups:
        own = {name: numbers[rows[group.name]] for name, numbers in by_row.items()}
        means = {name: mean_interval(numbers, seed) for name, numbers in own.items()}
        difference = None
        if group.pair is not None:
            difference = {name: mean_interval(own[name] - by_row[name][rows[group.pair]], seed) for name in STATISTICS}
        summaries.append(GroupSparsity(group.name, means, difference))
    scored = np.isfinite(losses)
    labels = np.repeat([group.name for group in groups], [group.count for group in groups])[scored].tolist()
    enough = scored.sum() >= 3
    return LayerSparsity(
        layer=layer,
        removed=tuple(removed.tolist()),
        groups=tuple(summaries),
        null=gaussian_sparsity(states.shape[-1], seed),
        pooled={name: spearman(by_row[name][scored], losses[scored], seed) for name in CORRELATED if enough},
        within={name: spearman_within(by_row[name][scored], losses[scored], labels, seed) for name in CORRELATED if enough},
        by_row=by_row,
    )
