"""PATTERNS: all that is known of each attention pattern, in one record; and patterns as text."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from sparselet.attention.block_topk import block_topk
from sparselet.attention.quest import quest
from sparselet.attention.sink_window import sink_window
from sparselet.attention.snapkv import observe, snapkv
from sparselet.attention.vertical_slash import vertical_slash
from sparselet.errors import ArgumentError


@dataclass(frozen=True)
class AttentionPattern:
    """A pattern with its parameters.

    prefill, decode: from query, key and mask (decode: and a layer's memory) to the table of `keys.attend`, for a prompt and for
        one new token; None: dense.
    observe: is called with a prompt's query, key, mask and memory, for a decode that chooses from it.
    parameters: counts, all at least 1; `block` is the number of queries of a row of the table.
    keeps_all: from the parameters, how many keys a prompt or a new token may have so that each query sees all of them.
    source: where it was published.
    """

    name: str
    source: str
    parameters: Mapping[str, int]
    keeps_all: Callable[[Mapping[str, int]], int]
    prefill: Callable[..., Tensor] | None = None
    decode: Callable[..., Tensor] | None = None
    observe: Callable[..., None] | None = None

    @property
    def block(self) -> int:
        """Queries that share a row of the table in a prompt."""
        return self.parameters.get("block", 1)

    def with_parameters(self, parameters: Mapping[str, int]) -> "AttentionPattern":
        """The same pattern with some parameters changed. Raises ArgumentError for an unknown or impossible one."""
        for name, value in parameters.items():
            if name not in self.parameters:
                raise ArgumentError(f"attention pattern {self.name} has no {name}; it has {', '.join(self.parameters)}.")
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"attention: {name} must be a whole number of at least 1, got {value!r}.")
        return replace(self, parameters={**self.parameters, **parameters})

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """One of its functions, with the parameters."""
        return partial(function, **self.parameters)


def _decode_sink_window(
    query: Tensor, key: Tensor, mask: Tensor | None, memory: object, block: int, sink: int, window: int
) -> Tensor:
    return sink_window(query, key, mask, 1, sink, window)


PATTERNS = {
    pattern.name: pattern
    for pattern in (
        AttentionPattern(
            "window",
            "Xiao et al. 2024 (StreamingLLM)",
            {"block": 64, "sink": 4, "window": 1024},
            lambda own: own["sink"] + own["window"],
            sink_window,
            _decode_sink_window,
        ),
        AttentionPattern(
            "block",
            "Nawrot et al. 2025 (The Sparse Frontier)",
            {"block": 16, "top": 64},
            lambda own: own["block"] * own["top"],
            block_topk,
        ),
        AttentionPattern(
            "vertical-slash",
            "Jiang et al. 2024 (MInference)",
            {"block": 64, "vertical": 512, "slash": 512},
            lambda own: max(own["vertical"], own["slash"]),
            vertical_slash,
        ),
        AttentionPattern(
            "quest",
            "Tang et al. 2024",
            {"page": 16, "budget": 1024},
            lambda own: own["budget"] // own["page"] * own["page"],
            decode=quest,
        ),
        AttentionPattern(
            "snapkv",
            "Li et al. 2024",
            {"budget": 1024, "window": 32, "pool": 7},
            lambda own: own["budget"],
            decode=snapkv,
            observe=observe,
        ),
    )
}


def parse_pattern(text: str) -> AttentionPattern:
    """A pattern from text: `quest`, or `block:top=32,block=16`. Raises ArgumentError."""
    name, _, rest = text.partition(":")
    if name not in PATTERNS:
        raise ArgumentError(f"attention must be one of {', '.join(PATTERNS)}, got {name!r}.")
    settings = [part for part in rest.split(",") if part]
    if not all(re.fullmatch(r"[a-z]+=\d{1,9}", part) for part in settings):
        raise ArgumentError(f"attention: expected {name}:name=number,…, got {text!r}.")
    return PATTERNS[name].with_parameters({key: int(value) for key, _, value in (part.partition("=") for part in settings)})
