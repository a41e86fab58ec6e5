"""`Router`: which expert a prompt belongs to, by its state in the base model and the experts' profiles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselet.errors import ArgumentError, ShapeMismatch
from sparselet.fingerprint import require_same_base
from sparselet.profiles.profile import Profile

MARGIN = 0.05
DIRECTIONS = 8  # of each expert's prompts, at most, that a residual leaves out
RULES = ("residual", "mean")


@dataclass(frozen=True)
class Route:
    """Where one prompt belongs.

    expert: the name of the nearest. distances: to each expert, by name, nearest first. margin: (second − first) / second.
    unsure: whether the margin is below the router's.
    """

    expert: str
    distances: Mapping[str, float]
    margin: float
    unsure: bool


class Router:
    """Chooses among experts of one base model by the distance of a prompt's state h to each expert's prompts.

    Each dimension is divided by its standard deviation within the experts, s² = mean of the diagonals of their covariances, so
    that a few loud dimensions do not decide. rule "mean": ‖(h − μₜ)/s‖, μₜ the mean of expert t. rule "residual": of this
    difference the part outside the expert's leading directions, at most 8 and half as many as its prompts (SiM, arXiv
    2606.22589, projects on subspaces through the origin).
    margin: a route is `unsure` below it, in [0, 1).

    profiles: by name. Raises ArgumentError (fewer than two experts, an unknown rule, a margin out of range), WrongBase,
    ShapeMismatch for profiles of several base models.
    """

    def __init__(self, profiles: Mapping[str, Profile], rule: str = "residual", margin: float = MARGIN) -> None:
        if len(profiles) < 2:
            raise ArgumentError(f"a router chooses among at least two experts, got {len(profiles)}.")
        if rule not in RULES:
            raise ArgumentError(f"rule must be one of {', '.join(RULES)}, got {rule!r}.")
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1:
            raise ArgumentError(f"margin must be a number in [0, 1), got {margin!r}.")
        self.names, self.margin = tuple(profiles), float(margin)
        first, *others = profiles.items()
        for name, profile in others:
            where = f"the profiles of {first[0]} and {name}"
            require_same_base(first[1].fingerprints, profile.fingerprints, where)
            if len(first[1].prompts.mean) != len(profile.prompts.mean):
                raise ShapeMismatch(
                    f"{where} have prompt states of {len(first[1].prompts.mean)} and {len(profile.prompts.mean)} dimensions."
                )
        prompts = [profile.prompts for profile in profiles.values()]
        variance = torch.stack([p.covariance.full_diagonal() for p in prompts]).mean(dim=0)
        self._scale = variance.clamp_min(1e-12 * float(variance.max()) or 1.0).rsqrt()
        self._means = torch.stack([p.mean.double() for p in prompts])
        self._directions = [
            _directions(p.covariance.factor.double() * self._scale, min(DIRECTIONS, p.count // 2) if rule == "residual" else 0)
            for p in prompts
        ]

    def distances(self, states: Tensor) -> Tensor:
        """The distance of each prompt to each expert, float64 [prompts, experts]. states: float [prompts, width].

        Raises ShapeMismatch.
        """
        if states.ndim != 2 or states.shape[1] != self._means.shape[1]:
            raise ShapeMismatch(f"states have shape {list(states.shape)}; expected [prompts, {self._means.shape[1]}].")
        columns = []
        for mean, directions in zip(self._means, self._directions, strict=True):
            difference = (states.double() - mean) * self._scale
            columns.append((difference - difference @ directions.T @ directions).norm(dim=1))
        return torch.stack(columns, dim=1)

    def route(self, states: Tensor) -> list[Route]:
        """A route for each prompt. states: float [prompts, width] (`prompt_states` of the base model). Raises ShapeMismatch."""
        routes = []
        for row in self.distances(states).tolist():
            ranked = dict(sorted(zip(self.names, row, strict=True), key=lambda entry: entry[1]))
            nearest, second = list(ranked.values())[:2]
            margin = (second - nearest) / second if second else 0.0
            routes.append(Route(next(iter(ranked)), ranked, margin, margin < self.margin))
        return routes


def prompt_similarity(profiles: Sequence[Profile]) -> Tensor:
    """Minus the distance of two profiles' mean prompt states by a router of rule "mean", float64 [N, N].

    Raises WrongBase, ShapeMismatch.
    """
    if len(profiles) == 1:
        return torch.zeros(1, 1, dtype=torch.float64)
    router = Router({str(i): profile for i, profile in enumerate(profiles)}, "mean")
    return 0.0 - router.distances(torch.stack([profile.prompts.mean for profile in profiles]))


def _directions(factor: Tensor, count: int) -> Tensor:
    """The leading orthonormal directions of a covariance with this factor, float64 [at most count, width]."""
    _, values, directions = torch.linalg.svd(factor, full_matrices=False)
    return directions[: min(count, int((values > 1e-6 * values.max().clamp_min(1e-300)).sum()))]
