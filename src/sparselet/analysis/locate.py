"""Where an expert's change lies: its concentration, whole and by layer and projection, target by target."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparselet.analysis.concentration import Concentration, Null, concentration, gaussian_null, laplace_null
from sparselet.analysis.histogram import Histogram
from sparselet.analysis.lines import Lines, lines
from sparselet.analysis.spectrum import BAND_ENTRIES, random_ranks, spectrum
from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError
from sparselet.expert import ExpertOrDeltas
from sparselet.kernels import ENTRY
from sparselet.kernels.threads import one_thread
from sparselet.masks import layer_of, natural_order, projection_of

SMALL = 1e-5  # |Δ| that counts as no change (Mukherjee et al. 2025)
SMALL_RELATIVE = 1e-3  # |Δ| / |W|

Heads = tuple[int, int]  # the axis that a target's attention heads lie on, and how many lines of it each has


@dataclass(frozen=True)
class Part:
    """A layer, a projection or a target: its entries, its fraction of the whole energy, and its own concentration."""

    name: str
    entries: int
    energy_share: float
    concentration: Concentration


@dataclass(frozen=True)
class Structure:
    """Of one target: its ranks beside those of independent entries, which the smaller side bounds, and how its energy lies over
    rows, columns and heads."""

    name: str
    full_rank: int
    stable_rank: float
    effective_rank: float
    random_stable_rank: float
    random_effective_rank: float
    lines: Lines


@dataclass(frozen=True)
class Unchanged:
    """Fractions of all entries. zero: no change. small: |Δ| ≤ 10⁻⁵. small_relative: |Δ| ≤ 10⁻³|W|, None without base."""

    zero: float
    small: float
    small_relative: float | None = None


@dataclass(frozen=True)
class Location:
    """Where the change of one expert lies.

    whole: of all entries of its targets. selected: of those in its masks, which say more where the mask was imposed.
    unchanged: of ΔW. unchanged_bf16: of bf16(W + ΔW) − bf16(W), the change that a checkpoint in bfloat16 holds; None without
    base weights. cells: by target. structures: by target, without vectors such as norms.
    """

    expert: str
    targets: int
    whole: Concentration
    selected: Concentration
    gaussian: Null
    laplace: Null
    unchanged: Unchanged
    unchanged_bf16: Unchanged | None
    layers: tuple[Part, ...]
    projections: tuple[Part, ...]
    cells: tuple[Part, ...]
    structures: tuple[Structure, ...]


@one_thread()
def locate(
    expert: ExpertOrDeltas,
    *,
    name: str = "",
    base: Callable[[str], Tensor] | None = None,
    heads: Mapping[str, Heads] | None = None,
    structure: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Location:
    """Statistics of an expert's change, read target by target.

    expert: any kind, as `load` opens it. base: reads the base weight [rows, columns] of a target. heads: of the targets that
    have some. structure: also ranks, rows, columns and heads, which take most of the time. seed: of the permutations.
    progress: is called with each target's name when it is done.
    Raises ArgumentError for an expert without targets, and what reading it raises.
    """
    if not len(expert):
        raise ArgumentError(f"{name or 'the expert'} has no targets to look at.")
    sums, outside = _Sums(), 0
    structures = []
    for target in sorted(expert, key=natural_order):
        change, selected = _read(expert, target, sums)
        outside += change.numel() - selected
        if base is not None:
            sums.compare(change, base(target))
        if structure and min(change.shape) > 1:
            structures.append(_structure(target, change, (heads or {}).get(target), seed))
        if progress is not None:
            progress(target)
    whole = sums.whole()
    total = max(whole.energy, torch.finfo(torch.float64).tiny)
    return Location(
        expert=name,
        targets=len(expert),
        whole=concentration(whole),
        selected=concentration(whole.without_zeros(outside)),
        gaussian=gaussian_null(),
        laplace=laplace_null(),
        unchanged=sums.unchanged("float32"),
        unchanged_bf16=None if base is None else sums.unchanged("bfloat16"),
        layers=_parts(sums.by_layer, total),
        projections=_parts(sums.by_projection, total),
        cells=tuple(Part(target, c.entries, c.energy / total, c) for target, c in sums.cells),
        structures=tuple(structures),
    )


@dataclass
class _Sums:
    """What is added up over the targets. counts: unchanged entries by dtype and bound."""

    by_layer: dict[str, Histogram] = field(default_factory=dict)
    by_projection: dict[str, Histogram] = field(default_factory=dict)
    cells: list[tuple[str, Concentration]] = field(default_factory=list)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, target: str, delta: SparseDelta) -> None:
        histogram = Histogram.of(delta.values, delta.size - delta.nnz)
        for parts, part in ((self.by_layer, layer_of(target)), (self.by_projection, projection_of(target))):
            parts[part] = parts[part] + histogram if part in parts else histogram
        self.cells.append((target, concentration(histogram)))
        self._count("float32", "zero", int(histogram.counts[0]))
        larger = sum(int((band.abs() > SMALL).sum()) for band in delta.values.reshape(-1).split(BAND_ENTRIES))
        self._count("float32", "small", delta.size - larger)

    def compare(self, change: Tensor, weight: Tensor) -> None:
        """Count against the base weight, some rows at a time."""
        rows = max(1, BAND_ENTRIES // change.shape[1])
        for difference, own in zip(change.split(rows), weight.split(rows), strict=True):
            before = own.float()
            bound = SMALL_RELATIVE * before.abs()
            self._count("float32", "relative", int((difference.abs() <= bound).sum()))
            rounded = ((before + difference).bfloat16().float() - before.bfloat16().float()).abs()
            self._count("bfloat16", "zero", int((rounded == 0).sum()))
            self._count("bfloat16", "small", int((rounded <= SMALL).sum()))
            self._count("bfloat16", "relative", int((rounded <= bound).sum()))

    def whole(self) -> Histogram:
        return sum(self.by_layer.values(), Histogram.empty())

    def unchanged(self, dtype: str) -> Unchanged:
        entries = sum(concentrated.entries for _, concentrated in self.cells)
        shares = {bound: count / entries for (own, bound), count in self.counts.items() if own == dtype}
        return Unchanged(shares["zero"], shares["small"], shares.get("relative"))

    def _count(self, dtype: str, bound: str, count: int) -> None:
        self.counts[dtype, bound] = self.counts.get((dtype, bound), 0) + count


def _read(expert: ExpertOrDeltas, target: str, sums: _Sums) -> tuple[Tensor, int]:
    """A target's change, dense, once it is added up, and its selected entries. Its indices are no longer in memory then."""
    delta = expert[target]
    sums.add(target, delta)
    if delta.nnz == delta.size and delta.block == ENTRY:
        return delta.values.view(delta.shape), delta.nnz
    return delta.to_dense(torch.float32), delta.nnz


def _structure(target: str, change: Tensor, heads: Heads | None, seed: int) -> Structure:
    ranks, by_chance = spectrum(change), random_ranks(*change.shape)
    concentrated = lines(change, torch.Generator().manual_seed(seed), heads)
    return Structure(target, min(change.shape), ranks.stable_rank, ranks.effective_rank, *by_chance, concentrated)


def _parts(histograms: Mapping[str, Histogram], total: float) -> tuple[Part, ...]:
    return tuple(Part(n, h.count, h.energy / total, concentration(h)) for n, h in histograms.items())
