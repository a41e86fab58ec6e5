"""Synthetic inputs that need no model, the same for each contestant. Each is made once in a process."""

import functools
from typing import Any

import torch
from torch import Tensor

from contestants.models import DTYPES, random_entries


def random_scores(job: dict[str, Any]) -> dict[str, Tensor]:
    """Normal scores for every entry, float32 [rows · columns], of each of the job's `shapes`, by name."""
    return _scores(tuple(map(tuple, job["shapes"])), job["device"])


def gradient_inputs(job: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """x [tokens, in] and ∂L/∂y [tokens, out], normal, for a target of `shape` (out, in)."""
    return _gradient_inputs(tuple(job["shape"]), job["tokens"], job["dtype"], job["device"])


@functools.cache
def _scores(shapes: tuple[tuple[int, int], ...], device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return {
        f"model.layers.{i}.target": torch.randn(rows * columns, generator=generator, device=device)
        for i, (rows, columns) in enumerate(shapes)
    }


@functools.cache
def _gradient_inputs(shape: tuple[int, int], tokens: int, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    rows, columns = shape
    x, gradient = (torch.randn(tokens, n, generator=generator, device=device) for n in (columns, rows))
    return x.to(DTYPES[dtype]), gradient.to(DTYPES[dtype])


def switch_inputs(job: dict[str, Any]) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """For each of the job's `shapes` a flat weight, the entries of two masks of `density`, and the values for each."""
    return _switch_inputs(tuple(map(tuple, job["shapes"])), job["density"], job["dtype"], job["device"])


@functools.cache
def _switch_inputs(
    shapes: tuple[tuple[int, int], ...], density: float, dtype: str, device: str
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for shape in shapes:
        weight = torch.zeros(shape[0] * shape[1], dtype=DTYPES[dtype], device=device)
        out, into = random_entries(shape, density, generator), random_entries(shape, density, generator)
        made.append((weight, out, weight[out] + 1, into, weight[into] + 1))
    return made
