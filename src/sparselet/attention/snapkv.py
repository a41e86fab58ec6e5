"""SnapKV: of the prompt, the keys that its last queries attend to (Li et al. 2024)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselet.attention.keys import dense_weights, group_sum
from sparselet.errors import ArgumentError


def observe(
    query: Tensor, key: Tensor, mask: Tensor | None, memory: dict[str, Any], budget: int, window: int, pool: int
) -> None:
    """Choose from a prompt's attention: the last `window` keys, and those with most of the attention of its last queries.

    Votes are smoothed by an average over `pool` neighbours. Published: window 32, pooling 7.
    """
    votes = group_sum(dense_weights(query, key, mask, window), key.shape[1]).sum(2)
    votes = F.avg_pool1d(votes, pool, stride=1, padding=pool // 2)[..., : key.shape[2]]
    votes[..., -window:] = torch.inf
    chosen = torch.zeros_like(votes, dtype=torch.bool)
    memory["prompt"] = chosen.scatter_(2, votes.topk(min(budget, key.shape[2]), dim=-1).indices, True)


def snapkv(
    query: Tensor, key: Tensor, mask: Tensor | None, memory: dict[str, Any], budget: int, window: int, pool: int
) -> Tensor:
    """A new token sees what was chosen of the prompt, and all tokens after it. Raises ArgumentError without a prompt."""
    chosen = memory.get("prompt")
    if chosen is None or len(chosen) != len(key) or chosen.shape[2] >= key.shape[2]:
        raise ArgumentError("snapkv: the prompt of these rows was not computed by this pattern, or rows have left the batch.")
    answer = chosen.new_ones(*chosen.shape[:2], key.shape[2] - chosen.shape[2])
    return torch.cat([chosen, answer], dim=2).unsqueeze(2)
