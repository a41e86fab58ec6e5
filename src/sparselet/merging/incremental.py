"""Overlap merges that keep their sums and counts, so that experts can be added and taken out later.

Beside the merged adapter, `merge_counts.safetensors` holds for each target, on the blocks of the merged mask:
`<target>.counts` int32 [n], how many masks select the block, and `<target>.sums`, Σ wᵢ·ΔWᵢ as int64 multiples of 2⁻⁵⁰, stored
as int32 pairs (low half first), [n, 2] or [n, B, B, 2]. docs/format.md says what is checked.

Each wᵢ·ΔWᵢ is rounded to a multiple of 2⁻⁵⁰ (9·10⁻¹⁶) by itself and the integers are added, which is exact: the same
experts give the same bytes, in whatever order they came and whoever was taken out between. A merged value is
float32(sum) / count; it differs from that of a merge without counts by rounding only.
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
from sparselet.delta import SparseDelta
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
from sparselet.merging.engine.parallel import in_order
from sparselet.merging.engine.plan import ExpertSource, Plan, Weight, check_patterns, check_weights, label, weight_of
from sparselet.merging.record import Digests, expert_digest, expert_record, metadata_of_merge

COUNTS_FILE = "merge_counts.safetensors"
COUNTS, SUMS = ".counts", ".sums"
GRID = 2.0**-50
LIMIT = 4096.0  # of a sum; an int64 holds up to 8192

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Kept:
    """Sums and counts of one target. blocks: int64 [n]; sums: int64 [n] or [n, B, B]; counts: int32 [n], at least 1."""

    shape: tuple[int, int]
    blocks: Tensor
    sums: Tensor
    counts: Tensor

    @property
    def block_size(self) -> int:
        """1 for single entries, B for tiles."""
        return self.sums.shape[1] if self.sums.ndim == 3 else 1

    def delta(self) -> SparseDelta:
        """The merged delta: float32(sum) / count."""
        values = (self.sums.double() * GRID).float()
        values /= per_block(self.counts, values)
        return SparseDelta(self.shape, self.blocks, values, self.block_size)


def merge_with_counts(
    output: str | Path,
    experts: Sequence[ExpertSource],
    weights: Sequence[Weight] | None = None,
    *,
    base: str | Path | None = None,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Merge by `overlap` into the directory `output`, and keep sums and counts there.

    Targets in which no expert selects anything are left out. The experts are recorded in the order of their digests, since
    their order does not matter.

    Raises what `merge_to` raises, and ArgumentError for masks of several kinds or changes beyond ±4096.
    """
    check_output(output)
    plan = Plan(experts, "overlap", weights, None, base)
    plan.check_values()
    # Which targets and experts there are must be known before the first is written, for the files to depend on nothing else.
    digests, names = Digests(len(plan.experts)), []
    for name in plan.shapes:
        deltas = plan.deltas(name)
        digests.add(name, deltas)
        names += [name] if any(delta.nnz for delta in deltas) else []
    experts_with = zip(plan.experts, digests.hex(), plan.weights, strict=True)
    records = [expert_record(expert.metadata, digest, weight) for expert, digest, weight in experts_with]

    def work(name: str) -> tuple[str, Kept]:
        return name, total(name, plan.deltas(name), plan.weights_of(name))

    return _write(output, names, in_order(work, names, plan.bytes_of, workers), plan, records, progress)


