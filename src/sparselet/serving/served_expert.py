"""`ServedExpert`: weights that requests name, in memory, identified by their content."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselet.adapter import SparseAdapter, expert_profile
from sparselet.adapter_metadata import AdapterMetadata
from sparselet.delta import SparseDelta
from sparselet.expert import Expert
from sparselet.fingerprint import Fingerprint
from sparselet.io.memory import require_memory

FitCheck = Callable[[Expert], object]
"""Raises, as `apply.target_weights`, for an expert that does not fit the base model."""


@dataclass(frozen=True, eq=False)
class ServedExpert:
    """An expert in memory, or the base model itself.

    digest: `content_digest`, or of the base model `base_digest`. adapter: None for the base model.
    """

    digest: str
    adapter: SparseAdapter | None

    @property
    def bytes(self) -> int:
        """Memory of its indices and values."""
        deltas = self.adapter.values() if self.adapter is not None else ()
        return sum(tensor.numel() * tensor.element_size() for d in deltas for tensor in (d.indices, d.values))

    @functools.cached_property
    def nnz(self) -> int:
        """Selected entries of all targets."""
        return 0 if self.adapter is None else self.adapter.nnz

    @property
    def metadata(self) -> AdapterMetadata:
        """What its file says of it; nothing for the base model."""
        return self.adapter.metadata if self.adapter is not None else AdapterMetadata()


def serve_expert(expert: Expert, fits: FitCheck) -> ServedExpert:
    """Read an expert of any kind into memory as a sparse adapter, checked against the base model.

    A LoRA or a checkpoint takes eight bytes for each entry of its targets; moments of a profile stay in its file. Raises
    NonFiniteValue, NotEnoughMemory, and what `fits` and reading raise.
    """
    fits(expert)
    require_memory(8 * expert.nnz, "the expert")
    adapter = expert if isinstance(expert, SparseAdapter) else SparseAdapter(
        {name: expert[name] for name in expert}, expert.metadata, expert.fingerprints, profile=expert_profile(expert)
    )  # fmt: skip
    adapter.check_values()
    return ServedExpert(content_digest(adapter, adapter.metadata.prompt), adapter)


def content_digest(deltas: Mapping[str, SparseDelta], prompt: str | None = None) -> str:
    """SHA-256 over each target's name, shape, mask and values, and the expert's prompt if it has one, 32 hex digits: equal
    digests mean equal answers."""
    digest = hashlib.sha256(b"" if prompt is None else json.dumps({"prompt": prompt}).encode())
    for name in sorted(deltas):
        delta = deltas[name]
        digest.update(json.dumps([name, *delta.shape, *delta.block, len(delta.indices), str(delta.values.dtype)]).encode())
        for tensor in (delta.indices, delta.values):
            digest.update(_bytes_of(tensor))
    return digest.hexdigest()[:32]


def base_digest(fingerprints: Mapping[str, Fingerprint]) -> str:
    """SHA-256 over the fingerprints of all targets of a base model, 32 hex digits."""
    content = {name: dict(fingerprint) for name, fingerprint in fingerprints.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
