"""Overlap merges that store their sums and counts, so that experts can be added and removed later.

Beside the merged adapter, `merge_counts.safetensors` holds for each target, on the blocks of the merged mask:
`<target>.counts` int32 [n], the number of masks that select the block, and `<target>.sums`, Σ wᵢ·ΔWᵢ as int64 multiples of
2⁻⁵⁰, stored as int32 pairs (low half first), [n, 2] or [n, h, w, 2]. docs/format.md specifies the checks.

Each wᵢ·ΔWᵢ is rounded to a multiple of 2⁻⁵⁰ (9·10⁻¹⁶), and the integers are added, which is exact: the same experts give the
same bytes, independent of the order in which experts were added and removed. A merged value is float32(sum) / count; it differs
from that of a merge without counts by rounding only.
"""

import contextlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselet.adapter import CONFIG_FILE, AdapterFile
from sparselet.adapter_metadata import AdapterMetadata
from sparselet.adapter_stream import adapter_stream
from sparselet.delta import SparseDelta, block_name
from sparselet.errors import (
    ArgumentError,
    BadConfig,
    BadCounts,
    BadDtype,
    BadShape,
    MissingFile,
    MissingTensor,
    SparseletError,
    UnknownTensor,
)
from sparselet.expert import Expert
from sparselet.formats import open_expert
from sparselet.io.atomic import atomic_directory, atomic_write
from sparselet.io.paths import check_inside, check_output
from sparselet.io.tensor_files import TensorFile, TensorStream
from sparselet.kernels import selected
from sparselet.merging.algebra.entries import common_blocks, compact, per_block
from sparselet.merging.engine.parallel import map_in_order
from sparselet.merging.engine.plan import (
    ExpertSource,
    MergePlan,
    Weight,
    check_patterns,
    check_weights,
    expert_label,
    weight_for,
)
from sparselet.merging.record import Digests, expert_digest, expert_record, metadata_from_records

COUNTS_FILE = "merge_counts.safetensors"
COUNTS, SUMS = ".counts", ".sums"
SUM_STEP = 2.0**-50
MAX_SUM = 4096.0  # an int64 holds up to 8192

Record = Mapping[str, Any]


@dataclass(frozen=True)
class OverlapSums:
    """Sums and counts of one target. blocks: int64 [n]; sums: int64 [n] or [n, h, w]; counts: int32 [n], at least 1."""

    shape: tuple[int, int]
    blocks: Tensor
    sums: Tensor
    counts: Tensor

    def delta(self) -> SparseDelta:
        """The merged delta: float32(sum) / count."""
        values = (self.sums.double() * SUM_STEP).float()
        values /= per_block(self.counts, values)
        return SparseDelta(self.shape, self.blocks, values)


