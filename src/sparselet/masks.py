"""From scores to masks: exactly k blocks, ties to the lower index, per target or over all targets."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from sparselet import kernels
from sparselet.delta import index_dtype
from sparselet.errors import DensityOutOfRange, NonFiniteScore


def check_density(density: float) -> float:
    """`density` as a float. Raises DensityOutOfRange unless it is in (0, 1]."""
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise DensityOutOfRange(f"density must be in (0, 1], got {density!r}. It is a fraction, not a percentage.")
    return float(density)


def blocks_to_keep(density: float, blocks: int) -> int:
    """k = max(1, round(density · blocks)) (paper, Eq. 3, for any block). Raises DensityOutOfRange."""
    return max(1, round(check_density(density) * blocks))


def top_k(scores: Tensor, k: int) -> Tensor:
    """The ids of the k largest of `scores` [blocks], ascending; among equal scores the lower ids are taken.

    Raises NonFiniteScore.
    """
    _require_finite(scores)
    if k <= 0:
        return torch.empty(0, dtype=index_dtype(scores.numel()), device=scores.device)
    if k >= scores.numel():
        return torch.arange(scores.numel(), dtype=index_dtype(scores.numel()), device=scores.device)
    threshold = kernels.kth_largest([scores], k)
    return _at_threshold(scores, threshold, k)


def top_k_by_row(scores: Tensor, k: int, rows: int, transposed: bool = False) -> Tensor:
    """The ids of k of `scores` [blocks], ascending, spread evenly over output rows (NeuroAda, Zhang et al. 2025).

    Each row of blocks keeps the ⌊k / rows⌋ largest of its own; the places left go to the largest of the others. rows: rows of
    blocks of the target as it is stored; transposed: outputs lie along its columns. Raises NonFiniteScore.
    """
    _require_finite(scores)
    grid = scores.view(rows, -1).t() if transposed else scores.view(rows, -1)
    each = min(k // grid.shape[0], grid.shape[1])
    if not each:
        return top_k(scores, k)
    chosen = torch.zeros_like(grid, dtype=torch.bool).scatter_(
        1, grid.sort(dim=1, descending=True, stable=True).indices[:, :each], True
    )
    chosen = (chosen.t() if transposed else chosen).reshape(-1)
    others = kernels.selected(~chosen)
    chosen[others[top_k(scores[others], k - int(chosen.sum())).long()]] = True
    return kernels.selected(chosen).to(index_dtype(scores.numel()))


def top_k_global(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """The k largest scores of all targets together, as ascending ids by target; a target may get none.

    Among equal scores, those of the earlier target (in the mapping's order), then the lower ids, are taken.
    Raises NonFiniteScore.
    """
    threshold = global_threshold(scores, k)
    above = sum(int((target > threshold).sum()) for target in scores.values())
    remaining = min(k, sum(target.numel() for target in scores.values())) - above
    masks = {}
    for name, target in scores.items():
        strictly = int((target > threshold).sum())
        equal = int((target == threshold).sum())
        taken = min(remaining, equal)
        remaining -= taken
        masks[name] = _at_threshold(target, threshold, strictly + taken)
    return masks


def global_threshold(scores: Mapping[str, Tensor], k: int) -> Tensor:
    """The k-th highest score over all targets (paper, Eq. 5), a scalar. Raises NonFiniteScore."""
    for target in scores.values():
        _require_finite(target)
    return kernels.kth_largest(list(scores.values()), min(k, sum(target.numel() for target in scores.values())))


def dropped_layers(scores: Mapping[str, Tensor], density: float) -> set[str]:
    """The targets of the layers to drop (paper, Eq. 6): all those whose every score lies below the global threshold.

    The threshold is that of Eq. 5 with k = density · all blocks. Targets are of one layer if their names are equal up to the
    first number; a target without a number is a layer of its own.
    Raises DensityOutOfRange, NonFiniteScore.
    """
    threshold = global_threshold(scores, blocks_to_keep(density, sum(target.numel() for target in scores.values())))
    kept = {layer_of(name) for name, target in scores.items() if bool((target >= threshold).any())}
    return {name for name in scores if layer_of(name) not in kept}


def layer_of(target: str) -> str:
    """The name of a target's layer: up to and including the first part that is a number, or else the target's own name."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", target)
    return match.group(0) if match else target


def projection_of(target: str) -> str:
    """A target's name without its layer's, such as `self_attn.q_proj`."""
    return target.removeprefix(layer_of(target)).lstrip(".") or target


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts numbers in names by value."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _at_threshold(scores: Tensor, threshold: Tensor, k: int) -> Tensor:
    """The ids of all scores above `threshold` and of the first that equal it, k together, ascending."""
    ids = kernels.selected(scores >= threshold)
    if len(ids) > k:
        equal = scores.index_select(0, ids) == threshold
        ids = ids[~equal | (equal.cumsum(0) <= k - int((~equal).sum()))]
    return ids.to(index_dtype(scores.numel()))


def _require_finite(scores: Tensor) -> None:
    if not kernels.all_finite(scores):
        raise NonFiniteScore("a score is NaN or infinite; the loss has probably diverged. Lower the learning rate.")
