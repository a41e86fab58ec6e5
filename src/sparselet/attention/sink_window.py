"""Sink and window: the first tokens and the last ones (StreamingLLM, Xiao et al. 2024)."""

import torch
from torch import Tensor

from sparselet.attention.keys import query_positions, real_keys


def sink_window(query: Tensor, key: Tensor, mask: Tensor | None, block: int, sink: int, window: int) -> Tensor:
    """Each block of queries sees the first `sink` tokens of its row and the last `window` before each of its queries."""
    real = real_keys(query, key, mask)
    first = real & (real.cumsum(-1) <= sink)
    positions = query_positions(query, key)[::block]
    places = torch.arange(key.shape[2], device=key.device)
    recent = (places > positions[:, None] - window) & (places < positions[:, None] + block)
    return (first[:, None] | recent[None]).unsqueeze(1).expand(-1, key.shape[1], -1, -1)