def change_merge(
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
    """Add experts to a merge that kept its counts, or take experts out of it, into the directory `output`.

    The result's files are byte for byte those of `merge_with_counts` of the experts that are in it then. Only fingerprints of
    the base model that none but an expert taken out had are kept.

    weights: of the experts to add. An expert is taken out with the weight that it was merged with; to change its weight, take
        it out and add it.

    Raises what `merge_with_counts` raises; MissingFile, BadCounts and other FormatErrors for `merged`; ArgumentError if an
    expert to add is in the merge already, one to take out is not, or none would be left.
    """
    check_output(output)
    if not add and not remove:
        raise ArgumentError("nothing to change; give experts to add or to remove.")
    factors = check_weights(weights, len(add))
    before = CountsFile(merged)
    plan = Plan([*add, *remove, before.adapter], "overlap", None, None, base)
    check_patterns(factors, plan.shapes)
    plan.check_values()
    labels = [label(expert, i) for i, expert in enumerate(plan.experts)]
    records = list(before.records)
    removed = list(zip(plan.experts, labels, strict=True))[len(add) : -1]
    taken = [_take_out(records, expert, name) for expert, name in removed]
    new = [_add_to(records, *one) for one in zip(plan.experts, factors, labels, strict=False)]  # factors are as many as to add
    if not records:
        raise ArgumentError("no expert would be left in the merge.")
    signs = [1] * len(new) + [-1] * len(taken)

    def kept(name: str) -> Kept | None:
        return before.read(name) if name in before.adapter else None

    def is_left(name: str) -> bool:
        *deltas, _ = plan.deltas(name)
        was = kept(name)
        selections = sum(sign * len(delta.indices) for sign, delta in zip(signs, deltas, strict=True))
        return selections + (int(was.counts.sum()) if was else 0) > 0

    def work(name: str) -> tuple[str, Kept]:
        *deltas, _ = plan.deltas(name)
        factors = [weight_of(record["weight"], name) for record in (*new, *taken)]
        return name, total(name, deltas, factors, signs, kept(name))

    names = [name for name in plan.shapes if is_left(name)]
    return _write(output, names, in_order(work, names, plan.bytes_of, workers), plan, records, progress)


def total(
    name: str,
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    signs: Sequence[int] | None = None,
    kept: Kept | None = None,
) -> Kept:
    """Sums and counts of one target: those `kept`, plus the deltas with sign 1, less those with sign −1.

    Raises ArgumentError for masks of several kinds, changes beyond ±4096, and a delta with sign −1 that is not in `kept`.
    """
    shape = kept.shape if kept else deltas[0].shape
    sides = {delta.block_size for delta in deltas if delta.nnz} | ({kept.block_size} if kept and len(kept.blocks) else set())
    if len(sides) > 1:
        sizes = " and ".join("single entries" if side == 1 else f"tiles of {side}×{side}" for side in sorted(sides))
        raise ArgumentError(f"{name}: counts are kept for masks of one kind; these experts have {sizes}.")
    side = sides.pop() if sides else 1
    tile = (side, side) if side > 1 else ()
    before = SparseDelta.empty(shape) if kept is None else kept.delta()
    (before, *deltas), places = compact(common_blocks([before, *deltas]))
    sums = torch.zeros(before.blocks, *tile, dtype=torch.int64)
    counts = torch.zeros(len(sums), dtype=torch.int32)
    largest = 0.0
    if kept and len(kept.blocks):
        sums[before.indices], counts[before.indices] = kept.sums, kept.counts
        largest = float(kept.sums.abs().max()) * GRID
    for delta, weight, sign in zip(deltas, weights, signs or [1] * len(deltas), strict=True):
        if not delta.nnz:
            continue
        terms = delta.values.double() * weight
        largest += float(terms.abs().max()) if sign > 0 else 0.0
        if largest > LIMIT:
            raise ArgumentError(f"{name}: counts are kept for changes of at most {LIMIT:g} in all, got {largest:g}.")
        at = delta.indices.long()
        sums.index_add_(0, at, (terms / GRID).round().to(torch.int64), alpha=sign)
        counts.index_add_(0, at, torch.full((len(at),), sign, dtype=torch.int32))
    if signs and -1 in signs and ((counts < 0).any() or sums[counts == 0].any()):
        raise ArgumentError(f"{name}: an expert to remove is not as it was when it was merged; it must be the same to the bit.")
    blocks = selected(counts)
    return Kept(shape, places.of(blocks), sums.index_select(0, blocks), counts.index_select(0, blocks))


class CountsFile:
    """A merged adapter with its sums and counts, opened for reading target by target.

    path: a directory or hub name. adapter: the merged adapter. records: what was recorded of each expert in the merge.

    Raises MissingFile, BadConfig, BadContainer, MissingTensor, UnknownTensor, BadDtype, BadShape, BadCounts, and what opening
    the adapter raises; ArgumentError if it is no sparse adapter.
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

    def read(self, name: str) -> Kept:
        """One target's sums and counts, once they are known to give the adapter's values."""
        delta = self.adapter[name]
        counts, pairs = self._file.read(name + COUNTS), self._file.read(name + SUMS)
        expected = (*delta.values.shape, 2)
        if counts.shape != delta.indices.shape or tuple(pairs.shape) != expected:
            raise BadShape(
                f"{self._file.path}: {name} has counts {list(counts.shape)} and sums {list(pairs.shape)}; "
                f"expected {list(delta.indices.shape)} and {list(expected)}."
            )
        sums = pairs.contiguous().view(torch.int64).squeeze(-1)
        kept = Kept(delta.shape, delta.indices.long(), sums, counts)
        possible = len(counts) == 0 or 1 <= int(counts.min()) <= int(counts.max()) <= len(self.records)
        if not possible or not torch.equal(kept.delta().values, delta.values.float()):
            raise BadCounts(
                f"{self._file.path}: {name}: sums and counts do not give the adapter's values; one of the two files was "
                "changed. Merge again."
            )
        return kept


def _records(adapter: AdapterFile) -> list[Record]:
    """What the adapter records of each expert. Raises BadConfig."""
    file = adapter.path / CONFIG_FILE
    merge = adapter.metadata.merge
    if not merge or merge.get("method") != "overlap":
        raise BadConfig(f"{file}: merge is {merge!r:.60}; experts are added to and removed from merges by overlap.")
    records = merge.get("experts")
    known = expert_record(AdapterMetadata(), "", 1.0).keys()
    if not isinstance(records, list) or not all(isinstance(record, dict) and known <= record.keys() for record in records):
        raise BadConfig(f"{file}: merge.experts is {records!r:.60}; expected a list of objects with {', '.join(known)}.")
    try:
        check_weights([record["weight"] for record in records], len(records))
    except SparseletError as error:
        raise BadConfig(f"{file}: merge.experts: {error}") from error
    return records


def _take_out(records: list[Record], expert: Expert, name: str) -> Record:
    """Remove and return the record of an expert. Raises ArgumentError if it has none."""
    digest = expert_digest(expert)
    found = [record for record in records if record["digest"] == digest]
    if not found:
        raise ArgumentError(f"{name} is not in the merge; it holds {', '.join(map(_called, records)) or 'none other'}.")
    records.remove(found[0])
    return found[0]


def _add_to(records: list[Record], expert: Expert, weight: Weight, name: str) -> Record:
    """Append and return the record of an expert. Raises ArgumentError if it has one."""
    record = expert_record(expert.metadata, expert_digest(expert), weight)
    if any(other["digest"] == record["digest"] for other in records):
        raise ArgumentError(f"{name} is in the merge already; to change its weight, remove it in the same step.")
    records.append(record)
    return record


def _called(record: Record) -> str:
    return str(record["task"] or record["digest"])


def _write(
    output: str | Path,
    names: Sequence[str],
    targets: Generator[tuple[str, Kept]],
    plan: Plan,
    records: Sequence[Record],
    progress: Callable[[str], None] | None,
) -> Path:
    """Write the adapter and its counts."""
    counted = [name + suffix for name in names for suffix in (COUNTS, SUMS)]
    with contextlib.closing(targets), atomic_directory(output) as directory:
        with (
            adapter_stream(directory, names) as stream,
            atomic_write(directory / COUNTS_FILE) as file,
            TensorStream(file, counted) as counts,
        ):
            for name, kept in targets:
                stream.add(name, kept.delta())
                counts.add(name + COUNTS, kept.counts)
                counts.add(name + SUMS, kept.sums.unsqueeze(-1).contiguous().view(torch.int32))
                if progress is not None:
                    progress(name)
        ordered = sorted(records, key=lambda record: json.dumps([record["digest"], record], sort_keys=True))
        stream.describe(metadata_of_merge(ordered, "overlap", {}), plan.fingerprints)
    return Path(output)
