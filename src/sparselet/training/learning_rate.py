"""The learning rate: a rule for the default, and a search over short runs."""

import logging
import math
from collections.abc import Callable
from typing import Any

from sparselet.errors import TrainingDiverged
from sparselet.model_config import optional_field

logger = logging.getLogger("sparselet")

WIDTH = 576  # of the model that the rule was fitted on
RATE_AT_WIDTH = {"sparse": 3e-3, "shira": 3e-3, "super-tuning": 3e-3, "lora": 2e-3}  # others train weights themselves
RATE_AT_WIDTH["fast-slow"] = 1e-3  # a third of sparse's: a policy gradient is noisier; not from a grid
FACTOR = 2.0  # between the rates that a search tries
TRIES = 7


def default_learning_rate(method: str, model_config: Any) -> float:
    """The peak learning rate that a method takes by default: `rate · 576 / hidden size`.

    rate: the best of a grid by validation loss (docs/results.md, "Recipes"), of SmolLM2-135M, whose hidden size is 576. The
    inverse proportion is that of Yang et al. 2022 for AdamW; it gives about the rates published for models of 3 to 8 billion
    weights (NeuroAda 7e-4, SHiRA 3e-4, LoRA 1e-4 to 3e-4, full fine-tuning 1e-5 to 5e-5).
    """
    rate = RATE_AT_WIDTH.get(method, 2e-4)
    width = optional_field(model_config.get_text_config(), "hidden_size") or WIDTH
    return rate * WIDTH / width


def search_learning_rate(start: float, loss_at: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The rate of the lowest loss, by steps of a factor of 2 from `start` for as long as the loss falls; and all losses.

    loss_at: the validation loss of a short run at a rate; a run that diverges counts as infinite. At most `TRIES` runs.
    Raises TrainingDiverged if all of them diverge.
    """
    losses: dict[float, float] = {}

    def loss(rate: float) -> float:
        if rate not in losses:
            try:
                losses[rate] = loss_at(rate)
            except TrainingDiverged:
                losses[rate] = math.inf
            logger.info("learning rate %.2g: validation loss %.4f in a short run.", rate, losses[rate])
        return losses[rate]

    factor = FACTOR if loss(start * FACTOR) < loss(start) else 1 / FACTOR
    best = start * FACTOR if factor > 1 else start
    while len(losses) < TRIES and (loss(best * factor) < loss(best) or math.isinf(loss(best))):
        best *= factor
    if math.isinf(losses[best]):
        raise TrainingDiverged(f"the loss diverges at every learning rate down to {min(losses):.2g}; look at the rows.")
    return best, losses
