"""The prefix that all prompts of a batch share, such as a chat template's opening and an instruction, computed once.

Loss and gradients equal those of the full rows: keys and values of the prefix depend on no later token, and their gradients
are summed over the rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from sparselet.generation.padding import supports_prefix_cache
from sparselet.models import prefill

PREFIX_KEY = "shared_prefix"  # key of a batch: the prefix's token ids [1, length]


def shared_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """The longest prefix of all prompts that leaves at least one token of each."""
    first, last = min(prompts), max(prompts)
    limit = max(0, min(len(prompt) for prompt in prompts) - 1)
    length = next((i for i in range(limit) if first[i] != last[i]), limit)
    return first[:length]


def can_share_prefix(model: Any) -> bool:
    """Whether rows can be trained from a shared prefix: `supports_prefix_cache`, and no dropout, which would drop the same
    entries of the prefix in all rows."""
    config = model.config.to_dict()  # rates of summary and classification heads do not apply
    rates = [config[key] for key in config if "drop" in key and not key.startswith(("summary", "classifier"))]
    rates += [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return not any(isinstance(rate, float) and rate for rate in rates) and supports_prefix_cache(model)


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the model for a batch; a shared prefix becomes a cache of keys and values."""
    inputs = {key: value for key, value in batch.items() if key != PREFIX_KEY}
    if PREFIX_KEY not in batch:
        return inputs
    cache = prefill(model, batch[PREFIX_KEY])
    cache.batch_repeat_interleave(len(batch["input_ids"]))
    return {**inputs, "past_key_values": cache, "use_cache": True}


def batch_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The mean loss of a batch's target tokens."""
    inputs = model_inputs(model, {key: value for key, value in batch.items() if key != "labels"})
    return token_loss(model.config.is_encoder_decoder, model(**inputs), batch["labels"])


def token_loss(encoder_decoder: bool, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """The cross-entropy of the target's tokens, in float32: their sum over `num_items_in_batch`, by default their mean.

    A model's own loss may add terms, such as a router's, which depends on the rest of the batch, or count other tokens.
    outputs: of a model, with `logits` [batch, length, vocabulary]. labels: [batch, length]; a causal model's are not shifted.
    """
    loss = ForMaskedLMLoss if encoder_decoder else ForCausalLMLoss
    return loss(outputs.logits, labels, outputs.logits.shape[-1], num_items_in_batch=num_items_in_batch)
