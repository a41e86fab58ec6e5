"""The profile of a merge: those of its experts pooled, as if their rows were one task's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparselet.errors import ArgumentError, ShapeMismatch
from sparselet.fingerprint import Fingerprint, require_same_base
from sparselet.profiles.profile import RANK, Profile, PromptStates, SecondMoment, low_rank_plus_diagonal


def pool_profiles(profiles: Sequence[Profile]) -> Profile:
    """The profile of all rows together, n tokens and p prompts of each profile.

    Second moments: C = Σ nᵢ·Cᵢ / Σ nᵢ over the profiles that have the target; each Cᵢ is of the model with expert i applied.
    Prompt states: μ = Σ pᵢ·μᵢ / Σ pᵢ, and the covariance Σ pᵢ·(Sᵢ + (μᵢ − μ)(μᵢ − μ)ᵀ) / Σ pᵢ. The rank is the
    largest of the terms, of states at least 32, so that full ones stay exact. The task's name is those of all, joined by "+".
    Raises ArgumentError (no profile), WrongBase, ShapeMismatch.
    """
    if not profiles:
        raise ArgumentError("profiles must be at least one, got none.")
    fingerprints: dict[str, Fingerprint | None] = {}
    for profile in profiles:
        require_same_base(profile.fingerprints, fingerprints, "the profiles of one merge")
        fingerprints |= {name: fingerprint or fingerprints.get(name) for name, fingerprint in profile.fingerprints.items()}
    inputs: dict[str, str] = {}
    moments: dict[str, SecondMoment] = {}
    first_of: dict[tuple[str | None, ...], str] = {}  # by the input of a target in each profile
    for name in dict.fromkeys(name for profile in profiles for name in profile.inputs):
        places = tuple(profile.inputs.get(name) for profile in profiles)
        inputs[name] = first_of.setdefault(places, name)
        if inputs[name] == name:
            terms = [(p.moments[place], p.tokens) for p, place in zip(profiles, places, strict=True) if place is not None]
            moments[name] = _mean([moment for moment, _ in terms], [count for _, count in terms], name)
    return Profile(
        moments,
        inputs,
        frozenset().union(*(profile.transposed for profile in profiles)),
        _pool_prompts([profile.prompts for profile in profiles]),
        fingerprints,
        sum(profile.tokens for profile in profiles),
        sum(profile.rows for profile in profiles),
        "+".join(profile.task for profile in profiles if profile.task) or None,
    )


def _mean(moments: Sequence[SecondMoment], counts: Sequence[int], where: str) -> SecondMoment:
    """Σ nᵢ·Cᵢ / Σ nᵢ at the largest rank; a single one as it is. Raises ShapeMismatch."""
    if len(moments) == 1:
        return moments[0]
    return low_rank_plus_diagonal(_dense_mean(moments, counts, where), max(len(moment.factor) for moment in moments))


def _dense_mean(moments: Sequence[SecondMoment], counts: Sequence[int], where: str) -> Tensor:
    widths = [moment.width for moment in moments]
    if len(set(widths)) > 1:
        raise ShapeMismatch(f"{where}: the profiles have widths {widths}; expected one.")
    total = torch.zeros(widths[0], widths[0], dtype=torch.float64)
    for moment, count in zip(moments, counts, strict=True):
        total += moment.to_dense() * (count / sum(counts))
    return total


def _pool_prompts(prompts: Sequence[PromptStates]) -> PromptStates:
    if len(prompts) == 1:
        return prompts[0]
    counts = [part.count for part in prompts]
    covariance = _dense_mean([part.covariance for part in prompts], counts, "prompts")
    shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    means = torch.stack([part.mean.double() for part in prompts])
    mean = shares @ means
    apart = means - mean
    rank = max(RANK, *(len(part.covariance.factor) for part in prompts))
    return PromptStates(
        mean.float(), low_rank_plus_diagonal(covariance + apart.T @ (shares[:, None] * apart), rank), sum(counts)
    )
