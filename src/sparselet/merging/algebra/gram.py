"""Inner products of and angles between deltas, without stacking them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparselet.delta import SparseDelta
from sparselet.merging.algebra.entries import common_blocks, compact
from sparselet.merging.algebra.sums import fixed_order_sum


def gram(deltas: Sequence[SparseDelta]) -> Tensor:
    """Gᵢⱼ = ⟨ΔWᵢ, ΔWⱼ⟩, float64 [N, N]: sums over the shared entries of products, which float64 holds exactly.

    Each delta in turn is expanded over all blocks, and gathered at the masks of the deltas before it. Raises ShapeMismatch.
    """
    deltas, _ = compact(common_blocks(deltas))
    first = deltas[0].values
    products = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    dense = torch.zeros(deltas[0].blocks, *first.shape[1:], device=first.device)
    for i, delta in enumerate(deltas):
        dense.index_copy_(0, delta.indices.long(), delta.values.float())
        for j, previous in enumerate(deltas[: i + 1]):
            shared = dense.index_select(0, previous.indices).double().mul_(previous.values.float())
            products[i, j] = products[j, i] = fixed_order_sum(shared)
        dense.index_fill_(0, delta.indices.long(), 0)
    return products


def cosines(products: Tensor) -> Tensor:
    """cos θᵢⱼ of a Gram matrix [N, N]. A zero delta has cosine 0 with all, also with itself."""
    norms = products.diagonal().sqrt()
    lengths = torch.outer(norms, norms)
    return torch.where(lengths > 0, products / lengths, torch.zeros_like(products))
