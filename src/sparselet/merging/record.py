"""The record of a merge in the merged adapter: method, parameters, and each expert with a digest of its deltas."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from sparselet.adapter_metadata import AdapterMetadata
from sparselet.delta import SparseDelta
from sparselet.expert import Expert
from sparselet.merging.engine.plan import MergePlan

SAMPLED_ENTRIES = 64


class Digests:
    """A digest of each expert's deltas, computed while they are read. Equal deltas give equal digests in any file format."""

    def __init__(self, experts: int) -> None:
        self._parts: list[dict[str, bytes]] = [{} for _ in range(experts)]

    def add(self, name: str, deltas: Sequence[SparseDelta]) -> None:
        """Add one target's deltas, one per expert. Thread-safe."""
        for parts, delta in zip(self._parts, deltas, strict=True):
            if delta.nnz:
                parts[name] = delta_digest(delta)

    def hex(self) -> list[str]:
        """The digests of the added deltas, 16 hex digits each."""
        return [_combine(parts) for parts in self._parts]


def delta_digest(delta: SparseDelta) -> bytes:
    """SHA-256 of a delta's shape, block, number of blocks, and about 64 evenly spaced indices and values."""
    step = max(1, len(delta.indices) // SAMPLED_ENTRIES)
    block = delta.block[0] if delta.block[0] == delta.block[1] else delta.block
    indices = delta.indices[::step].cpu().to(torch.int64).numpy().astype("<i8").tobytes()
    values = delta.values[::step].detach().cpu().to(torch.float64).numpy().astype("<f8").tobytes()
    return hashlib.sha256(f"{delta.shape} {block} {len(delta.indices)} ".encode() + indices + values).digest()


def expert_digest(expert: Expert) -> str:
    """The digest of an expert, as a merge records it."""
    return _combine({name: delta_digest(delta) for name in expert if (delta := expert[name]).nnz})


def metadata_from_plan(plan: MergePlan, digests: Digests) -> AdapterMetadata:
    """The merged adapter's metadata, after all targets were added to `digests`."""
    records = [
        expert_record(expert.metadata, digest, weight)
        for expert, digest, weight in zip(plan.experts, digests.hex(), plan.weights, strict=True)
    ]
    return metadata_from_records(records, plan)


def expert_record(metadata: AdapterMetadata, digest: str, weight: Any) -> dict[str, Any]:
    """The record of one expert, with its own merge record if it was merged itself."""
    merged = {"merge": metadata.merge} if metadata.merge else {}
    prompt = {"prompt": metadata.prompt} if metadata.prompt is not None else {}
    return {
        **merged,
        **prompt,
        "task": metadata.task,
        "data_fingerprint": metadata.data_fingerprint,
        "base": metadata.base_model_name_or_path,
        "task_type": metadata.task_type,
        "chat_template": metadata.chat_template,
        "digest": digest,
        "weight": weight,
    }


def metadata_from_records(records: Sequence[Mapping[str, Any]], plan: MergePlan) -> AdapterMetadata:
    """The metadata of a merge with these records of its experts."""
    names = {record["base"] for record in records if record["base"]}
    prompts = {record.get("prompt") for record in records}
    prompt = next(iter(prompts)) if len(prompts) == 1 else None  # else it would be put around other experts' inputs
    block_size = _common_value(expert.metadata.block_size for expert in plan.experts)  # that of tiles follows from the deltas
    return AdapterMetadata.from_json(
        {
            "base_model_name_or_path": min(names) if names else None,
            "task_type": _common_value(record["task_type"] for record in records),
            "chat_template": _common_value(record["chat_template"] for record in records),
            **({"prompt": prompt} if prompt is not None else {}),
            **({"block_size": block_size} if isinstance(block_size, str) else {}),
            "merge": {
                "method": plan.method.name,
                "parameters": dict(plan.parameters),
                **({"layer_scaling": list(plan.layer_scaling)} if plan.layer_scaling else {}),
                "experts": list(records),
            },
        }
    )


def _combine(parts: Mapping[str, bytes]) -> str:
    joined = b"".join(name.encode() + parts[name] for name in sorted(parts))
    return hashlib.sha256(joined).hexdigest()[:16]


def _common_value(values: Iterable[Any]) -> Any:
    """The value on which all that are not None agree, else None."""
    distinct = list(dict.fromkeys(value for value in values if value is not None))
    return distinct[0] if len(distinct) == 1 else None
