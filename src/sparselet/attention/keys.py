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
    if mask is None:
        return torch.ones(len(key), key.shape[2], dtype=torch.bool, device=key.device)
    return mask[:, 0, -1].expand(len(key), -1)


def count_pairs(query: Tensor, key: Tensor, mask: Tensor | None) -> int:
    """The number of pairs that dense attention has, over the rows of a batch and the query heads."""
    pairs = int((query_positions(query, key) + 1).sum()) if mask is None else int(mask.sum())
    return pairs * (len(query) // (1 if mask is None else len(mask))) * query.shape[1]


def group_sum(scores: Tensor, key_heads: int) -> Tensor:
    """Scores [batch, query heads, …] added up over the query heads of each key head: [batch, key heads, …]."""
    return scores.unflatten(1, (key_heads, -1)).sum(2)


def dense_weights(query: Tensor, key: Tensor, mask: Tensor | None, rows: int) -> Tensor:
    """The attention weights of the last `rows` queries, float32 [batch, query heads, rows, keys]."""
    last = query[:, :, -rows:]
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (last.float() @ keys.float().transpose(2, 3)) / math.sqrt(query.shape[3])
    visible = may_see(last, key, None if mask is None else mask[:, :, -rows:])
    return scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num()


def attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, block: int, mask: Tensor | None, scaling: float | None
) -> tuple[Tensor, int, int]:
    """softmax(QKᵀ · scaling) V over the pairs that are in the table and that dense attention has.

    query [batch, query heads, queries, size], key and value [batch, key heads, keys, size]. Keys are gathered for each block of
    queries, so the cost is that of the longest row of the table in each block. A query that sees no key gets 0.
    Returns the output, of query's shape, with the number of pairs that were used and of those that were computed, both over
    all query heads.
    """
    key_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    positions, places = query_positions(query, key), torch.arange(key.shape[2], device=key.device)
    output, used, computed = torch.empty_like(query), 0, 0
    for i in range(seen.shape[2]):
        rows = slice(i * block, (i + 1) * block)
        table = seen[:, :, i] & ((places <= positions[rows][-1]) if mask is None else mask[:, :, rows].any(dim=2))
        at, kept = _kept_keys(table)
        if mask is None:
            visible = kept[:, :, None] & (at[:, :, None] <= positions[rows, None])
        else:
            within = mask[:, :, rows].expand(len(query), key_heads, -1, -1)
            visible = kept[:, :, None] & within.gather(3, at[:, :, None].expand(-1, -1, within.shape[2], -1))
        shared = [states.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for states in (_select(key, at), _select(value, at))]
        counts, queries = visible.sum(-1), query[:, :, rows].unflatten(1, (key_heads, group)).flatten(0, 1)
        all_visible = int(counts.sum()) == visible.numel()
        within_rows = None if all_visible else visible.flatten(0, 1)[:, None]
        part = F.scaled_dot_product_attention(queries, *shared, within_rows, scale=scaling)
        part = part if all_visible else part.masked_fill(counts.flatten(0, 1)[:, None, :, None] == 0, 0)
        output[:, :, rows] = part.unflatten(0, (len(query), key_heads)).flatten(1, 2)
        used += group * int(counts.sum())
        computed += group * visible.numel()
    return output, used, computed


def _kept_keys(table: Tensor) -> tuple[Tensor, Tensor]:
    """Where a table [batch, key heads, keys] is true, int [batch, key heads, most of all], and which of these are so: rows with
    fewer are filled up with keys that they do not keep."""
    counts = table.sum(-1)
    most = max(1, int(counts.max()))
    if int(counts.min()) == most:
        at = table.nonzero()[:, 2].view(*table.shape[:2], most)
        return at, torch.ones_like(at, dtype=torch.bool)
    at = table.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :most]
    return at, torch.arange(most, device=table.device) < counts[..., None]


def _select(states: Tensor, at: Tensor) -> Tensor:
    """Rows of states [batch, heads, length, size] at places [batch, heads, count], copied whole, without a copy of the others.

    `Tensor.gather` copies number by number, which takes about ten times as long.
    """
    size = states.shape[3]
    if states.stride(3) != 1 or any(stride % size for stride in states.stride()[:3]):
        states = states.contiguous()
    steps = [stride // size for stride in states.stride()[:3]]
    firsts = [torch.arange(n, device=at.device) * step for n, step in zip(states.shape[:2], steps, strict=False)]
    index = firsts[0][:, None, None] + firsts[1][:, None] + at * steps[2]
    rows = 1 + sum((n - 1) * step for n, step in zip(states.shape[:3], steps, strict=True))
    flat = states.as_strided((rows, size), (size, 1))
    return flat.index_select(0, index.flatten()).view(*at.shape, size)
