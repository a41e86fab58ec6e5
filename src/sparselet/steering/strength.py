"""How strongly to steer: the strength at which the answers' distributions have moved by a bound of KL divergence."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparselet.errors import ConfigError
from sparselet.steering.switch import steered
from sparselet.steering.vector import SteeringVector

POSITIONS = 64  # tokens of an answer that are compared; later ones break where many steered ones are before them
_STEPS = 40  # of a search
_SMALL = 16  # part of the bound within which the divergence is taken for quadratic


@dataclass(frozen=True)
class Strength:
    """strength: γ. kl: what was measured there, in nats a token. curvature: c of KL ≈ ½γ²c near 0. closed: √(bound / c)."""

    strength: float
    kl: float
    curvature: float
    closed: float


def calibrate(kl: Callable[[float], float], bound: float, *, tolerance: float = 0.01) -> Strength:
    """The strength whose measured divergence is `bound`, within a part of it, by default 1 %.

    KL of a small step is quadratic, KL ≈ ½γ²c; c is measured at the largest γ = 2⁻ᵏ within a 16th of the bound. The search
    begins at γ = √(bound / c), which predicts half of the bound, doubles until it is reached, and bisects on measured KL.
    Raises ConfigError for a vector that does not move the answers.
    """
    low, measured = 1.0, kl(1.0)
    for _ in range(_STEPS):
        if measured <= bound / _SMALL:
            break
        low /= 2
        measured = kl(low)
    curvature = 2 * measured / low**2
    if not curvature > 0 or measured > bound / _SMALL:
        raise ConfigError("the steering vector does not move the model's answers; take other pairs, or another `layer`.")
    high = closed = math.sqrt(bound / curvature)
    low = 0.0
    for _ in range(_STEPS):
        measured = kl(high)
        if measured >= bound:
            break
        low, high = high, 2 * high
    if measured < bound:
        raise ConfigError(f"kl must be what the vector can reach; at strength {high:.3g} it is {measured:.3g}, not {bound:g}.")
    middle = high
    for _ in range(_STEPS):
        if abs(measured - bound) <= tolerance * bound:
            break
        middle = (low + high) / 2
        measured = kl(middle)
        low, high = (middle, high) if measured < bound else (low, middle)
    return Strength(middle, measured, curvature, closed)


class Divergence:
    """Mean KL(p₀ ‖ p_γ) of next-token distributions over the first positions of answers, in nats a token.

    rows: token ids, and the position from which the answer is steered: the last of its prompt. An answer is steered at all of
    its tokens, as when it is generated.
    """

    def __init__(self, model: PreTrainedModel, vector: SteeringVector, rows: Sequence[tuple[list[int], int]]) -> None:
        self.model, self.vector = model, vector
        self.rows = [(tokens[: start + POSITIONS], start) for tokens, start in rows]
        self.before = [_distributions(model, tokens, start) for tokens, start in self.rows]

    def __call__(self, strength: float) -> float:
        total, positions = 0.0, 0
        with steered(self.model, self.vector, strength) as steering:
            for (tokens, start), before in zip(self.rows, self.before, strict=True):
                steering.start = start
                after = _distributions(self.model, tokens, start)
                total += float((before.double().exp() * (before.double() - after.double())).sum())
                positions += len(before)
        return total / max(1, positions)


def log_probability(model: PreTrainedModel, tokens: list[int], start: int) -> float:
    """The mean log p of the tokens after `start`, of the first `POSITIONS` of them."""
    tokens = tokens[: start + 1 + POSITIONS]
    following = torch.tensor(tokens[start + 1 :])
    return float(_distributions(model, tokens[:-1], start).gather(1, following[:, None]).double().mean())


@torch.inference_mode()
def _distributions(model: PreTrainedModel, tokens: list[int], start: int) -> Tensor:
    """log p of the next token from `start` on, float32 [positions, vocabulary]."""
    output = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
    return output.logits[0, start:].float().log_softmax(-1).cpu()
