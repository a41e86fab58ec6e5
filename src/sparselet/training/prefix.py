"""The beginning that all prompts of a batch share, such as a chat template's and the task's instruction, computed once.

Loss and gradients are those of the whole rows: the keys and values of the beginning depend on nothing that follows, and
their gradients are summed over the rows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparselet.models import attends_to_all, cache_of

SHARED = "shared_prefix"  # in a batch: the beginning's token ids [1, length]


def can_share(model: Any) -> bool:
    """Whether rows can go on from a common beginning: a decoder that attends to all that went before, without dropout.

    With dropout the rows would drop the same of the beginning.
    """
    settings = model.config.to_dict()  # of functions; a rate of classification heads is none of this model
    rates = [settings[key] for key in settings if "drop" in key and not key.startswith(("summary", "classifier"))]
    rates += [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return attends_to_all(model) and not any(isinstance(rate, float) and rate for rate in rates)


def begun(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as the model takes it: where it has a shared beginning, with that as a cache of keys and values."""
    rest = {key: value for key, value in batch.items() if key != SHARED}
    if SHARED not in batch:
        return rest
    cache = cache_of(model, batch[SHARED])
    cache.batch_repeat_interleave(len(batch["input_ids"]))
    return {**rest, "past_key_values": cache, "use_cache": True}


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's own loss of a batch."""
    loss = model(**begun(model, batch)).loss
    assert isinstance(loss, torch.Tensor)
    return loss
