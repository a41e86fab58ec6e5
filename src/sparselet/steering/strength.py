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
_NOISE = 4096  # part of the bound below which rounding may be what is measured
_FACTOR = 1024.0  # the most a strength changes in a step


@dataclass(frozen=True)
class Strength:
    """strength: γ. kl: what was measured there, in nats a token. curvature: c of KL ≈ ½γ²c near 0. closed: √(bound / c)."""

    strength: float
    kl: float
    curvature: float
    closed: float


def calibrate(kl: Callable[[float], float], bound: float, *, tolerance: float = 0.01, begin: float = 1.0) -> Strength:
    """The strength whose measured divergence is `bound`, within a part of it, by default 1 %.

    KL of a small step is quadratic, KL ≈ ½γ²c; c is measured at a γ found from `begin`, where KL is at most a 16th of the
    bound. From there γ is multiplied by √(bound / KL) until the bound is passed, and then found between two measured
    strengths, log KL taken for linear in log γ. Raises ConfigError for a vector that does not move the answers.
    """
    small, measured = _small_step(kl, bound, begin)
    curvature = 2 * measured / small**2
    closed = math.sqrt(bound / curvature)
    low, strength = (small, measured), small
    high: tuple[float, float] | None = None
    for _ in range(_STEPS):
        if abs(measured - bound) <= tolerance * bound:
            break
        if high is None:
            strength = low[0] * max(1.1, math.sqrt(bound / low[1]))
        else:
            (below, kl_below), (above, kl_above) = low, high
            part = math.log(bound / kl_below) / math.log(kl_above / kl_below)
            strength = below * (above / below) ** min(0.9, max(0.1, part))
        measured = kl(strength)
        if measured < bound:
            low = strength, measured
        else:
            high = strength, measured
    if high is None and measured < (1 - tolerance) * bound:
        raise ConfigError(
            f"kl must be what the vector can reach; at strength {strength:.3g} it is {measured:.3g}, not {bound:g}."
        )
    return Strength(strength, measured, curvature, closed)


def _small_step(kl: Callable[[float], float], bound: float, begin: float) -> tuple[float, float]:
    """A strength whose divergence is small against the bound but above rounding, and that divergence. Raises ConfigError."""
    strength, measured = begin, kl(begin)
    low, high = 0.0, math.inf
    for _ in range(_STEPS):
        if bound / _NOISE <= measured <= bound / _SMALL:
            return strength, measured
        factor = math.sqrt(bound / (2 * _SMALL * measured)) if measured > 0 else _FACTOR
        if measured < bound / _NOISE:
            low, strength = strength, strength * min(_FACTOR, factor)
        else:  # NaN too
            high, strength = strength, strength * min(0.5, max(1 / _FACTOR, factor))
        if low > _FACTOR:
            break
        if not low < strength < high:
            strength = math.sqrt(low * high)
        measured = kl(strength)
    raise ConfigError("the steering vector does not move the model's answers; take other pairs, or another `layer`.")


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
