"""`MergePlan`: a checked merge. All input is checked before the first target is merged."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sparselet.adapter import as_expert, expert_profile, missing_profile
from sparselet.delta import SparseDelta, check_dense_shape
from sparselet.errors import ArgumentError, NonFiniteValue, ShapeMismatch
from sparselet.expert import Expert, ExpertOrDeltas
from sparselet.fingerprint import require_same_base
from sparselet.formats import BaseModel, open_expert
from sparselet.io.memory import require_memory
from sparselet.merging.algebra.bands import join_bands, split_into_bands
from sparselet.merging.algebra.entries import common_blocks, is_very_sparse
from sparselet.merging.algebra.ranges import require_finite_number
from sparselet.merging.engine.parallel import MAX_MEMORY, map_in_order
from sparselet.merging.layer_scaling import LayerScaling, check_layer_scaling, layer_factors
from sparselet.merging.method import MOMENTS, STATS, GlobalStats
from sparselet.merging.methods import get_method
from sparselet.profiles.profile import Profile

ExpertSource = ExpertOrDeltas | str | Path
Weight = float | Mapping[str, float]


class MergePlan:
    """Experts of one base model, and the method, weights, parameters and scaling of layers to merge them with.

    Raises ArgumentError (no expert; a wrong number of weights, a weight that is not finite, a pattern that matches no target;
    a parameter out of range), UnknownMethod, ShapeMismatch, WrongBase, MissingProfile (the method needs profiles), and what
    opening an expert or its profile raises. `check_values` and `survey` read the experts.
    """

    def __init__(
        self,
        experts: Sequence[ExpertSource],
        method: str,
        weights: Sequence[Weight] | None,
        parameters: Mapping[str, Any] | None,
        base: str | Path | None = None,
        layer_scaling: LayerScaling | None = None,
    ) -> None:
        if isinstance(experts, (str, Path)) or not experts:
            raise ArgumentError(f"experts must be a list of at least one expert, got {experts!r}.")
        self.method = get_method(method)
        self.parameters = self.method.complete_parameters(parameters or {})
        self.weights = check_weights(weights, len(experts))
        self.layer_scaling = check_layer_scaling(layer_scaling)
        model = None if base is None else BaseModel(base)
        self.experts = [open_expert(e, model) if isinstance(e, (str, Path)) else as_expert(e) for e in experts]
        for i, expert in enumerate(self.experts):
            if expert.trained_modules:
                raise ArgumentError(
                    f"{expert_label(expert, i)} trained modules in full (modules_to_save), which cannot be merged."
                )
        self.shapes = _common_shapes(self.experts)
        check_patterns(self.weights, self.shapes)
        self._factors = layer_factors(self.shapes, self.layer_scaling or (1.0, 0.0))
        self.fingerprints = _common_fingerprints(self.experts)
        self._profiles = _require_profiles(self.method.name, self.experts) if self.method.needs_profiles else None
        self._stats: dict[str, Any] = {}
        self._total_density = sum(expert.nnz / max(1, _size(expert)) for expert in self.experts)

    def check_values(self) -> None:
        """Read every expert once for NaN and infinity. Raises NonFiniteValue."""
        for i, expert in enumerate(self.experts):
            try:
                expert.check_values()
            except NonFiniteValue as error:
                raise error if expert.path else NonFiniteValue(f"{expert_label(expert, i)}: {error}") from error

    def survey(self) -> None:
        """Read every target, if the method needs statistics over all of them."""
        if self.method.global_stats and self.parameters.get("trim") != "target":
            self._stats = {STATS: self.over_all_targets(self.method.global_stats)}

    def over_all_targets(self, stats: GlobalStats) -> Any:
        """Statistics over all targets."""
        return stats(lambda: ((self.deltas(name), self.weights_of(name)) for name in self.shapes), self.parameters)

    def deltas(self, name: str) -> list[SparseDelta]:
        """One target's deltas, one per expert; empty for an expert without that target."""
        return [e[name] if name in e else SparseDelta.empty(self.shapes[name]) for e in self.experts]

    def weights_of(self, name: str) -> list[float]:
        """The experts' weights for one target."""
        return [weight_for(weight, name) for weight in self.weights]

    def scaled(self, name: str, merged: SparseDelta) -> SparseDelta:
        """One target's merged delta times the factor of its layer."""
        return merged if self.layer_scaling is None else merged.scale(self._factors[name])

    def merge(self, name: str, deltas: Sequence[SparseDelta]) -> SparseDelta:
        """Merge one target's deltas, without the factor of the layer. Raises AbsurdShape, NotEnoughMemory."""
        if self.method.dense:
            check_dense_shape(self.shapes[name], name)
            require_memory(self.bytes_of(name), f"merging {name} by {self.method.name}")
        moments = {} if self._profiles is None else {MOMENTS: [p and p.moment(name) for p in self._profiles]}
        return self.method.function(deltas, self.weights_of(name), **self.parameters, **self._stats, **moments)

    def merge_in_bands(self, name: str, deltas: Sequence[SparseDelta], workers: int | None) -> SparseDelta:
        """`merge` by several threads, if the method is elementwise; the result is the same."""
        if not self.method.elementwise:
            return self.merge(name, deltas)
        deltas, weights = common_blocks(deltas), self.weights_of(name)
        if is_very_sparse(deltas):
            return self.merge(name, deltas)
        stats = self._stats
        if self.method.global_stats and not stats:
            stats = {STATS: self.method.global_stats(lambda: [(deltas, weights)], self.parameters)}

        def work(band: Sequence[SparseDelta]) -> SparseDelta:
            return self.method.function(band, weights, **self.parameters, **stats)

        return join_bands(list(map_in_order(work, split_into_bands(deltas), lambda band: self._bytes(band[0].size), workers)))

    def is_large(self, name: str) -> bool:
        """Whether two targets of this size take too much memory to be merged at the same time."""
        return 2 * self.bytes_of(name) > MAX_MEMORY

    def bytes_of(self, name: str) -> int:
        """The estimated memory for merging a target: its deltas twice, and half a dozen sums of its size.

        Of a dense method also as many in float64, and four square matrices of its columns.
        """
        rows, columns = self.shapes[name]
        return self._bytes(rows * columns) + (self.method.dense and 48 * rows * columns + 32 * columns**2)

    def _bytes(self, entries: int) -> int:
        return int(entries * (28 + 16 * self._total_density))


