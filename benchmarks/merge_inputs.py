"""Synthetic experts with the shapes of a model's query, key and value projections, their profiles, and checkpoints with the
same deltas.

Files that exist are kept.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from sparselet import SparseAdapter, SparseDelta
from sparselet.adapter import WEIGHTS_FILE
from sparselet.io.atomic import atomic_directory
from sparselet.profiles.collect import PROMPTS, describe_prompts
from sparselet.profiles.file import PROFILE_FILE, write_profile
from sparselet.profiles.profile import Profile, low_rank_plus_diagonal

# (rows, columns) of each target of one layer, by its module's name.
SHAPES = {
    "smollm2": {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576)},
    "phi3": {"qkv_proj": (9216, 3072)},
}
DENSITY = 0.1
MAGNITUDE = 1e-3  # standard deviation of the values
TENSORS = "model.safetensors"


def write_experts(directory: Path, shapes: dict[str, tuple[int, int]], layers: int, count: int) -> list[str]:
    """Expert i has seed i: each entry is in the mask with probability `DENSITY`; the values are normal."""
    paths = [directory / f"expert-{seed:02}" for seed in range(count)]
    entries = layers * sum(rows * columns for rows, columns in shapes.values())
    require_space(directory, sum(not path.exists() for path in paths) * int(8 * DENSITY * entries))
    for seed, path in enumerate(paths):
        if not (path / WEIGHTS_FILE).exists():
            generator, deltas = torch.Generator().manual_seed(seed), {}
            for layer in range(layers):
                for target, (rows, columns) in shapes.items():
                    indices = (torch.rand(rows * columns, generator=generator) < DENSITY).nonzero().squeeze(1)
                    values = torch.randn(len(indices), generator=generator) * MAGNITUDE
                    deltas[f"model.layers.{layer}.self_attn.{target}"] = SparseDelta((rows, columns), indices, values)
            SparseAdapter(deltas, {"task": f"synthetic-{seed}"}).save(path)
    return [str(path) for path in paths]


def write_profiles(adapters: Sequence[str], layers: int, width: int, rank: int, hidden: int) -> None:
    """Beside each synthetic expert the profile of normal inputs with a decaying spectrum, and of normal prompt states.

    width: of the inputs of query, key and value layers. hidden: of prompt states.
    """
    for seed, adapter in enumerate(adapters):
        if (Path(adapter) / PROFILE_FILE).exists():
            continue
        generator = torch.Generator().manual_seed(seed)
        moments, inputs = {}, {}
        for layer in range(layers):
            names = [f"model.layers.{layer}.self_attn.{name}_proj" for name in "qkv"]
            states = torch.randn(2 * width, width, generator=generator) @ torch.diag(torch.arange(1, width + 1) ** -0.5)
            moments[names[0]] = low_rank_plus_diagonal(states.T @ states / len(states), rank)
            inputs |= dict.fromkeys(names, names[0])
        prompts = describe_prompts(torch.randn(PROMPTS, hidden, generator=generator) + torch.randn(hidden, generator=generator))
        made = Profile(moments, inputs, frozenset(), prompts, dict.fromkeys(inputs), 2 * width, PROMPTS, f"synthetic-{seed}")
        write_profile(made, Path(adapter) / PROFILE_FILE)


def write_checkpoints(directory: Path, model: Path, experts: list[str]) -> list[str]:
    """The base model with each expert's deltas added, in float32, as transformers and mergekit read it."""
    paths = {expert: directory / Path(expert).name for expert in experts}
    missing = {expert: path for expert, path in paths.items() if not path.exists()}
    require_space(directory, len(missing) * (model / TENSORS).stat().st_size)
    base = safetensors.torch.load_file(model / TENSORS) if missing else {}
    for expert, path in missing.items():
        deltas = SparseAdapter.load(expert)
        changed = {f"{name}.weight": base[f"{name}.weight"] + delta.to_dense() for name, delta in deltas.items()}
        with atomic_directory(path) as unfinished:
            safetensors.torch.save_file({**base, **changed}, unfinished / TENSORS, metadata={"format": "pt"})
            for file in model.iterdir():
                if file.name != TENSORS:
                    shutil.copyfile(file, unfinished / file.name)
    return [str(path) for path in paths.values()]


def require_space(directory: Path, needed: int) -> None:
    """Exit unless the disk has room for `needed` bytes and 4 GB for merged models."""
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if needed and free < needed + 4e9:
        sys.exit(f"{directory} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB and 4 more are needed.")
