"""`locate`: where the changes of experts lie, and where they meet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

from torch import Tensor

from sparselet.analysis.compare import Comparison, compare
from sparselet.analysis.concentration import Concentration, Null
from sparselet.analysis.locate import Heads, Location
from sparselet.analysis.locate import locate as locate_expert
from sparselet.api.opening import base_of, name_of, open_experts
from sparselet.api.progress import ProgressCallback, StepCounter
from sparselet.expert import Expert
from sparselet.formats import BaseModel
from sparselet.masks import layer_of, projection_of
from sparselet.merging.engine.plan import ExpertSource
from sparselet.model_config import optional_field
from sparselet.models import PACKAGED, local_path
from sparselet.report.analysis_page import Picture, Section, write_page
from sparselet.report.diagrams import curves, heat_map
from sparselet.report.summary import reading_order
from sparselet.result_table import ResultTable, ShownAsTables

# Endings of the names of projections whose rows, or whose columns, are those of attention heads.
_ROWS_OF_HEADS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "query", "key", "value", "c_attn")
_COLUMNS_OF_HEADS = ("o_proj", "out_proj", "attn.c_proj", "attention.dense")

# What the numbers of a page mean.
CONCENTRATION = (
    "The smallest share of the entries that carries half, nine tenths and almost all of the squared change, and how much "
    "of it the largest entries hold. Numbers drawn independently from a Gaussian or a Laplace distribution show what "
    "the last rows hold: a change is concentrated only as far as it goes beyond. Of a sparse expert the zeros outside its "
    "masks are imposed; what its masks alone show is not."
)
UNCHANGED = (
    "Entries whose change is exactly 0, below 1e-5, or below a thousandth of the weight; and the same of the change that "
    "is left when W and W + Δ are rounded to bfloat16, as in most published checkpoints."
)
LAYERS = "The stronger a cell, the larger the change of an entry there, by the root mean square over all entries of the target."
STRUCTURE = (
    "Stable rank Σσ²/σ₁² and effective rank (of the energies' entropy) beside those of independent entries of one "
    "variance; Gini coefficients of the energy of rows, columns and attention heads, beside the same entries in random "
    "order within the target. Above the number in parentheses is structure, at it there is none."
)
PAIRS = (
    "Jaccard index of the masks and of the largest entries beside that of random sets of the same sizes, p/(2 − p); the "
    "share of common entries that change in one direction (chance: 50 %); the cosine (chance: 0); and the mean squared "
    "cosine of the principal angles between the eight leading output directions of each target, beside that of random "
    "subspaces."
)


@dataclass(frozen=True)
class Located(ShownAsTables):
    """Where the change of each expert lies, and how those of each pair overlap."""

    locations: tuple[Location, ...]
    pairs: tuple[Comparison, ...]

    def tables(self) -> tuple[ResultTable, ...]:
        """Concentration beside its nulls; what has not changed; ranks and lines; pairs beside chance."""
        return (
            self._concentration(),
            self._unchanged(),
            *([self._structure()] if any(location.structures for location in self.locations) else []),
            *([self._pairs()] if self.pairs else []),
        )

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {"experts": [asdict(location) for location in self.locations], "pairs": [_pair_json(p) for p in self.pairs]}

    def write_page(self, file: str | Path) -> Path:
        """Write pictures and tables as one HTML page. Raises WriteFailed."""
        tables = iter(self.tables())
        sections = [
            Section("Concentration", CONCENTRATION, [self._lorenz()], next(tables)),
            Section("What has not changed", UNCHANGED, [], next(tables)),
            Section("Layers and projections", LAYERS, [_map_of(location) for location in self.locations]),
        ]
        if any(location.structures for location in self.locations):
            sections.append(Section("Ranks, rows, columns and heads", STRUCTURE, [], next(tables)))
        if self.pairs:
            sections.append(Section("Pairs", PAIRS, [self._matrix()] if len(self.pairs) > 1 else [], next(tables)))
        names = ", ".join(location.expert for location in self.locations)
        return write_page(file, "Where the change lies", f"The changes of {names}.", sections)

    def _lorenz(self) -> Picture:
        lorenz = {location.expert: location.selected.lorenz for location in self.locations}
        lorenz |= {"if Gaussian": self.locations[0].gaussian.lorenz, "if Laplace": self.locations[0].laplace.lorenz}
        lines = {name: [(100 * x, 100 * y) for x, y in points] for name, points in lorenz.items()}
        x, y = "% of the entries, the largest first", "% of ‖Δ‖²"
        return Picture(
            lambda width: curves(lines, width, x_label=x, y_label=y),
            "Lorenz curves of the selected entries, beside their nulls",
        )

    def _matrix(self) -> Picture:
        names = list(dict.fromkeys(name for pair in self.pairs for name in (pair.first, pair.second)))
        cells = {frozenset((pair.first, pair.second)): pair.largest for pair in self.pairs}
        overlaps = [[cells.get(frozenset((a, b))) if a != b else None for b in names] for a in names]
        values = [[None if o is None else o.jaccard for o in row] for row in overlaps]
        texts = [["" if o is None else f"{o.jaccard:.3f}\n({o.chance:.3f})" for o in row] for row in overlaps]
        label = "Jaccard index of the largest entries; in parentheses by chance"
        return Picture(lambda width: heat_map(names, names, values, width, texts=texts), label)

    def _concentration(self) -> ResultTable:
        rows: list[tuple[object, ...]] = []
        for location in self.locations:
            rows.append((location.expert, f"{location.whole.entries:,}", *_shares(location.whole)))
            if location.selected.entries < location.whole.entries:
                rows.append(("  its masks alone", f"{location.selected.entries:,}", *_shares(location.selected)))
        nulls = [("Gaussian", self.locations[0].gaussian), ("Laplace", self.locations[0].laplace)]
        rows += [(f"if entries were {name}", "", *_shares(null)) for name, null in nulls]
        energy = ("50 % of ‖Δ‖²", "90 %", "99 %", "in top 0.1 %", "top 1 %", "top 10 %")
        return ResultTable("Entries that carry the change, in %", ("", "entries", *energy, "Gini", "Hoyer"), tuple(rows))

    def _unchanged(self) -> ResultTable:
        rows = [
            (f"{location.expert}{suffix}", *(_percent(share) for share in vars(unchanged).values()))
            for location in self.locations
            for suffix, unchanged in (("", location.unchanged), (", in bfloat16", location.unchanged_bf16))
            if unchanged is not None
        ]
        return ResultTable("Entries that do not change, in %", ("", "exactly", "|Δ| ≤ 1e-5", "|Δ| ≤ 1e-3·|W|"), tuple(rows))

    def _structure(self) -> ResultTable:
        rows = []
        for location in self.locations:
            structures = location.structures
            lines = [structure.lines for structure in structures]
            beside = [
                ([s.stable_rank for s in structures], [s.random_stable_rank for s in structures]),
                ([s.effective_rank for s in structures], [s.random_effective_rank for s in structures]),
                ([line.rows for line in lines], [line.shuffled_rows for line in lines]),
                ([line.columns for line in lines], [line.shuffled_columns for line in lines]),
                ([line.heads for line in lines], [line.shuffled_heads for line in lines]),
            ]
            rows.append((location.expert, len(structures), *(_beside(*numbers) for numbers in beside)))
        columns = ("", "targets", "stable rank", "effective rank", "Gini of rows", "of columns", "of heads")
        return ResultTable("Structure, mean over targets (in parentheses: entries in random order)", columns, tuple(rows))

    def _pairs(self) -> ResultTable:
        rows = []
        for pair in self.pairs:
            sets = [f"{o.jaccard:.3f} ({o.chance:.3f})" for o in (pair.masks, pair.largest)]
            angles = "{:.3f} ({:.3f})".format(*pair.directions)
            row = (f"{pair.first}, {pair.second}", *sets, _percent(pair.largest.sign_agreement), f"{pair.masks.cosine:.3f}")
            rows.append((*row, angles))
        top = f"of the largest {_percent(self.pairs[0].density)} %"
        columns = ("", "Jaccard of masks", top, "same sign, %", "cosine", "cos² of directions")
        return ResultTable("Pairs (in parentheses: by chance)", columns, tuple(rows))


def locate(
    experts: ExpertSource | Sequence[ExpertSource],
    against: Sequence[ExpertSource] = (),
    *,
    base: str | None = None,
    density: float = 0.01,
    structure: bool = True,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Located:
    """Measure where the changes of experts lie, target by target, each number beside what chance would give.

        sl.locate("my-expert")
        sl.locate(["seed-1", "seed-2"]).pairs[0].largest.jaccard

    experts: of any kind, by path, hub name or object. against: pairs are each expert with each of these; without them, the
        experts with one another.
    base: the base model, which full checkpoints need, and shares relative to W and in bfloat16. By default the one that the
        experts record, if it is on this machine.
    density: of the largest entries that pairs are compared at. structure: also ranks, rows, columns and heads.
    seed: of the permutations. progress: reports targets.
    Raises ArgumentError (no targets, none in common), ShapeMismatch, DensityOutOfRange, and what opening experts raises.
    """
    sources = [experts] if isinstance(experts, str | Path | Mapping | Expert) else list(experts)
    opened = open_experts([*sources, *against], base)
    base = base or _local_base(opened)
    if base is not None:
        opened = open_experts([*sources, *against], base)
    model = None if base is None else BaseModel(local_path(base))
    named = list(zip(_names([*sources, *against]), opened, strict=True))
    own, others = named[: len(sources)], named[len(sources) :]
    couples = list(product(own, others) if others else combinations(own, 2))
    steps = sum(len(expert) for _, expert in own) + sum(len(set(a) & set(b)) for (_, a), (_, b) in couples)
    counter = StepCounter(steps, progress)
    locations = tuple(
        locate_expert(
            expert,
            name=name,
            base=None if model is None else _reader(model, expert, name),
            heads=None if model is None else heads_of(model, expert),
            structure=structure,
            seed=seed,
            progress=counter.step,
        )
        for name, expert in own
    )
    pairs = tuple(
        compare(a, b, names=(first, second), density=density, progress=counter.step) for (first, a), (second, b) in couples
    )
    return Located(locations, pairs)


def heads_of(model: BaseModel, targets: Expert) -> dict[str, Heads]:
    """For each target whose rows or columns are those of attention heads the axis, and the lines of a head.

    Of fused projections a head is `head_dim` successive lines, of the query, key or value.
    """
    size = optional_field(model.config, "head_dim") or model.config.hidden_size // model.config.num_attention_heads
    heads, names = {}, model.names.find(targets)
    for target in targets:
        axis = 0 if target.endswith(_ROWS_OF_HEADS) else 1 if target.endswith(_COLUMNS_OF_HEADS) else None
        if axis is None:
            continue
        axis = 1 - axis if model.names.layers[names[target]].transposed else axis
        if targets.shapes[target][axis] % size == 0:
            heads[target] = (axis, size)
    return heads


def _reader(model: BaseModel, expert: Expert, where: str) -> Callable[[str], Tensor]:
    """Reads the base weight of a target. Raises UnknownTarget, UnsupportedExpert, WrongBase."""
    names = model.targets(expert, where)
    model.check_shapes({names[target]: shape for target, shape in expert.shapes.items()}, where)
    return lambda target: model.read(names[target])


def _local_base(experts: Sequence[Expert]) -> str | None:
    """The base model that the experts record, if its files are on this machine."""
    name = base_of(experts)
    return name if name is not None and (name == PACKAGED or Path(name).is_dir()) else None


def _map_of(location: Location) -> Picture:
    """Root mean square of Δ by projection and layer; a target without a number is left out."""
    cells = {
        (projection_of(part.name), layer_of(part.name)): part for part in location.cells if layer_of(part.name) != part.name
    }
    projections, layers = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    projections.sort(key=reading_order)
    values = [
        [(part.concentration.energy / part.entries) ** 0.5 if (part := cells.get((p, layer))) else None for layer in layers]
        for p in projections
    ]
    rows, columns = [p.rpartition(".")[2] for p in projections], [layer.rpartition(".")[2] for layer in layers]
    label = f"{location.expert}: root mean square of the change by layer and projection; darkest: {_largest(values):.2e}"
    return Picture(lambda width: heat_map(rows, columns, values, width, x_label="layer"), label)


def _largest(values: Sequence[Sequence[float | None]]) -> float:
    return max((value for row in values for value in row if value is not None), default=0.0)


def _names(sources: Sequence[ExpertSource]) -> list[str]:
    """A name for each, of paths as few last parts as tell them apart."""
    names = [name_of(source) for source in sources]
    for count in range(1, max((len(Path(name).parts) for name in names), default=0)):
        short = ["/".join(Path(name).parts[-count:]) or name for name in names]
        if len(set(short)) == len(short):
            return short
    return names


def _shares(numbers: Concentration | Null) -> tuple[str, ...]:
    shares = map(_percent, (*numbers.carrying.values(), *numbers.top.values()))
    return (*shares, f"{numbers.gini:.3f}", f"{numbers.hoyer:.3f}")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g}"


def _beside(measured: Sequence[float | None], null: Sequence[float | None]) -> str:
    """The means of a statistic and of its null over the targets that have it."""
    means = []
    for numbers in (measured, null):
        present = [number for number in numbers if number is not None]
        means.append(sum(present) / len(present) if present else None)
    return "–" if None in means else "{:.3g} ({:.3g})".format(*means)


def _pair_json(pair: Comparison) -> dict[str, Any]:
    sets = {
        name: {**asdict(o), "jaccard": o.jaccard, "chance": o.chance, "sign_agreement": o.sign_agreement, "cosine": o.cosine}
        for name, o in (("masks", pair.masks), ("largest", pair.largest))
    }
    measured, chance = pair.directions
    shared = {"first": pair.first, "second": pair.second, "density": pair.density, "targets": len(pair.targets)}
    return {**shared, **sets, "directions": measured, "directions_chance": chance}
