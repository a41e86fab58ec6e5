"""Experts for the tests of the merge driver, and what a directory holds."""

from collections.abc import Sequence
from pathlib import Path

import torch
from helpers.made_profiles import profile_for
from helpers.strategies import random_delta
from hypothesis import strategies as st
from torch import Tensor

from sparselet import SparseAdapter
from sparselet.delta import BlockSize
from sparselet.fingerprint import fingerprint_weight

Q, V, OTHER = "layers.0.q", "layers.0.v", "layers.1.q"
SHAPE = (6, 12)


def expert(
    seed: int,
    blocks: BlockSize = 1,
    names: tuple[str, ...] = (Q, V),
    shape: tuple[int, int] = SHAPE,
    base: Tensor | None = None,
    density: float = 0.4,
    **metadata,
) -> SparseAdapter:
    """An expert of random deltas on the base weight `base` of every target."""
    deltas = {name: random_delta(shape, blocks, density, seed + i) for i, name in enumerate(names)}
    fingerprints = None if base is None else {name: fingerprint_weight(base) for name in names}
    adapter = SparseAdapter(deltas, {"task": f"task {seed}", "base_model_name_or_path": "base", **metadata}, fingerprints)
    adapter.profile = profile_for(adapter, seed) if names else None
    return adapter


def mixed_experts(blocks: Sequence[BlockSize] = (1, 3, 3, 1)) -> list[SparseAdapter]:
    """Masks of these blocks; each lacks a target that another has."""
    targets = ((Q, V), (Q,), (V, OTHER), ())
    return [expert(1 + 10 * i, block, names) for i, (block, names) in enumerate(zip(blocks, targets, strict=True))]


def saved(directory: Path, experts: list[SparseAdapter], dtype: torch.dtype | None = None) -> list[Path]:
    """The experts as directories `expert0`, `expert1`, …"""
    return [one.save(directory / f"expert{i}", dtype) for i, one in enumerate(experts)]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file under a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


weights = st.sampled_from([-1.5, -1.0, 0.0, 0.1, 0.5, 1.0, 3.0])
patterns = st.dictionaries(st.sampled_from(["*", "*.v", "layers.0.*", "layers.0.q"]), weights, max_size=3)
