"""Where an expert's change lies: its concentration, whole and by layer and projection, target by target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselet.analysis.concentration import Concentration, Null, concentration, gaussian_null, laplace_null
from sparselet.analysis.histogram import Histogram
from sparselet.analysis.pairs import Overlap, overlap_of, subspace_overlap
from sparselet.analysis.spectrum import lines, spectrum
from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError
from sparselet.masks import layer_of, natural_order, projection_of

SMALL = 1e-5  # |Δ| that counts as no change (Mukherjee et al. 2025)
SMALL_RELATIVE = 1e-3  # |Δ| / |W|


@dataclass(frozen=True)
class Part:
    """A layer, a projection or a target: its entries, its fraction of the whole energy, and its own concentration."""

    name: str
    entries: int
    energy_share: float
    concentration: Concentration


@dataclass(frozen=True)
class Ranks:
    """Of one target: its ranks, the smaller side they cannot exceed, and the Gini coefficients of its rows and columns beside
    those of its entries in random order."""

    name: str
    full_rank: int
    stable_rank: float
    effective_rank: float
    rows: float
    columns: float
    shuffled_rows: float
    shuffled_columns: float


@dataclass(frozen=True)
class Unchanged:
    """Fractions of all entries. zero: ΔW = 0. small: |ΔW| ≤ 10⁻⁵. Against the base weights, None without them: small_relative:
    |ΔW| ≤ 10⁻³|W|; bf16: W and W + ΔW are one number in bfloat16."""

    zero: float
    small: float
    small_relative: float | None = None
    bf16: float | None = None


@dataclass(frozen=True)
class Location:
    """Where the change of one expert lies.

    whole: of all entries of its targets. selected: of those in its masks, which say more where the mask was imposed.
    """

    expert: str
    targets: int
    whole: Concentration
    selected: Concentration
    gaussian: Null
    laplace: Null
    unchanged: Unchanged
    layers: tuple[Part, ...]
    projections: tuple[Part, ...]
    cells: tuple[Part, ...]
    ranks: tuple[Ranks, ...]


def locate(
    expert: Mapping[str, SparseDelta],
    *,
    name: str = "",
    base: Callable[[str], Tensor] | None = None,
    ranks: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Location:
    """Statistics of an expert's change, read target by target.

    expert: any kind, as `load` opens it. base: reads the base weight [rows, columns] of a target. ranks: also the spectra,
    which take most of the time. seed: of the shuffles. progress: is called with each target's name when it is done.
    Raises ArgumentError for an expert without targets, and what reading it raises.
    """
    if not len(expert):
        raise ArgumentError(f"{name or 'the expert'} has no targets to look at.")
    whole, selected = Histogram.empty(), Histogram.empty()
    by_layer: dict[str, Histogram] = {}
    by_projection: dict[str, Histogram] = {}
    cells, spectra = [], []
    counts = {"small": 0, "relative": 0, "bf16": 0}
    for target in sorted(expert, key=natural_order):
        delta = expert[target]
        inside = Histogram.of(delta.values)
        histogram = Histogram.of(delta.values, delta.size - delta.nnz)
        layer, projection = layer_of(target), projection_of(target)
        by_layer[layer] = by_layer.get(layer, Histogram.empty()) + histogram
        by_projection[projection] = by_projection.get(projection, Histogram.empty()) + histogram
        whole, selected = whole + histogram, selected + inside
        cells.append((target, concentration(histogram)))
        change = delta.to_dense(torch.float32) if ranks or base is not None else None
        counts["small"] += delta.size - int((delta.values.abs() > SMALL).sum())
        if base is not None and change is not None:
            weight = base(target).float()
            counts["relative"] += int((change.abs() <= SMALL_RELATIVE * weight.abs()).sum())
            counts["bf16"] += int(((weight + change).bfloat16() == weight.bfloat16()).sum())
        if ranks and change is not None:
            spectra.append(_ranks_of(target, change, seed))
        if progress is not None:
            progress(target)
    total = max(whole.energy, torch.finfo(torch.float64).tiny)
    return Location(
        expert=name,
        targets=len(expert),
        whole=concentration(whole),
        selected=concentration(selected),
        gaussian=gaussian_null(),
        laplace=laplace_null(),
        unchanged=Unchanged(
            zero=float(whole.counts[0] / whole.count),
            small=counts["small"] / whole.count,
            small_relative=None if base is None else counts["relative"] / whole.count,
            bf16=None if base is None else counts["bf16"] / whole.count,
        ),
        layers=_parts(by_layer, total),
        projections=_parts(by_projection, total),
        cells=tuple(Part(target, c.entries, c.energy / total, c) for target, c in cells),
        ranks=tuple(spectra),
    )


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


def compare(
    first: Mapping[str, SparseDelta],
    second: Mapping[str, SparseDelta],
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


def _parts(histograms: Mapping[str, Histogram], total: float) -> tuple[Part, ...]:
    return tuple(Part(n, h.count, h.energy / total, concentration(h)) for n, h in histograms.items())


def _ranks_of(target: str, change: Tensor, seed: int) -> Ranks:
    ranks, concentrated = spectrum(change), lines(change, torch.Generator().manual_seed(seed))
    return Ranks(target, min(change.shape), ranks.stable_rank, ranks.effective_rank, *vars(concentrated).values())


def _added(overlaps: Sequence[Overlap]) -> Overlap:
    total = overlaps[0]
    for overlap in overlaps[1:]:
        total = total + overlap
    return total
