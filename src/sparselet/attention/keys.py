"""Which keys each block of queries sees, and attention at these keys alone.

A pattern gives a table `seen`, bool [batch, key heads, blocks of queries, keys]. Query heads of one group share the row of
their key head. Queries are the last ones of the keys: query i of q stands at position k − q + i of k keys. Causality and
padding apply on top of the table, whatever it says.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def query_positions(query: Tensor, key: Tensor) -> Tensor:
    """The position of each query among the keys, int [queries]. query, key: [batch, heads, length, size]."""
    return torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device)


def may_see(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """The pairs that dense attention has, bool [batch or 1, 1, queries, keys]: `mask`, or all keys up to the query."""
    if mask is not None:
        return mask
    positions = query_positions(query, key)
    return (torch.arange(key.shape[2], device=key.device) <= positions[:, None])[None, None]


def real_keys(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """The keys that are not padding, bool [batch, keys]: those that the last query may see."""
    return may_see(query, key, mask)[:, 0, -1].expand(len(key), -1)


def group_sum(scores: Tensor, key_heads: int) -> Tensor:
    """Scores [batch, query heads, …] added up over the query heads of each key head: [batch, key heads, …]."""
    return scores.unflatten(1, (key_heads, -1)).sum(2)


def dense_weights(query: Tensor, key: Tensor, mask: Tensor | None, rows: int) -> Tensor:
    """The attention weights of the last `rows` queries, float32 [batch, query heads, rows, keys]."""
    last = query[:, :, -rows:]
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (last.float() @ keys.float().transpose(2, 3)) / math.sqrt(query.shape[3])
    return scores.masked_fill(~may_see(query, key, mask)[:, :, -rows:], -math.inf).softmax(-1).nan_to_num()


def attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, block: int, mask: Tensor | None, scaling: float | None
) -> tuple[Tensor, int, int]:
    """softmax(QKᵀ · scaling) V over the pairs that are in the table and that dense attention has.

    query [batch, query heads, queries, size], key and value [batch, key heads, keys, size]. Keys are gathered for each block of
    queries, so the cost is that of the longest row of the table in each block. A query that sees no key gets 0.
    Returns the output, of query's shape, with the number of pairs that were used and of those that were computed, both over
    all query heads.
    """
    heads, key_heads = query.shape[1], key.shape[1]
    pairs = may_see(query, key, mask).expand(len(query), 1, -1, -1)
    output, used, computed = torch.empty_like(query), 0, 0
    for i in range(seen.shape[2]):
        rows = slice(i * block, (i + 1) * block)
        table = seen[:, :, i] & pairs[:, :, rows].any(dim=2)
        count = max(1, int(table.sum(-1).max()))
        keys = table.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values
        at = keys[..., None].expand(-1, -1, -1, key.shape[3])
        within = pairs[:, :, rows].expand(-1, key_heads, -1, -1)
        visible = within.gather(3, keys[:, :, None].expand(-1, -1, within.shape[2], -1)) & table.gather(2, keys)[:, :, None]
        visible = visible.repeat_interleave(heads // key_heads, dim=1)
        gathered = (key.gather(2, at), value.gather(2, at))
        part = F.scaled_dot_product_attention(query[:, :, rows], *gathered, visible, scale=scaling, enable_gqa=True)
        output[:, :, rows] = part.masked_fill(~visible.any(-1, keepdim=True), 0)
        used += int(visible.sum())
        computed += visible.numel()
    return output, used, computed
