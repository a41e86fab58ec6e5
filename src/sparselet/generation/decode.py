"""Greedy decoding of many rows: a cache that is not copied from token to token, rows that leave when they end, and the
beginning that all prompts share computed once.

The tokens are those of transformers' `generate` with its defaults; models and generation settings for which that is not
certain are left to it (`can_decode`).
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sparselet.generation.padding import continues, forward_parameters, without_router_loss
from sparselet.generation.prompts import pad
from sparselet.models import prefill

LEAVE = 0.75  # the batch is made smaller when no more than this fraction of its rows goes on
# Generation settings that do not change what greedy decoding says, or are read here.
_PLAIN = {
    "_from_model_config",
    "bos_token_id",
    "cache_implementation",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "min_p",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "typical_p",
    "use_cache",
}


class PreallocatedCacheLayer(DynamicLayer):
    """One layer's keys and values, [rows, heads, length, size]: views of buffers that have room for `room` tokens, so that
    a token is written behind the others instead of all being copied."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the tokens' keys and values; return all."""
        if self.buffers is None:
            self.start(key_states[:, :, :0], value_states[:, :, :0], len(key_states))
        assert self.buffers is not None
        assert self.keys is not None
        before = self.keys.shape[-2]
        end = before + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, before:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def start(self, keys: Tensor, values: Tensor, rows: int) -> None:
        """Begin with the same keys and values, [1 or rows, heads, length, size], in each of `rows` rows."""
        self.lazy_initialization(keys, values)
        length = keys.shape[-2]
        made = [
            torch.empty(rows, t.shape[1], self.capacity, t.shape[3], dtype=t.dtype, device=t.device) for t in (keys, values)
        ]
        for buffer, states in zip(made, (keys, values), strict=True):
            buffer[:, :, :length] = states
        self.buffers = (made[0], made[1])
        self.keys, self.values = (buffer[:, :, :length] for buffer in made)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        assert self.keys is not None
        assert self.values is not None
        self.start(self.keys.index_select(0, rows), self.values.index_select(0, rows), len(rows))


def can_decode(model: PreTrainedModel) -> bool:
    """Whether `decode` says what the model's own `generate` would: a decoder with full attention in every layer, and
    generation settings without processors of logits."""
    settings = model.generation_config
    return settings is not None and set(settings.to_diff_dict()) <= _PLAIN and continues(model)


@torch.inference_mode()
def encode_prefix(model: PreTrainedModel, tokens: Sequence[int]) -> Cache | None:
    """The cache of a beginning, one row, for `decode`; None for no tokens."""
    return prefill(model, torch.tensor([tokens], device=model.device)) if tokens else None


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prefix: Cache | None,
    pad_token: int,
    ends: Collection[int],
    max_new_tokens: int,
    prompts: Sequence[Sequence[int]],
) -> list[list[int]]:
    """The greedy continuation of each prompt, up to and with one of the end tokens, at most `max_new_tokens`.

    prompts: one batch, as token ids; each begins with the tokens of `prefix` and has at least one more.
    """
    shared = 0 if prefix is None else prefix.get_seq_length()
    device = model.device
    forward: Any = partial(model, **without_router_loss(forward_parameters(model)))
    own = [list(prompt[shared:]) for prompt in prompts]
    tokens = torch.tensor(pad(own, pad_token, left=True), device=device)
    present = torch.tensor(pad([[1] * len(row) for row in own], 0, left=True), device=device)
    mask = torch.cat([present.new_ones(len(own), shared), present], dim=1)
    places = (mask.cumsum(1) - 1)[:, shared:].clamp_min(0)
    ending = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
    cache, layers = _begin(prefix, len(DynamicCache(config=model.config).layers), mask.shape[1] + max_new_tokens, len(own))
    answers: list[list[int]] = [[] for _ in own]
    rows = torch.arange(len(own), device=device)  # of the answers, in the batch that is left
    going = torch.ones(len(own), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        output = forward(
            input_ids=tokens, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        chosen = output.logits[:, -1].argmax(dim=-1)
        for row, token, goes in zip(rows.tolist(), chosen.tolist(), going.tolist(), strict=True):
            if goes:
                answers[row].append(token)
        going = going & ~torch.isin(chosen, ending)
        left = int(going.sum())
        if not left:
            break
        if left <= LEAVE * len(rows):
            stay = going.nonzero().squeeze(1)
            for layer in layers:
                layer.keep(stay)
            rows, chosen, mask, places, going = (t.index_select(0, stay) for t in (rows, chosen, mask, places, going))
        tokens, places = chosen[:, None], places[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return answers


def _begin(prefix: Cache | None, layers: int, capacity: int, rows: int) -> tuple[Cache, list[PreallocatedCacheLayer]]:
    """A cache with room for all tokens of a batch, which holds the prefix already, and its layers."""
    made = [PreallocatedCacheLayer(capacity) for _ in range(layers)]
    if prefix is not None:
        for layer, before in zip(made, prefix.layers, strict=True):
            assert isinstance(before, DynamicLayer)
            assert before.keys is not None
            assert before.values is not None
            layer.start(before.keys, before.values, rows)
    return Cache(layers=[*made]), made
