"""Quest: the pages of keys whose bounds promise the highest score to a new token (Tang et al. 2024)."""

from typing import Any

import torch
from torch import Tensor

from sparselet.attention.keys import group_sum, real_keys


def quest(query: Tensor, key: Tensor, mask: Tensor | None, memory: dict[str, Any], page: int, budget: int) -> Tensor:
    """A new token sees `budget / page` pages: the last, and those of the largest Σ_d max(q_d · min_d, q_d · max_d).

    min and max are over a page's keys. The bound is max(q, 0) · max + min(q, 0) · min, added up over the query heads of a
    group. memory: keeps the bounds of full pages, so that a step reads one page's keys. Published: pages of 16, budget 1024.
    """
    low, high = _bounds(key, memory, page)
    above, below = (group_sum(part, key.shape[1]) for part in (query.float().clamp(min=0), query.float().clamp(max=0)))
    scores = (above @ high.float().transpose(2, 3) + below @ low.float().transpose(2, 3))[:, :, 0]  # [batch, key heads, pages]
    starts = torch.arange(scores.shape[-1], device=key.device) * page
    real = real_keys(query, key, mask)
    full = torch.nn.functional.pad(real, (0, -key.shape[2] % page)).unflatten(1, (-1, page)).any(-1)
    scores = scores.masked_fill(~full[:, None], -torch.inf)
    scores[..., -1] = torch.inf
    best = scores.topk(min(max(1, budget // page), len(starts)), dim=-1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return chosen.repeat_interleave(page, dim=-1)[..., : key.shape[2]].unsqueeze(2)


def _bounds(key: Tensor, memory: dict[str, Any], page: int) -> tuple[Tensor, Tensor]:
    """The least and largest keys of each page, [batch, key heads, pages, size]; the last page may not be full."""
    full = key.shape[2] // page
    bounds = memory.get("bounds")
    if bounds is None or bounds[0].shape[0] != len(key) or bounds[0].shape[2] > full or memory["length"] != key.shape[2] - 1:
        bounds = (key[:, :, :0], key[:, :, :0])
    first_missing = bounds[0].shape[2]
    pages = key[:, :, first_missing * page : full * page].unflatten(2, (-1, page)) if full > first_missing else None
    if pages is not None:
        bounds = (torch.cat([bounds[0], pages.amin(3)], dim=2), torch.cat([bounds[1], pages.amax(3)], dim=2))
    memory["bounds"], memory["length"] = bounds, key.shape[2]
    rest = key[:, :, full * page :]
    if not rest.shape[2]:
        return bounds
    return torch.cat([bounds[0], rest.amin(2, keepdim=True)], 2), torch.cat([bounds[1], rest.amax(2, keepdim=True)], 2)
