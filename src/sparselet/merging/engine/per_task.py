"""What a merge leaves of each single expert, as adapters: masks of one merged delta that bring the expert back."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparselet.adapter import AdapterFile
from sparselet.adapter_stream import adapter_stream
from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError, SparseletError, prefix_errors
from sparselet.expert import Expert
from sparselet.io.atomic import atomic_directory
from sparselet.io.paths import check_output
from sparselet.io.temporaries import fitting_name
from sparselet.merging.engine.parallel import in_order
from sparselet.merging.engine.plan import ExpertSource, Plan, Weight
from sparselet.merging.method import STATS, keyword_defaults
from sparselet.merging.methods import get_method, per_expert_methods
from sparselet.merging.record import Digests, merged_metadata


def merge_per_task(
    output: str | Path,
    experts: Sequence[ExpertSource],
    method: str,
    weights: Sequence[Weight] | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    base: str | Path | None = None,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
    keep_equal: bool = False,
) -> list[Path]:
    """Write one adapter an expert into the directory `output`: the merged delta under the expert's mask (EMR, TALL masks).

    Each is called as its expert's task, or as its directory, with a number where names are equal.
    keep_equal: the directory may be there already with the very same adapters, and then stays as it is.
    Raises ArgumentError for a method that leaves nothing of single experts, and what `merge_to` raises.
    """
    chosen = get_method(method)
    per_expert = chosen.per_expert
    if per_expert is None:
        raise ArgumentError(f"{method} merges into one adapter only; {', '.join(per_expert_methods())} give one per expert.")
    if not keep_equal:
        check_output(output)
    plan = Plan(experts, method, weights, parameters, base)
    plan.check_values()
    arguments = {name: plan.parameters[name] for name in keyword_defaults(per_expert)}
    if chosen.per_expert_stats:
        arguments[STATS] = plan.over_all_targets(chosen.per_expert_stats)
    digests = Digests(len(plan.experts))

    def work(name: str) -> tuple[str, list[SparseDelta]]:
        deltas = plan.deltas(name)
        digests.add(name, deltas)
        with prefix_errors(name):
            return name, per_expert(deltas, plan.weights_of(name), **arguments)

    names = _names(plan.experts)
    with atomic_directory(output, keep_equal) as directory:
        for name in names:
            (directory / name).mkdir()
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(adapter_stream(directory / name, plan.shapes)) for name in names]
            targets = stack.enter_context(contextlib.closing(in_order(work, plan.shapes, plan.bytes_of, workers)))
            for target, deltas in targets:
                for stream, delta in zip(streams, deltas, strict=True):
                    stream.add(target, delta)
                if progress is not None:
                    progress(target)
        merged = merged_metadata(plan, digests)
        for stream, expert in zip(streams, plan.experts, strict=True):
            own = {
                "task": expert.metadata.task,
                "data_fingerprint": expert.metadata.data_fingerprint,
                "chat_template": expert.metadata.chat_template,
                "task_type": expert.metadata.task_type,
            }
            stream.describe(merged.with_fields(own), plan.fingerprints)
    return [Path(output) / name for name in names]


def is_per_task(output: str | Path, experts: Sequence[Expert], method: str) -> bool:
    """Whether `output` holds what `merge_per_task` calls its adapters of these experts, by the same method.

    A run leaves that which is killed before it has written what comes after them.
    """
    names = _names(experts)
    try:
        merges = [AdapterFile(Path(output) / name).metadata.merge for name in names]
    except (SparseletError, OSError):
        return False
    return {*names} == {*os.listdir(output)} and all(merge and merge.get("method") == method for merge in merges)


def _names(experts: Sequence[Expert]) -> list[str]:
    """A directory name for each expert: its task, or its own directory's; numbered where two are equal."""
    names: list[str] = []
    for i, expert in enumerate(experts, 1):
        called = expert.metadata.task or (expert.path.name if expert.path else f"expert-{i}")
        plain = "".join("-" if character == "/" or not character.isprintable() else character for character in called)
        name = fitting_name(Path(), plain.strip(". ") or f"expert-{i}", "")
        while name in names:
            name = fitting_name(Path(), name, f"-{i}")
        names.append(name)
    return names
