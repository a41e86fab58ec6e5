"""The beginning that all prompts of a batch share, such as a chat template's and the task's instruction, computed once.

Loss and gradients are those of the whole rows: the keys and values of the beginning depend on nothing that follows, and
their gradients are summed over the rows.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from sparselet.generation.padding import continues
from sparselet.models import prefill

SHARED = "shared_prefix"  # in a batch: the beginning's token ids [1, length]


def can_share(model: Any) -> bool:
    """Whether rows can go on from a common beginning: a decoder that attends to all that went before, without dropout.

    With dropout the rows would drop the same of the beginning.
    """
    settings = model.config.to_dict()  # of functions; a rate of classification heads is none of this model
    rates = [settings[key] for key in settings if "drop" in key and not key.startswith(("summary", "classifier"))]
    rates += [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return not any(isinstance(rate, float) and rate for rate in rates) and continues(model)


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as the model takes it: where it has a shared beginning, with that as a cache of keys and values."""
    rest = {key: value for key, value in batch.items() if key != SHARED}
    if SHARED not in batch:
        return rest
    cache = prefill(model, batch[SHARED])
    cache.batch_repeat_interleave(len(batch["input_ids"]))
    return {**rest, "past_key_values": cache, "use_cache": True}


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The mean loss of a batch's target tokens."""
    model_: Any = model
    inputs = model_inputs(model, {key: value for key, value in batch.items() if key != "labels"})
    return token_loss(model_.config.is_encoder_decoder, model_(**inputs), batch["labels"])


def token_loss(encoder_decoder: bool, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """The cross-entropy of the target's tokens, in float32: their sum over `num_items_in_batch`, by default their mean.

    A model's own loss may hold more, such as a router's, which depends on what else is in the batch, or count otherwise.
    outputs: of a model, with `logits` [batch, length, vocabulary]. labels: [batch, length], a causal model's not yet shifted.
    """
    loss = ForMaskedLMLoss if encoder_decoder else ForCausalLMLoss
    return loss(outputs.logits, labels, outputs.logits.shape[-1], num_items_in_batch=num_items_in_batch)
