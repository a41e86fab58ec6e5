"""What a merged adapter remembers of its merge: the method, its parameters, and every expert with a digest of its deltas."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from sparselet.adapter_metadata import AdapterMetadata
from sparselet.delta import SparseDelta
from sparselet.expert import Expert
from sparselet.merging.engine.plan import Plan

SAMPLE = 64


class Digests:
    """A digest of each expert's deltas, taken while they are read: equal deltas, equal digest, whatever their file."""

    def __init__(self, experts: int) -> None:
        self._parts: list[dict[str, bytes]] = [{} for _ in range(experts)]

    def add(self, name: str, deltas: Sequence[SparseDelta]) -> None:
        """Note one target's deltas, one an expert. Threads may call it at the same time."""
        for parts, delta in zip(self._parts, deltas, strict=True):
            if delta.nnz:
                parts[name] = delta_digest(delta)

    def hex(self) -> list[str]:
        """The digests of what was added, 16 hex digits each."""
        return [_join(parts) for parts in self._parts]


def delta_digest(delta: SparseDelta) -> bytes:
    """SHA-256 of a delta's shape, block size, count of blocks, and some 64 of its indices and values, evenly spread."""
    step = max(1, len(delta.indices) // SAMPLE)
    indices = delta.indices[::step].cpu().to(torch.int64).numpy().astype("<i8").tobytes()
    values = delta.values[::step].detach().cpu().to(torch.float64).numpy().astype("<f8").tobytes()
    return hashlib.sha256(f"{delta.shape} {delta.block_size} {len(delta.indices)} ".encode() + indices + values).digest()


def expert_digest(expert: Expert) -> str:
    """The digest of a whole expert, as a merge records it."""
    return _join({name: delta_digest(delta) for name in expert if (delta := expert[name]).nnz})


def merged_metadata(plan: Plan, digests: Digests) -> AdapterMetadata:
    """The merged adapter's metadata: the base model, and the recipe of the merge."""
    records = [
        expert_record(expert.metadata, digest, weight)
        for expert, digest, weight in zip(plan.experts, digests.hex(), plan.weights, strict=True)
    ]
    return metadata_of_merge(records, plan.method.name, plan.parameters)


def expert_record(metadata: AdapterMetadata, digest: str, weight: Any) -> dict[str, Any]:
    """What is recorded of one expert; of one that was merged itself, also of what."""
    merged = {"merge": metadata.merge} if metadata.merge else {}
    return {
        **merged,
        "task": metadata.task,
        "data_fingerprint": metadata.data_fingerprint,
        "base": metadata.base_model_name_or_path,
        "task_type": metadata.task_type,
        "chat_template": metadata.chat_template,
        "digest": digest,
        "weight": weight,
    }


def metadata_of_merge(records: Sequence[Mapping[str, Any]], method: str, parameters: Mapping[str, Any]) -> AdapterMetadata:
    """The metadata of a merge of the experts recorded."""
    names = {record["base"] for record in records if record["base"]}
    return AdapterMetadata.from_json(
        {
            "base_model_name_or_path": min(names) if names else None,
            "task_type": _agreed(record["task_type"] for record in records),
            "chat_template": _agreed(record["chat_template"] for record in records),
            "merge": {"method": method, "parameters": dict(parameters), "experts": list(records)},
        }
    )


def _join(parts: Mapping[str, bytes]) -> str:
    joined = b"".join(name.encode() + parts[name] for name in sorted(parts))
    return hashlib.sha256(joined).hexdigest()[:16]


def _agreed(values: Iterable[Any]) -> Any:
    """The one value of all that are known, or None where they differ or none is."""
    different = list(dict.fromkeys(value for value in values if value is not None))
    return different[0] if len(different) == 1 else None