def weight_for(weight: Weight, name: str) -> float:
    """The weight for the target `name`: a number applies to all; of patterns (`*.v_proj`) the longest match, else 1."""
    if not isinstance(weight, Mapping):
        return float(weight)
    matching = [pattern for pattern in weight if fnmatchcase(name, pattern)]
    return float(weight[max(matching, key=lambda pattern: (len(pattern), pattern))]) if matching else 1.0


def check_weights(weights: Sequence[Weight] | None, count: int) -> list[Weight]:
    """One weight per expert, 1 by default. Raises ArgumentError."""
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ArgumentError(f"{count} experts need as many weights, got {len(weights)}.")
    checked: list[Weight] = []
    for i, weight in enumerate(weights, 1):
        if isinstance(weight, Mapping):
            for pattern, factor in weight.items():
                require_finite_number(f"weight {i} for {pattern}", factor)
            checked.append({pattern: float(factor) for pattern, factor in weight.items()})
        else:
            require_finite_number(f"weight {i}", weight)
            checked.append(float(weight))
    return checked


def check_patterns(weights: Sequence[Weight], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise ArgumentError for a pattern that matches no target."""
    for i, weight in enumerate(weights, 1):
        for pattern in weight if isinstance(weight, Mapping) and shapes else ():
            if not any(fnmatchcase(name, pattern) for name in shapes):
                raise ArgumentError(f"weight {i}: no target matches {pattern!r}; the first target is {next(iter(shapes))}.")


def expert_label(expert: Expert, position: int) -> str:
    """An expert's path, or its position in the list."""
    return str(expert.path) if expert.path is not None else f"expert {position + 1}"


def _common_shapes(experts: Sequence[Expert]) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for i, expert in enumerate(experts):
        for name, shape in expert.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                raise ShapeMismatch(
                    f"{name}: {expert_label(expert, i)} has shape {list(shape)}, a previous expert {list(shapes[name])}."
                )
    _refuse_prefixed_names(experts)
    return dict(sorted(shapes.items()))


def _refuse_prefixed_names(experts: Sequence[Expert]) -> None:
    """Raise ArgumentError if a target seems to have different names in two experts, one made with and one without the model's
    head. (Names that a given base model does not have were refused before.)"""
    names = [set(expert.shapes) for expert in experts]
    for i, own in enumerate(names):
        for name in sorted(set().union(*names) - own):
            shorter = name
            while shorter := shorter.partition(".")[2]:
                if shorter in own and not any({name, shorter} <= targets for targets in names):
                    raise ArgumentError(
                        f"{expert_label(experts[i], i)} changes {shorter}, another expert {name}. If both are the "
                        "same weight, of a model without and with its head, set `base` to the base model, which has its name."
                    )


def _common_fingerprints(experts: Sequence[Expert]) -> dict[str, Mapping[str, str] | None]:
    """The base fingerprint of each target; of those that differ in dtype, the one of the widest float.

    Raises WrongBase if two fingerprints disagree.
    """
    fingerprints: dict[str, Mapping[str, str] | None] = {}
    for i, expert in enumerate(experts):
        own = {name: fp for name, fp in expert.fingerprints.items() if fp}
        require_same_base(own, fingerprints, f"{expert_label(expert, i)} and the experts before it")
        for name, fp in own.items():  # dtypes in descending order of text: float64, float32, float16, bfloat16
            fingerprints[name] = max(fp, fingerprints.get(name) or fp, key=lambda fingerprint: fingerprint["dtype"])
    return fingerprints


def _require_profiles(method: str, experts: Sequence[Expert]) -> list[Profile | None]:
    """The experts' profiles, None of one that changes nothing.

    Raises MissingProfile, WrongBase for profiles of several base models, and what reading one raises.
    """
    profiles: list[Profile | None] = []
    for i, expert in enumerate(experts):
        profile, label = expert_profile(expert), expert_label(expert, i)
        if profile is not None:
            for previous in filter(None, profiles):
                where = f"the profiles of {label} and an expert before it"
                require_same_base(profile.fingerprints, previous.fingerprints, where)
        elif len(expert):
            need = f"{method} needs a profile of each expert"
            raise missing_profile(label, need, label if expert.path else "EXPERT")
        profiles.append(profile)
    return profiles


def _size(expert: Expert) -> int:
    return sum(rows * columns for rows, columns in expert.shapes.values())
