"""`Reward`: a metric of one answer at a time, as training by reward takes it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparselet.errors import ConfigError
from sparselet.evaluation.metrics import METRICS, Metric, choose_metrics


@dataclass(frozen=True)
class Reward:
    """The reward of each answer: `scale` times the metric of it alone. Those of METRICS go from 0 to 1."""

    name: str
    metric: Metric
    scale: float = 1.0

    def __call__(self, answers: Sequence[str], targets: Sequence[str]) -> list[float]:
        """As many rewards as answers. Raises ConfigError where the metric raises or gives anything but a finite number."""
        rewards = []
        for answer, target in zip(answers, targets, strict=True):
            where = f"the answer {answer!r:.60} to a row with the target {target!r:.60}"
            try:
                rewards.append(self.scale * float(self.metric([answer], [target])))
            except Exception as error:  # of a function that a user wrote
                raise ConfigError(f"reward {self.name} fails on {where}: {type(error).__name__}: {error}") from error
            if not math.isfinite(rewards[-1]):
                raise ConfigError(f"reward {self.name} is {rewards[-1]} for {where}; expected a finite number.")
        return rewards


def choose_reward(reward: str | Metric) -> Reward:
    """The reward by the name of a metric, `module:function` of an importable module, or a function of answers and targets.

    Raises ConfigError for a name that is unknown and a module that cannot be imported.
    """
    ((name, metric),) = choose_metrics([reward], "reward").items()
    return Reward(name, metric, 0.01 if metric in METRICS.values() else 1.0)
