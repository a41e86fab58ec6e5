"""Sums in float64 that do not depend on the order of the terms or the number of threads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparselet.delta import SparseDelta

_ROW = 4096


def fixed_order_sum(numbers: Tensor) -> float:
    """Σ of a float64 tensor of any shape. Rows of a fixed length are summed first, so that no thread splits a sum."""
    flat = numbers.reshape(-1)
    end = len(flat) // _ROW * _ROW  # of the last full row
    return (flat[:end].view(-1, _ROW).sum(dim=1).sum() + flat[end:].sum()).item()


def sum_in_double(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> Tensor:
    """Σ τᵢ over all blocks, τᵢ = wᵢ·ΔWᵢ rounded to float32; float64 [blocks], or [blocks, h, w]. deltas: of one block.

    For signs and comparisons: float64 adds a few float32 numbers of similar size exactly, so that
    opposite terms cancel to 0 in any order.
    """
    first = deltas[0].values
    result = torch.zeros(deltas[0].blocks, *first.shape[1:], dtype=torch.float64, device=first.device)
    for delta, weight in zip(deltas, weights, strict=True):
        own = delta.values.float() * weight
        if len(delta.indices) == delta.blocks:
            result.add_(own)
        else:
            result.index_add_(0, delta.indices, own.double())
    return result
