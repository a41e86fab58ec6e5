"""Lengths of deltas and angles between them, without ever stacking them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.merging.algebra.entries import common_blocks, compact
from sparselet.merging.algebra.sums import total


def gram(deltas: Sequence[SparseDelta]) -> Tensor:
    """Gᵢⱼ = ⟨ΔWᵢ, ΔWⱼ⟩, float64 [N, N]: sums over the shared entries of products, which float64 holds exactly.

    One delta at a time is spelt out over all blocks, the others are gathered from it. Raises ShapeMismatch.
    """
    deltas, _ = compact(common_blocks(deltas))
    first = deltas[0].values
    products = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    spread = torch.zeros(deltas[0].blocks, *first.shape[1:], device=first.device)
    for i, one in enumerate(deltas):
        spread.index_copy_(0, one.indices.long(), one.values.float())
        for j, other in enumerate(deltas[: i + 1]):
            shared = spread.index_select(0, other.indices).double().mul_(other.values.float())
            products[i, j] = products[j, i] = total(shared)
        spread.index_fill_(0, one.indices.long(), 0)
    return products


def cosines(products: Tensor) -> Tensor:
    """cos θᵢⱼ of a Gram matrix [N, N]. A delta that is zero stands at a right angle to all, itself too."""
    norms = products.diagonal().sqrt()
    lengths = torch.outer(norms, norms)
    return torch.where(lengths > 0, products / lengths, torch.zeros_like(products))
