"""Means on the sphere: the directions of the experts' changes are averaged, and their lengths apart from that.

The results are linear combinations Σ cᵢ·ΔWᵢ whose coefficients follow from lengths and angles alone. So the coefficients are
found in float64 from the Gram matrix, whatever the size of the target, and the deltas are added once.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError
from sparselet.kernels import selected
from sparselet.merging.algebra.entries import common_blocks, compact, mask_count, weighted_sum
from sparselet.merging.algebra.gram import cosines, gram
from sparselet.merging.algebra.ranges import require_finite_number, require_flag, require_sum
from sparselet.merging.method import MergeMethod

_NO_DIRECTION = 1e-6  # of its terms' lengths: a shorter sum is taken for 0; from a Gram matrix it is known to about 1e-8


def multislerp(deltas: Sequence[SparseDelta], weights: Sequence[float], *, normalize_weights: bool = True) -> SparseDelta:
    """Multi-SLERP (Goddard, in mergekit): ΔW_m = (Σ αᵢ‖ΔWᵢ‖) · m/‖m‖,  m = Σ αᵢ·ΔWᵢ/‖ΔWᵢ‖,  αᵢ = wᵢ / Σ wⱼ.

    mergekit adds a step: the mean of the unit vectors' tangents at m/‖m‖, with the same weights. That mean is m less its own
    projection on m, always 0, so the step is left out here.
    A delta that is zero has no direction and counts for the length only. Where the directions cancel (‖m‖ ≤ 1e-6 · Σ|αᵢ|),
    ΔW_m is Σ αᵢ·ΔWᵢ, in mergekit for two experts only; it refuses more.

    normalize_weights: if False, αᵢ = wᵢ.
    deltas: N of one target. weights: N, of any sign.
    Returns a delta on the union of the masks, of blocks when all have the same.
    Raises ShapeMismatch, ArgumentError (a parameter out of range, weights to be divided by a sum of 0).
    """
    require_flag("normalize_weights", normalize_weights)
    alphas = _shares("multislerp", weights) if normalize_weights else torch.tensor(list(weights), dtype=torch.float64)
    deltas = common_blocks(deltas)
    products = gram(deltas)
    return _along(deltas, products, alphas, _block(alphas, cosines(products)))


def karcher(deltas: Sequence[SparseDelta], weights: Sequence[float], *, max_iter: int = 10, tol: float = 1e-5) -> SparseDelta:
    """Karcher mean on the sphere (Wang et al. 2026, in mergekit): ΔW_m = (Σ αᵢ‖ΔWᵢ‖) · μ,  αᵢ = wᵢ / Σ wⱼ.

    μ is the unit vector at which the directions uᵢ = ΔWᵢ/‖ΔWᵢ‖ pull evenly: Σ αᵢ·log_μ(uᵢ) = 0. It is sought from m/‖m‖,
    m = Σ αᵢ·uᵢ, going along the pull by the pull's own length, `max_iter` times or until the pull is shorter than `tol`.
    mergekit has no weights; 1 each is its mean. A delta that is zero counts for the length only; in mergekit one shorter than
    tol. Where the directions cancel at the start (as above), ΔW_m is Σ αᵢ·ΔWᵢ; mergekit starts from the first expert, which
    makes the order matter. A direction opposite to μ pulls to no side, and is left out of that iteration.

    deltas: N of one target. weights: N, of any sign.
    Returns a delta on the union of the masks, of blocks when all have the same.
    Raises ShapeMismatch, ArgumentError (a parameter out of range, weights that sum to 0).
    """
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 0:
        raise ArgumentError(f"max_iter must be an integer of at least 0, got {max_iter!r}.")
    require_finite_number("tol", tol)
    if tol < 0:
        raise ArgumentError(f"tol must be at least 0, got {tol!r}.")
    alphas = _shares("karcher", weights)
    deltas = common_blocks(deltas)
    products = gram(deltas)
    cosine = cosines(products)
    direction = _block(alphas, cosine)
    if direction is not None:
        direction = _even(direction, alphas, cosine, max_iter, tol)
    return _along(deltas, products, alphas, direction)


def _shares(method: str, weights: Sequence[float]) -> Tensor:
    """αᵢ = wᵢ / Σ wⱼ, float64 [N]. Raises ArgumentError if they sum to 0."""
    return torch.tensor(list(weights), dtype=torch.float64) / require_sum(method, weights)


# Vectors are written as coefficients [N] of the unit vectors uᵢ, whose products are the cosines [N, N].


def _length(vector: Tensor, cosine: Tensor) -> float:
    return math.sqrt(max(0.0, float(vector @ cosine @ vector)))


def _block(vector: Tensor, cosine: Tensor) -> Tensor | None:
    """The vector at length 1, or None if the uᵢ in it cancel."""
    length = _length(vector, cosine)
    return vector / length if length > _NO_DIRECTION * float(vector.abs().sum()) else None


def _even(mean: Tensor, alphas: Tensor, cosine: Tensor, max_iter: int, tol: float) -> Tensor:
    """The unit vector μ at which the uᵢ pull evenly, sought from `mean`."""
    for _ in range(max_iter):
        pull = _pull(mean, alphas, cosine)
        length = _length(pull, cosine)
        if length <= tol:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * pull
        mean = mean / _length(mean, cosine)
    return mean


def _pull(mean: Tensor, alphas: Tensor, cosine: Tensor) -> Tensor:
    """Σ αᵢ·log_μ(uᵢ) = Σ αᵢ · θᵢ/sin θᵢ · (uᵢ − cos θᵢ·μ), θᵢ the angle between uᵢ and μ.

    The last factor is 0 where uᵢ is μ or −μ.
    """
    dots = (cosine @ mean).clamp(-1, 1)
    angle = dots.arccos()
    ratio = torch.where(angle.sin() > _NO_DIRECTION, angle / angle.sin(), torch.ones_like(angle))
    pulls = alphas * ratio
    return pulls - (pulls @ dots) * mean


def _along(deltas: Sequence[SparseDelta], products: Tensor, alphas: Tensor, direction: Tensor | None) -> SparseDelta:
    """The mean length along a direction; Σ αᵢ·ΔWᵢ if there is none."""
    norms = products.diagonal().sqrt()
    scaled = alphas if direction is None else (alphas @ norms) * direction / norms
    coefficients = torch.where(norms > 0, scaled, torch.zeros_like(scaled)).tolist()
    deltas, positions = compact(deltas)
    blocks = selected(mask_count(deltas))
    values = weighted_sum(deltas, coefficients).index_select(0, blocks)
    return positions.delta(blocks, values)


MULTISLERP = MergeMethod("multislerp", multislerp, "mean direction, at the mean length", "Goddard, mergekit")

KARCHER = MergeMethod("karcher", karcher, "Karcher mean of the directions, at the mean length", "Wang et al. 2026")
