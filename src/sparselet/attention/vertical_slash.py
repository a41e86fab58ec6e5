"""Vertical-slash: columns and diagonals that the last queries attend to (MInference, Jiang et al. 2024)."""

import torch
from torch import Tensor

from sparselet.attention.keys import dense_weights, group_sum, query_positions

LAST = 64  # queries whose attention is computed in full to choose by


def vertical_slash(query: Tensor, key: Tensor, mask: Tensor | None, block: int, vertical: int, slash: int) -> Tensor:
    """All queries see the `vertical` keys, and the `slash` distances, that have most of the last 64 queries' attention.

    The distance 0 always is among them. A block sees what any of its queries would: more than the published kernel where
    diagonals begin or end within a block. Published: 512 and 512.
    """
    weights = group_sum(dense_weights(query, key, mask, LAST), key.shape[1])  # [batch, key heads, rows, keys]
    rows, keys = weights.shape[2:]
    columns = weights.sum(2).topk(min(vertical, keys), dim=-1).indices
    places = torch.arange(keys, device=key.device)
    positions = query_positions(query, key)
    distances = (positions[-rows:, None] - places).clamp(min=0)
    by_distance = weights.new_zeros(*weights.shape[:2], keys)
    by_distance.scatter_add_(2, distances.flatten().expand(*weights.shape[:2], -1), weights.flatten(2))
    by_distance[..., 0] = torch.inf
    kept = torch.zeros_like(by_distance, dtype=torch.bool)
    kept.scatter_(2, by_distance.topk(min(slash, keys), dim=-1).indices, True)
    # A block at positions p … p + block − 1 sees key j if one of the distances p − j … p − j + block − 1 is kept.
    total = torch.cat([kept.new_zeros(*kept.shape[:2], 1, dtype=torch.int32), kept.int().cumsum(-1)], dim=-1)
    nearest = positions[::block, None] - places
    low, high = nearest.clamp(0, keys), (nearest + block).clamp(0, keys)
    seen = total[..., high] - total[..., low] > 0
    vertical_row = torch.zeros_like(by_distance, dtype=torch.bool).scatter_(2, columns, True)
    return seen | vertical_row[:, :, None]
