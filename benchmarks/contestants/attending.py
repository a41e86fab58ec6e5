"""One layer's attention: dense by PyTorch, and sparse by sparselet, with and without choosing the keys."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from contestants.models import DTYPES
from sparselet.attention import parse_pattern
from sparselet.attention.flex import attend_blocks
from sparselet.attention.keys import attend

HEADS, KEY_HEADS, SIZE = 9, 3, 64  # SmolLM2-135M's
CHECKED = 64  # queries whose attention is computed once more, under a mask written out


@functools.cache
def _states(length: int, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, heads, length, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    query, key, value = (torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype]) for shape in shapes)
    return query, key, value


def states(job: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values of `length` tokens, or the last one's query alone with `new`."""
    query, key, value = _states(job["length"], job["dtype"], job["device"])
    return query[:, :, -1:] if job["new"] else query, key, value


def dense_attention(job: dict[str, Any]) -> Callable[[], Any]:
    query, key, value = states(job)

    def start() -> None:
        with torch.inference_mode():
            scaled_dot_product_attention(query, key, value, is_causal=not job["new"], enable_gqa=True)

    return start


def sparse_attention(job: dict[str, Any]) -> Callable[[], Any]:
    """choosing: with the choice of keys, which for a new token has what earlier tokens left in memory.

    compiled: by flex_attention.
    """
    choose, attending = _steps(job)
    seen = choose()

    def start() -> None:
        with torch.inference_mode():
            attending(choose() if job["choosing"] else seen)

    return start


def same_attention(job: dict[str, Any]) -> Callable[[], Any]:
    """The shares of dense attention's pairs that are used and computed, and the largest difference from a mask written out."""
    query, key, value = states(job)
    choose, attending = _steps(job)
    with torch.inference_mode():
        seen = choose()
        output, used, computed = attending(seen)
    length, block = key.shape[2], 1 if job["new"] else _pattern(job).block
    positions = torch.arange(length, device=key.device)[-query.shape[2] :]
    by_query = seen.repeat_interleave(block, dim=2)[:, :, : query.shape[2]][:, :, -CHECKED:]
    mask = by_query & (torch.arange(length, device=key.device) <= positions[-CHECKED:, None])
    mask = mask.repeat_interleave(HEADS // KEY_HEADS, dim=1)
    expected = scaled_dot_product_attention(query[:, :, -CHECKED:], key, value, mask, enable_gqa=True)
    difference = float((output[:, :, -CHECKED:] - expected).abs().max())
    dense = HEADS * int((positions + 1).sum())
    return lambda: {"density": used / dense, "computed": computed / dense, "difference": difference}


def _pattern(job: dict[str, Any]) -> Any:
    return parse_pattern(job["pattern"])


def _steps(job: dict[str, Any]) -> tuple[Callable[[], Tensor], Callable[[Tensor], Any]]:
    """What chooses the table of keys, and what attends by it."""
    query, key, value = states(job)
    pattern, memory = _pattern(job), {}
    with torch.inference_mode():
        if job["new"] and pattern.observe is not None:
            prompt = _states(job["length"], job["dtype"], job["device"])[0][:, :, :-1]
            pattern.bound(pattern.observe)(prompt, key[:, :, :-1], None, memory)
        elif job["new"]:
            pattern.bound(pattern.decode)(query, key[:, :, :-1], None, memory)

    def choose() -> Tensor:
        if not job["new"]:
            return pattern.bound(pattern.prefill)(query, key, None)
        return pattern.bound(pattern.decode)(query, key, None, dict(memory))

    def attending(seen: Tensor) -> Any:
        how = attend_blocks if job.get("compiled") else attend
        return how(query, key, value, seen, 1 if job["new"] else pattern.block, None, 1 / math.sqrt(SIZE))

    return choose, attending
