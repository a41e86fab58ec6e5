"""One adapter per expert: the merged delta masked and rescaled to approximate that expert."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparselet.adapter_stream import adapter_stream
from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError, prefix_errors
from sparselet.expert import Expert
from sparselet.io.atomic import atomic_directory
from sparselet.io.paths import check_output
from sparselet.io.temporaries import fitting_name
from sparselet.merging.engine.parallel import map_in_order
from sparselet.merging.engine.plan import ExpertSource, MergePlan, Weight
from sparselet.merging.method import STATS, keyword_defaults
from sparselet.merging.methods import get_method, per_expert_methods
from sparselet.merging.record import Digests, metadata_from_plan


def merge_per_expert(
    output: str | Path,
    experts: Sequence[ExpertSource],
    method: str,
    weights: Sequence[Weight] | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    base: str | Path | None = None,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write one adapter per expert into the directory `output`: the merged delta under the expert's mask (EMR, TALL masks).

    Each is named after its expert's task, or its expert's directory; equal names are numbered.
    Raises ArgumentError for a method without a per-expert result, and what `merge_to` raises.
    """
    merge_method = get_method(method)
    per_expert = merge_method.per_expert
    if per_expert is None:
        raise ArgumentError(f"{method} merges into one adapter only; {', '.join(per_expert_methods())} give one per expert.")
    check_output(output)
    plan = MergePlan(experts, method, weights, parameters, base)
    plan.check_values()
    arguments = {name: plan.parameters[name] for name in keyword_defaults(per_expert)}
    if merge_method.per_expert_stats:
        arguments[STATS] = plan.over_all_targets(merge_method.per_expert_stats)
    digests = Digests(len(plan.experts))

    def work(name: str) -> tuple[str, list[SparseDelta]]:
        deltas = plan.deltas(name)
        digests.add(name, deltas)
        with prefix_errors(name):
            return name, per_expert(deltas, plan.weights_of(name), **arguments)

    names = _names(plan.experts)
    with atomic_directory(output) as directory:
        for name in names:
            (directory / name).mkdir()
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(adapter_stream(directory / name, plan.shapes)) for name in names]
            targets = stack.enter_context(contextlib.closing(map_in_order(work, plan.shapes, plan.bytes_of, workers)))
            for target, deltas in targets:
                for stream, delta in zip(streams, deltas, strict=True):
                    stream.add(target, delta)
                if progress is not None:
                    progress(target)
        merged = metadata_from_plan(plan, digests)
        for stream, expert in zip(streams, plan.experts, strict=True):
            own = {
                "task": expert.metadata.task,
                "data_fingerprint": expert.metadata.data_fingerprint,
                "chat_template": expert.metadata.chat_template,
                "task_type": expert.metadata.task_type,
                **({"prompt": expert.metadata.prompt} if expert.metadata.prompt is not None else {}),
            }
            stream.describe(merged.with_fields(own), plan.fingerprints)
    return [Path(output) / name for name in names]


def _names(experts: Sequence[Expert]) -> list[str]:
    """A directory name for each expert: its task, or the name of its directory; equal names are numbered."""
    names: list[str] = []
    for i, expert in enumerate(experts, 1):
        label = expert.metadata.task or (expert.path.name if expert.path else f"expert-{i}")
        plain = "".join("-" if character == "/" or not character.isprintable() else character for character in label)
        name = fitting_name(Path(), plain.strip(". ") or f"expert-{i}", "")
        while name in names:
            name = fitting_name(Path(), name, f"-{i}")
        names.append(name)
    return names
