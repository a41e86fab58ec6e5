"""Cores of experts, and which experts' cores lie in the same places."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from sparselet.adapter import SparseAdapter
from sparselet.analysis.pairs import Overlap, overlap_of
from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError
from sparselet.expert import Expert
from sparselet.masks import check_density
from sparselet.merging.algebra.cores import CORES, core_of
from sparselet.merging.algebra.ranges import require_choice, require_seed
from sparselet.merging.algebra.trim import require_trim
from sparselet.merging.methods.ties import ties_bounds


def core(
    expert: Expert,
    density: float = 0.01,
    *,
    density_of: str = "size",
    trim: str = "global",
    core: str = "largest",
    seed: int = 0,
) -> SparseAdapter:
    """The core of an expert as an adapter, whose mask `freeze` and whose values `cpi` keeps: the entries it changes most.

        sl.core(sl.load("expert-a")).save("core-a")

    expert: of any kind; one target is in memory at a time. The other arguments are those of the merge method `cpi`, which takes
    the same core of the same expert. Raises DensityOutOfRange, ArgumentError.
    """
    check_density(density)
    require_trim(density_of, trim)
    require_choice("core", core, CORES)
    require_seed("seed", seed)
    parameters = {"density": density, "density_of": density_of}

    def targets(names: Iterable[str]) -> Iterable[tuple[Sequence[SparseDelta], Sequence[float]]]:
        return (([expert[name]], [1.0]) for name in names)

    deltas = {}
    whole = ties_bounds(lambda: targets(expert), parameters)[0] if trim == "global" and len(expert) else None
    for name in expert:
        bounds = whole or ties_bounds(lambda name=name: targets([name]), parameters)[0]
        deltas[name] = core_of(expert[name], bounds, core, seed)
    return SparseAdapter(deltas, expert.metadata, expert.fingerprints)


def group(cores: Sequence[Expert], threshold: float = 0.1) -> tuple[list[list[int]], dict[tuple[int, int], Overlap]]:
    """Experts whose cores have a Jaccard index of at least `threshold` belong together, and so do those linked by others.

    Returns the connected components, each ascending, by their first expert; and the overlap of each pair over all targets,
    which also says what chance alone would give. Raises ArgumentError, ShapeMismatch.
    """
    if not 0 < threshold <= 1:
        raise ArgumentError(f"threshold must be in (0, 1], got {threshold!r}.")
    pairs = {(a, b): _overlap(cores[a], cores[b]) for a, b in combinations(range(len(cores)), 2)}
    return components(len(cores), (pair for pair, overlap in pairs.items() if overlap.jaccard >= threshold)), pairs


def components(count: int, edges: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The connected components of a graph of `count` nodes, each ascending, in the order of their first nodes."""
    label = list(range(count))
    for a, b in edges:
        low, high = sorted((label[a], label[b]))
        label = [low if each == high else each for each in label]
    return [[node for node in range(count) if label[node] == first] for first in sorted(set(label))]


def _overlap(first: Expert, second: Expert) -> Overlap:
    shapes: Mapping[str, tuple[int, int]] = {**first.shapes, **second.shapes}
    total = Overlap(0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0)
    for name, shape in shapes.items():
        a, b = (each[name] if name in each else SparseDelta.empty(shape) for each in (first, second))
        total += overlap_of(a, b)
    return total
