"""Block-sparse attention: the blocks of keys that a block of queries scores highest (as in The Sparse Frontier, 2025)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselet.attention.keys import group_sum, query_positions, real_keys


def block_topk(query: Tensor, key: Tensor, mask: Tensor | None, block: int, top: int) -> Tensor:
    """Each block of `block` queries sees `top` blocks of keys: the first, its own, and those of the highest q̄·k̄.

    q̄ and k̄ are means over a block; the softmax of a query head's scores is added up over the heads of a group. Published:
    blocks of 16, top 64.
    """
    real = real_keys(query, key, mask)
    keys, weight = key * real[:, None, :, None], real.float()
    short = -key.shape[2] % block
    counts = F.pad(weight, (0, short)).unflatten(1, (-1, block)).sum(-1)
    means = F.pad(keys, (0, 0, 0, short)).unflatten(2, (-1, block)).sum(3) / counts.clamp(min=1)[:, None, :, None]
    left = -query.shape[2] % block
    queries = F.pad(query, (0, 0, 0, left)).unflatten(2, (-1, block)).mean(3)
    scores = queries.float() @ means.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float().transpose(2, 3)
    last = (query_positions(query, key)[0] + block * torch.arange(1, queries.shape[2] + 1, device=key.device) - 1).clamp(
        max=key.shape[2] - 1
    )
    starts = torch.arange(means.shape[2], device=key.device) * block
    reachable = (starts <= last[:, None]) & (counts > 0)[:, None]
    scores = (scores / math.sqrt(query.shape[3])).masked_fill(~reachable[:, None], -math.inf).softmax(-1).nan_to_num()
    scores = group_sum(scores, key.shape[1])
    own = (starts <= last[:, None]) & (starts + block > last[:, None] - block + 1)
    first = (counts > 0).cumsum(-1).eq(1) & (counts > 0)
    scores = scores + 1e3 * (own[None] | first[:, None])[:, None].float()
    best = scores.topk(min(top, scores.shape[-1]), dim=-1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & reachable[:, None]
    return chosen.repeat_interleave(block, dim=-1)[..., : key.shape[2]]
