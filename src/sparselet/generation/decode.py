"""Greedy decoding of a batch with a preallocated cache, a shared prefix computed once, and rows that leave when they end.

The tokens are those of transformers' `generate` with its defaults; models and generation settings for which this is not
certain are left to `generate` (`can_decode`).
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sparselet.generation.padding import forward_parameters, pad_batch, position_ids, supports_prefix_cache, without_router_loss
from sparselet.models import prefill

COMPACT_BELOW = 0.75  # ended rows are removed from the batch when no more than this fraction continues
# Generation settings that do not change greedy decoding, or are read here.
_SUPPORTED_SETTINGS = {
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
    """One layer's keys and values, [rows, heads, length, size]: views of buffers of `capacity` tokens, so that a token is
    written behind the previous ones without copying them."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the tokens' keys and values; return all."""
        if not self.buffers:
            self.start(key_states[:, :, :0], value_states[:, :, :0], len(key_states))
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def start(self, keys: Tensor, values: Tensor, rows: int) -> None:
        """Begin with the same keys and values, [1 or rows, heads, length, size], in each of `rows` rows."""
        self.lazy_initialization(keys, values)
        self.buffers = [states.new_empty(rows, states.shape[1], self.capacity, states.shape[3]) for states in (keys, values)]
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, : states.shape[2]] = states
        self.keys, self.values = (buffer[:, :, : keys.shape[2]] for buffer in self.buffers)

    def keep(self, rows: Tensor) -> None:
        """Remove all rows but these."""
        assert self.keys is not None
        assert self.values is not None
        self.start(self.keys.index_select(0, rows), self.values.index_select(0, rows), len(rows))


def attends_sparsely(model: PreTrainedModel) -> bool:
    """Whether the model is within `sparse_attention`, where logits depend on padding: blocks and pages begin with a batch."""
    return model.config._attn_implementation == "sparselet"


def can_decode(model: PreTrainedModel) -> bool:
    """Whether `decode` gives the tokens of the model's own `generate`: a decoder with full attention in every layer, and
    generation settings without processors of logits. Not under `sparse_attention`, which may remember rows of the batch."""
    settings = model.generation_config
    if attends_sparsely(model):
        return False
    return settings is not None and set(settings.to_diff_dict()) <= _SUPPORTED_SETTINGS and supports_prefix_cache(model)


@torch.inference_mode()
def encode_prefix(model: PreTrainedModel, tokens: Sequence[int]) -> Cache | None:
    """The cache of a shared prefix, one row, for `decode`; None for no tokens."""
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
    forward: Any = partial(model, use_cache=True, logits_to_keep=1, **without_router_loss(forward_parameters(model)))
    padded = pad_batch([prompt[shared:] for prompt in prompts], pad_token, left=True)
    tokens, mask = (tensor.to(model.device) for tensor in padded)
    mask = torch.cat([mask.new_ones(len(mask), shared), mask], dim=1)
    positions = position_ids(mask)[:, shared:]
    end_tokens = torch.tensor(sorted(ends), dtype=torch.int64, device=model.device)
    cache, layers = _preallocated_cache(model, prefix, mask.shape[1] + max_new_tokens, len(prompts))
    answers: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts), device=model.device)  # the number of the prompt that each row of the batch answers
    unfinished = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    for _ in range(max_new_tokens):
        output = forward(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
        best = output.logits[:, -1].argmax(dim=-1)
        for row, token, continues in zip(rows.tolist(), best.tolist(), unfinished.tolist(), strict=True):
            if continues:
                answers[row].append(token)
        unfinished = unfinished & ~torch.isin(best, end_tokens)
        count = int(unfinished.sum())
        if not count:
            break
        if count <= COMPACT_BELOW * len(rows):
            kept = unfinished.nonzero().squeeze(1)
            for layer in layers:
                layer.keep(kept)
            rows, best, mask, positions, unfinished = (
                tensor.index_select(0, kept) for tensor in (rows, best, mask, positions, unfinished)
            )
        tokens, positions = best[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return answers


def _preallocated_cache(
    model: PreTrainedModel, prefix: Cache | None, capacity: int, rows: int
) -> tuple[Cache, list[PreallocatedCacheLayer]]:
    """A cache for `capacity` tokens of each row, which holds the prefix already, and its layers."""
    layers = [PreallocatedCacheLayer(capacity) for _ in DynamicCache(config=model.config).layers]
    if prefix is not None:
        for layer, source in zip(layers, prefix.layers, strict=True):
            assert isinstance(source, DynamicLayer)
            assert source.keys is not None
            assert source.values is not None
            layer.start(source.keys, source.values, rows)
    return Cache(layers=[*layers]), layers
