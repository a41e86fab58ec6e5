"""Merge target by target: `merge` in memory, `merge_to` into a directory."""

import contextlib
import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparselet.adapter import SparseAdapter, require_finite
from sparselet.adapter_stream import adapter_stream
from sparselet.delta import SparseDelta
from sparselet.errors import prefix_errors
from sparselet.io.atomic import atomic_directory
from sparselet.io.paths import check_output
from sparselet.merging.engine.parallel import map_in_order
from sparselet.merging.engine.plan import ExpertSource, MergePlan, Weight
from sparselet.merging.layer_scaling import LayerScaling
from sparselet.merging.record import Digests, metadata_from_plan

NamedDelta = tuple[str, SparseDelta]


def merge(
    experts: Sequence[ExpertSource],
    method: str = "overlap",
    weights: Sequence[Weight] | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    layer_scaling: LayerScaling | None = None,
    base: str | Path | None = None,
    workers: int | None = None,
) -> SparseAdapter:
    """Merge experts of one base model into one adapter.

    experts: `Expert`s, other mappings of deltas, or paths or hub names of experts: sparse adapters, PEFT adapters (LoRA, SHiRA,
        Super-Tuning), full checkpoints. Their masks, densities, block sizes and targets may differ; an expert without a target
        changes nothing there.
    method: a name in `sparselet.METHODS`. parameters: that method's own, by name.
    weights: one per expert, 1 by default: a number, or `{pattern of target names: number}`, of which the longest matching
        pattern applies (`{"*": 0.5, "*.v_proj": 1}`).
    layer_scaling: (α, β) of `merging.layer_scaling.layer_factors`, applied to the merged change.
    base: the base model, a directory or hub name; needed for full checkpoints.
    workers: threads; they do not change the result.

    Raises, before the first target is merged, ArgumentError (no expert, a wrong number of weights, a parameter out of range),
    UnknownMethod, ShapeMismatch, WrongBase, NonFiniteValue, and what opening an expert raises; later, with the target's name,
    NonFiniteValue for a merged value beyond float32 and what the method raises.
    """
    plan = MergePlan(experts, method, weights, parameters, base, layer_scaling)
    digests = Digests(len(plan.experts))
    with contextlib.closing(_merged(plan, digests, workers)) as targets:
        deltas = dict(targets)
    return SparseAdapter(deltas, metadata_from_plan(plan, digests), plan.fingerprints)


def merge_to(
    output: str | Path,
    experts: Sequence[ExpertSource],
    method: str = "overlap",
    weights: Sequence[Weight] | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    layer_scaling: LayerScaling | None = None,
    base: str | Path | None = None,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """`merge`, streamed into the directory `output` with few targets in memory at a time.

    progress: called with each target's name after it is written.
    Raises what `merge` raises, OutputExists and WriteFailed; no partial output is left.
    """
    check_output(output)
    plan = MergePlan(experts, method, weights, parameters, base, layer_scaling)
    digests = Digests(len(plan.experts))
    with contextlib.closing(_merged(plan, digests, workers)) as targets, atomic_directory(output) as directory:
        with adapter_stream(directory, plan.shapes) as stream:
            for name, delta in targets:
                stream.add(name, delta)
                if progress is not None:
                    progress(name)
        stream.describe(metadata_from_plan(plan, digests), plan.fingerprints)
    return Path(output)


def _merged(plan: MergePlan, digests: Digests, workers: int | None) -> Generator[NamedDelta]:
    """The merged targets in the order of their names, after all experts were checked."""
    plan.check_values()
    plan.survey()

    def work(name: str) -> NamedDelta:
        deltas = plan.deltas(name)
        digests.add(name, deltas)
        with prefix_errors(name):
            merged = plan.merge_in_bands(name, deltas, workers) if plan.is_large(name) else plan.merge(name, deltas)
        merged = plan.scaled(name, merged)
        require_finite(merged.values, name)
        return name, merged

    return _map_targets(work, plan, workers)


def _map_targets(work: Callable[[str], NamedDelta], plan: MergePlan, workers: int | None) -> Generator[NamedDelta]:
    """`work` on each target: several small ones at a time, a large one alone."""
    for large, names in itertools.groupby(plan.shapes, plan.is_large):
        group = list(names)
        yield from map(work, group) if large else map_in_order(work, group, plan.bytes_of, workers)
