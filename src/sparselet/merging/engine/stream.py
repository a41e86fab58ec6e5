"""Merging target by target: `merge` in memory, `merge_to` from files to a file."""

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
from sparselet.merging.engine.parallel import in_order
from sparselet.merging.engine.plan import ExpertSource, Plan, Weight
from sparselet.merging.record import Digests, merged_metadata

Target = tuple[str, SparseDelta]


def merge(
    experts: Sequence[ExpertSource],
    method: str = "overlap",
    weights: Sequence[Weight] | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    base: str | Path | None = None,
    workers: int | None = None,
) -> SparseAdapter:
    """Merge experts of one base model into one adapter.

    experts: `SparseAdapter`s, other mappings of deltas, or names of experts on the disk or the hub: sparse adapters, PEFT
        adapters (LoRA, SHiRA, Super-Tuning), full checkpoints. Their masks, densities, block sizes and targets may differ;
        where an expert has no such target its change there is 0.
    method: a name in `sparselet.METHODS`. parameters: what that method takes beside deltas and weights.
    weights: one an expert, 1 each by default: a number, or `{pattern of target names: number}`, of which the longest that
        matches counts (`{"*": 0.5, "*.v_proj": 1}`).
    base: the base model, a directory or hub name, against which full checkpoints are taken.
    workers: threads; the result does not depend on it.

    Raises, before any target is merged, ArgumentError (no expert, weights of the wrong count, a parameter out of range),
    UnknownMethod, ShapeMismatch, WrongBase, NonFiniteValue, and what opening an expert raises; and, with the target's name,
    NonFiniteValue for a merged value beyond float32 and what the method raises.
    """
    plan = Plan(experts, method, weights, parameters, base)
    digests = Digests(len(plan.experts))
    with contextlib.closing(_merged(plan, digests, workers)) as targets:
        deltas = dict(targets)
    return SparseAdapter(deltas, merged_metadata(plan, digests), plan.fingerprints)


def merge_to(
    output: str | Path,
    experts: Sequence[ExpertSource],
    method: str = "overlap",
    weights: Sequence[Weight] | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    base: str | Path | None = None,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Merge as `merge` does, straight into the directory `output`: few targets are in memory at a time.

    progress: called with each target's name when it is written.
    Raises what `merge` raises, OutputExists and WriteFailed; nothing half-written is left.
    """
    check_output(output)
    plan = Plan(experts, method, weights, parameters, base)
    digests = Digests(len(plan.experts))
    with contextlib.closing(_merged(plan, digests, workers)) as targets, atomic_directory(output) as directory:
        with adapter_stream(directory, plan.shapes) as stream:
            for name, delta in targets:
                stream.add(name, delta)
                if progress is not None:
                    progress(name)
        stream.describe(merged_metadata(plan, digests), plan.fingerprints)
    return Path(output)


def _merged(plan: Plan, digests: Digests, workers: int | None) -> Generator[Target]:
    """The merged targets, in the order of their names, once all experts were read for what cannot be merged."""
    plan.check_values()
    plan.survey()

    def work(name: str) -> Target:
        deltas = plan.deltas(name)
        digests.add(name, deltas)
        with prefix_errors(name):
            merged = plan.merge_in_bands(name, deltas, workers) if plan.is_large(name) else plan.merge(name, deltas)
        require_finite(merged.values, name)
        return name, merged

    return _in_turn(work, plan, workers)


def _in_turn(work: Callable[[str], Target], plan: Plan, workers: int | None) -> Generator[Target]:
    """`work` on each target: on small ones several at a time, on a large one by itself."""
    for large, names in itertools.groupby(plan.shapes, plan.is_large):
        group = list(names)
        yield from map(work, group) if large else in_order(work, group, plan.bytes_of, workers)
