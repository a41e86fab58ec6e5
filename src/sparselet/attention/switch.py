"""`sparse_attention`: a model attends by a pattern within a block, through transformers' `AttentionInterface`."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparselet.attention.flex import COMPILED_ON, attend_blocks
from sparselet.attention.keys import attend, count_pairs
from sparselet.attention.patterns import AttentionPattern, parse_pattern
from sparselet.errors import ModelError
from sparselet.model_config import optional_field

IMPLEMENTATION = "sparselet"


@dataclass
class AttentionCounts:
    """Pairs of a query and a key, over all query heads and layers, in prompts and in new tokens.

    dense: those of dense attention. used: those that the pattern kept. computed: those whose score was computed, with what
    blocks and padding add. flops: 4 · head size · computed, of QKᵀ and of the product with V.
    """

    dense: int = 0
    used: int = 0
    computed: int = 0
    flops: int = 0

    @property
    def density(self) -> float:
        """The fraction of dense attention's pairs that was used."""
        return self.used / max(1, self.dense)


@dataclass
class SparseAttention:
    """The state of a block: what is counted, and what each layer remembers of its prompt."""

    pattern: AttentionPattern
    prefill: AttentionCounts = field(default_factory=AttentionCounts)
    decode: AttentionCounts = field(default_factory=AttentionCounts)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)

    @contextlib.contextmanager
    def remembering(self, memory: dict[int, dict[str, Any]]) -> Iterator[None]:
        """Within the block layers read and write this memory: that of other rows, which are decoded in turn with these."""
        before, self.memory = self.memory, memory
        try:
            yield
        finally:
            self.memory = before


_active: list[SparseAttention] = []


@contextlib.contextmanager
def sparse_attention(model: PreTrainedModel, pattern: str | AttentionPattern, **parameters: int) -> Iterator[SparseAttention]:
    """Within the block the model's self-attention is the pattern's; after it the model attends as before.

        with sparse_attention(model, "quest", budget=512) as attention:
            model.generate(**prompt)
        attention.decode.density

    A pattern acts on prompts, on new tokens, or on both; elsewhere attention is dense. Adapters, caches, left padding and
    grouped query heads work as with dense attention.
    Raises ModelError for a model that is no decoder, or has windows or chunks of its own; ArgumentError for an unknown pattern
    or parameter.
    """
    chosen = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    state = SparseAttention(chosen.with_parameters(parameters))
    _require_plain_decoder(model)
    before = model.config._attn_implementation
    AttentionInterface.register(IMPLEMENTATION, _forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    _active.append(state)
    try:
        yield state
    finally:
        _active.remove(state)
        model.set_attn_implementation(before or "eager")


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [batch, heads, queries, size], and keys and values of the key heads."""
    state, is_prompt = _active[-1], query.shape[2] > 1 or key.shape[2] == 1
    memory = state.memory.setdefault(int(optional_field(module, "layer_idx") or 0), {})
    if is_prompt:
        memory.clear()
    pattern, seen = state.pattern, None
    if is_prompt and pattern.observe is not None:
        pattern.bound(pattern.observe)(query, key, attention_mask, memory)
    if key.shape[2] <= pattern.keeps_all(pattern.parameters):
        pass  # dense attention is the same, and faster
    elif is_prompt and pattern.prefill is not None:
        seen = pattern.bound(pattern.prefill)(query, key, attention_mask)
    elif not is_prompt and pattern.decode is not None:
        seen = pattern.bound(pattern.decode)(query, key, attention_mask, memory)
    counts = state.prefill if is_prompt else state.decode
    dense = count_pairs(query, key, attention_mask)
    counts.dense += dense
    if seen is None:
        used, computed = dense, dense if attention_mask is None else query[..., 0].numel() * key.shape[2]
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    else:
        at = (query, key, value, seen, pattern.block if is_prompt else 1, attention_mask, scaling)
        compiled = attend_blocks(*at) if is_prompt and query.device.type in COMPILED_ON else None
        output, used, computed = compiled or attend(*at)
        output = output.transpose(1, 2).contiguous()
    counts.used += used
    counts.computed += computed
    counts.flops += 4 * query.shape[3] * computed
    return output, None


def _require_plain_decoder(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    windows = optional_field(config, "layer_types") or []
    sliding = optional_field(config, "sliding_window") if optional_field(config, "use_sliding_window") is not False else None
    if model.config.is_encoder_decoder or sliding or any(kind != "full_attention" for kind in windows):
        raise ModelError(
            f"sparse attention needs a decoder with full attention in every layer; {type(model).__name__} has windows, "
            "chunks or an encoder of its own."
        )
    if optional_field(config, "attn_logit_softcapping") is not None:
        raise ModelError(f"{type(model).__name__} caps its attention scores, which sparse attention does not.")
