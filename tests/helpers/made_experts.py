"""Experts for the tests of the merge driver, and what a directory holds."""

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
    block_size: BlockSize = 1,
    names: tuple[str, ...] = (Q, V),
    shape: tuple[int, int] = SHAPE,
    base: Tensor | None = None,
    density: float = 0.4,
    **metadata,
) -> SparseAdapter:
    """An expert of random deltas on the base weight `base` of every target."""
    deltas = {name: random_delta(shape, block_size, density, seed + i) for i, name in enumerate(names)}
    fingerprints = None if base is None else {name: fingerprint_weight(base) for name in names}
    adapter = SparseAdapter(deltas, {"task": f"task {seed}", "base_model_name_or_path": "base", **metadata}, fingerprints)
    adapter.profile = profile_for(adapter, seed) if names else None
    return adapter


def mixed_experts() -> list[SparseAdapter]:
    """Element and tile masks; each lacks a target that another has."""
    return [expert(1), expert(11, 3, (Q,)), expert(21, 3, (V, OTHER)), expert(31, 1, ())]


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