def merge_with_counts(
    output: str | Path,
    experts: Sequence[ExpertSource],
    weights: Sequence[Weight] | None = None,
    *,
    base: str | Path | None = None,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Merge by `overlap` into the directory `output`, and store sums and counts there.

    Targets without selected entries are left out. The experts are recorded in the order of their digests, as the result is
    independent of their order.

    Raises what `merge_to` raises, and ArgumentError for masks of different blocks or sums beyond ±4096.
    """
    check_output(output)
    plan = MergePlan(experts, "overlap", weights, None, base)
    plan.check_values()
    # Read all targets first: a file's header lists the targets that have entries, before the first is written.
    digests, names = Digests(len(plan.experts)), []
    for name in plan.shapes:
        deltas = plan.deltas(name)
        digests.add(name, deltas)
        names += [name] if any(delta.nnz for delta in deltas) else []
    weighted = zip(plan.experts, digests.hex(), plan.weights, strict=True)
    records = [expert_record(expert.metadata, digest, weight) for expert, digest, weight in weighted]

    def work(name: str) -> tuple[str, OverlapSums]:
        return name, overlap_sums(name, plan.deltas(name), plan.weights_of(name))

    return _write_merge(output, names, map_in_order(work, names, plan.bytes_of, workers), plan, records, progress)


def update_merge(
    output: str | Path,
    merged: str | Path,
    *,
    add: Sequence[ExpertSource] = (),
    remove: Sequence[ExpertSource] = (),
    weights: Sequence[Weight] | None = None,
    base: str | Path | None = None,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Add experts to a merge that stored its counts, or remove experts from it, and write the result to the directory `output`.

    The files are byte for byte those of `merge_with_counts` of the resulting experts; except that fingerprints of the base
    model which only a removed expert had are kept.

    weights: of the experts to add. An expert is removed with the weight that it was merged with; to change its weight, remove
        it and add it.

    Raises what `merge_with_counts` raises; MissingFile, BadCounts and other FormatErrors for `merged`; ArgumentError if an
    expert to add is already in the merge, an expert to remove is not, or none would remain.
    """
    check_output(output)
    if not add and not remove:
        raise ArgumentError("nothing to change; give experts to add or to remove.")
    factors = check_weights(weights, len(add))
    previous = OverlapSumsFile(merged)
    plan = MergePlan([*add, *remove, previous.adapter], "overlap", None, None, base)
    check_patterns(factors, plan.shapes)
    plan.check_values()
    labels = [expert_label(expert, i) for i, expert in enumerate(plan.experts)]
    records = list(previous.records)
    to_remove = list(zip(plan.experts, labels, strict=True))[len(add) : -1]
    removed = [_remove_record(records, expert, label) for expert, label in to_remove]
    to_add = zip(plan.experts[: len(add)], factors, labels[: len(add)], strict=True)
    added = [_add_record(records, expert, weight, label) for expert, weight, label in to_add]
    if not records:
        raise ArgumentError("no expert would remain in the merge.")
    signs = [1] * len(added) + [-1] * len(removed)

    def previous_sums(name: str) -> OverlapSums | None:
        return previous.read(name) if name in previous.adapter else None

    def has_entries(name: str) -> bool:
        *deltas, _ = plan.deltas(name)
        sums = previous_sums(name)
        selections = sum(sign * len(delta.indices) for sign, delta in zip(signs, deltas, strict=True))
        return selections + (int(sums.counts.sum()) if sums else 0) > 0

    def work(name: str) -> tuple[str, OverlapSums]:
        *deltas, _ = plan.deltas(name)
        factors = [weight_for(record["weight"], name) for record in (*added, *removed)]
        return name, overlap_sums(name, deltas, factors, signs, previous_sums(name))

    names = [name for name in plan.shapes if has_entries(name)]
    return _write_merge(output, names, map_in_order(work, names, plan.bytes_of, workers), plan, records, progress)


def overlap_sums(
    name: str,
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    signs: Sequence[int] | None = None,
    previous: OverlapSums | None = None,
) -> OverlapSums:
    """Sums and counts of one target: `previous`, plus the deltas with sign 1, minus those with sign −1.

    Raises ArgumentError for masks of different blocks, sums beyond ±4096, and a delta with sign −1 not in `previous`.
    """
    shape = previous.shape if previous else deltas[0].shape
    merged = SparseDelta.empty(shape) if previous is None else previous.delta()
    blocks = {(delta.block, delta.shape) for delta in (merged, *deltas) if delta.nnz}
    if len(blocks) > 1:
        kinds = " and ".join(block_name(*pair) for pair in sorted(blocks))
        raise ArgumentError(f"{name}: sums and counts need one kind of block; these experts have {kinds}.")
    (merged, *deltas), positions = compact(common_blocks([merged, *deltas]))
    sums = torch.zeros(merged.blocks, *merged.values.shape[1:], dtype=torch.int64)
    counts = torch.zeros(len(sums), dtype=torch.int32)
    largest = 0.0
    if previous and len(previous.blocks):
        sums[merged.indices], counts[merged.indices] = previous.sums, previous.counts
        largest = float(previous.sums.abs().max()) * SUM_STEP
    for delta, weight, sign in zip(deltas, weights, signs or [1] * len(deltas), strict=True):
        if not delta.nnz:
            continue
        terms = delta.values.double() * weight
        largest += float(terms.abs().max()) if sign > 0 else 0.0
        if largest > MAX_SUM:
            raise ArgumentError(f"{name}: sums can be stored up to {MAX_SUM:g}, got {largest:g}.")
        at = delta.indices.long()
        sums.index_add_(0, at, (terms / SUM_STEP).round().to(torch.int64), alpha=sign)
        counts.index_add_(0, at, torch.full((len(at),), sign, dtype=torch.int32))
    if signs and -1 in signs and ((counts < 0).any() or sums[counts == 0].any()):
        raise ArgumentError(
            f"{name}: an expert to remove differs from the one that was merged; it must be the same to the bit."
        )
    blocks = selected(counts)
    return OverlapSums(shape, positions.in_target(blocks), sums.index_select(0, blocks), counts.index_select(0, blocks))


class OverlapSumsFile:
    """A merged adapter with its sums and counts, opened for reading target by target.

    path: a directory or hub name. adapter: the merged adapter. records: the record of each expert in the merge.

    Raises MissingFile, BadConfig, BadContainer, MissingTensor, UnknownTensor, BadDtype, BadShape, BadCounts, and what opening
    the adapter raises; ArgumentError if it is not a sparse adapter.
    """

    def __init__(self, path: str | Path) -> None:
        adapter = open_expert(path)
        if not isinstance(adapter, AdapterFile):
            raise ArgumentError(f"{path} is not a sparse adapter, so experts cannot be added or removed; merge first.")
        self.adapter = adapter
        file = check_inside(adapter.path, COUNTS_FILE)
        if not file.is_file():
            raise MissingFile(f"{file} is missing, so experts cannot be added or removed; merge with `keep_counts=True`.")
        self.records = _records(adapter)
        self._file = TensorFile(file)
        expected = {name + suffix for name in adapter for suffix in (COUNTS, SUMS)}
        for error, names, problem in (
            (MissingTensor, expected - self._file.shapes.keys(), "is missing"),
            (UnknownTensor, self._file.shapes.keys() - expected, "belongs to no target of the adapter"),
        ):
            if names:
                raise error(f"{file}: {min(names)} {problem}.")
        for name, dtype in self._file.dtypes.items():
            if dtype != "I32":
                raise BadDtype(f"{file}: {name} is {dtype}; expected I32.")

    def read(self, name: str) -> OverlapSums:
        """One target's sums and counts, checked against the adapter's values."""
        delta = self.adapter[name]
        counts, pairs = self._file.read(name + COUNTS), self._file.read(name + SUMS)
        expected = (*delta.values.shape, 2)
        if counts.shape != delta.indices.shape or tuple(pairs.shape) != expected:
            raise BadShape(
                f"{self._file.path}: {name} has counts {list(counts.shape)} and sums {list(pairs.shape)}; "
                f"expected {list(delta.indices.shape)} and {list(expected)}."
            )
        sums = pairs.contiguous().view(torch.int64).squeeze(-1)
        stored = OverlapSums(delta.shape, delta.indices.long(), sums, counts)
        possible = len(counts) == 0 or 1 <= int(counts.min()) <= int(counts.max()) <= len(self.records)
        if not possible or not torch.equal(stored.delta().values, delta.values.float()):
            raise BadCounts(
                f"{self._file.path}: {name}: sums and counts do not give the adapter's values; one of the two files was "
                "changed. Merge again."
            )
        return stored


def _records(adapter: AdapterFile) -> list[Record]:
    """The adapter's records of its experts. Raises BadConfig."""
    file = adapter.path / CONFIG_FILE
    merge = adapter.metadata.merge
    if not merge or merge.get("method") != "overlap":
        raise BadConfig(f"{file}: merge is {merge!r:.60}; experts can be added to and removed from merges by overlap only.")
    records = merge.get("experts")
    fields = expert_record(AdapterMetadata(), "", 1.0).keys()
    if not isinstance(records, list) or not all(isinstance(record, dict) and fields <= record.keys() for record in records):
        raise BadConfig(f"{file}: merge.experts is {records!r:.60}; expected a list of objects with {', '.join(fields)}.")
    try:
        check_weights([record["weight"] for record in records], len(records))
    except SparseletError as error:
        raise BadConfig(f"{file}: merge.experts: {error}") from error
    return records


def _remove_record(records: list[Record], expert: Expert, label: str) -> Record:
    """Remove and return the record of an expert. Raises ArgumentError if it has none."""
    digest = expert_digest(expert)
    matches = [record for record in records if record["digest"] == digest]
    if not matches:
        names = ", ".join(str(record["task"] or record["digest"]) for record in records)
        raise ArgumentError(f"{label} is not in the merge; remaining experts: {names or 'none'}.")
    records.remove(matches[0])
    return matches[0]


def _add_record(records: list[Record], expert: Expert, weight: Weight, label: str) -> Record:
    """Append and return the record of an expert. Raises ArgumentError if it is there already."""
    record = expert_record(expert.metadata, expert_digest(expert), weight)
    if record["digest"] in [previous["digest"] for previous in records]:
        raise ArgumentError(f"{label} is already in the merge; to change its weight, remove it in the same step.")
    records.append(record)
    return record


def _write_merge(
    output: str | Path,
    names: Sequence[str],
    targets: Generator[tuple[str, OverlapSums]],
    plan: MergePlan,
    records: Sequence[Record],
    progress: Callable[[str], None] | None,
) -> Path:
    """Write the merged adapter with its sums and counts."""
    tensors = [name + suffix for name in names for suffix in (COUNTS, SUMS)]
    with contextlib.closing(targets), atomic_directory(output) as directory:
        with (
            adapter_stream(directory, names) as stream,
            atomic_write(directory / COUNTS_FILE) as file,
            TensorStream(file, tensors) as counts,
        ):
            for name, sums in targets:
                stream.add(name, sums.delta())
                counts.add(name + COUNTS, sums.counts)
                counts.add(name + SUMS, sums.sums.unsqueeze(-1).contiguous().view(torch.int32))
                if progress is not None:
                    progress(name)
        ordered = sorted(records, key=lambda record: json.dumps([record["digest"], record], sort_keys=True))
        stream.describe(metadata_from_records(ordered, plan), plan.fingerprints)
    return Path(output)
