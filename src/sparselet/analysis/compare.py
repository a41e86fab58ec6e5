"""Where two experts' changes meet, target by target."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparselet.analysis.pairs import Overlap, overlap_of, subspace_overlap
from sparselet.errors import ArgumentError
from sparselet.expert import ExpertOrDeltas
from sparselet.kernels.threads import one_thread
from sparselet.masks import natural_order


@dataclass(frozen=True)
class Comparison:
    """Two experts' changes on the targets that both have.

    masks: of the masks. largest: of the largest entries of each by magnitude, at `density` of each target; by_target: the same
    for each target. directions: mean cos² of the leading output directions, and its chance.
    """

    first: str
    second: str
    density: float
    targets: tuple[str, ...]
    masks: Overlap
    largest: Overlap
    by_target: tuple[Overlap, ...]
    directions: tuple[float, float]


@one_thread()
def compare(
    first: ExpertOrDeltas,
    second: ExpertOrDeltas,
    *,
    names: Sequence[str] = ("first", "second"),
    density: float = 0.01,
    rank: int = 8,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Where two experts' changes meet. density: of the largest entries. rank: leading directions of each target.

    Raises ArgumentError where they share no target, ShapeMismatch, DensityOutOfRange.
    """
    targets = sorted(set(first) & set(second), key=natural_order)
    if not targets:
        raise ArgumentError(f"{names[0]} and {names[1]} have no target in common.")
    masks, largest, angles = [], [], []
    for target in targets:
        a, b = first[target], second[target]
        masks.append(overlap_of(a, b))
        largest.append(overlap_of(a, b, density))
        angles.append(subspace_overlap(a.to_dense(), b.to_dense(), min(rank, a.shape[0])))
        if progress is not None:
            progress(target)
    directions = tuple(sum(column) / len(angles) for column in zip(*angles, strict=True))
    return Comparison(
        first=names[0],
        second=names[1],
        density=density,
        targets=tuple(targets),
        masks=_added(masks),
        largest=_added(largest),
        by_target=tuple(largest),
        directions=(directions[0], directions[1]),
    )


def _added(overlaps: Sequence[Overlap]) -> Overlap:
    total = overlaps[0]
    for overlap in overlaps[1:]:
        total = total + overlap
    return total
