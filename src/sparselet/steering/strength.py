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
_LARGEST = _FACTOR**2  # strength at which a search gives up


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
    bound, and the search goes on from there. Raises ConfigError for a vector that does not move the answers, or not so far.
    """
    small, measured = _search(kl, begin, kl(begin), bound / (2 * _SMALL), bound / _NOISE, bound / _SMALL)
    if not bound / _NOISE <= measured <= bound / _SMALL:
        raise ConfigError("the steering vector does not move the model's answers; take other pairs, or another `layer`.")
    curvature = 2 * measured / small**2
    least = (1 - tolerance) * bound
    strength, measured = _search(kl, small, measured, bound, least, (1 + tolerance) * bound)
    if measured < least:
        raise ConfigError(
            f"kl must be what the vector can reach; at strength {strength:.3g} it is {measured:.3g}, not {bound:g}."
        )
    return Strength(strength, measured, curvature, math.sqrt(bound / curvature))


def _search(
    kl: Callable[[float], float], strength: float, measured: float, target: float, least: float, most: float
) -> tuple[float, float]:
    """A strength whose divergence is from `least` to `most`, aiming at `target`, and that divergence; or where it gave up.

    measured: kl(strength). Until it lies between two measured strengths KL is taken for quadratic, then log KL for linear in
    log γ.
    """
    below: tuple[float, float] | None = None
    above: tuple[float, float] | None = None
    for _ in range(_STEPS):
        if least <= measured <= most or (strength > _LARGEST and above is None):
            break
        factor = math.sqrt(target / measured) if measured > 0 else _FACTOR
        if measured < least:
            below = strength, measured
            factor = min(_FACTOR, max(1.1, factor))
        else:  # NaN too
            above = strength, measured
            factor = max(1 / _FACTOR, min(0.5, factor))
        strength *= factor
        if below and above:
            strength = _between(below, above, target)
        measured = kl(strength)
    return strength, measured


def _between(below: tuple[float, float], above: tuple[float, float], target: float) -> float:
    """Where log KL, linear in log γ from (γ, KL) `below` to `above`, is the target's, a tenth from either end at least."""
    (low, kl_low), (high, kl_high) = below, above
    part = math.log(target / kl_low) / math.log(kl_high / kl_low) if kl_low > 0 else 0.5
    return low * (high / low) ** min(0.9, max(0.1, part))


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
