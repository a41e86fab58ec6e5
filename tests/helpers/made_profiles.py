"""Profiles of made experts: moments of random inputs, whatever the expert."""

import torch

from sparselet.expert import Expert
from sparselet.profiles.collect import describe_prompts
from sparselet.profiles.profile import Profile, low_rank_plus_diagonal


def profile_for(expert: Expert, seed: int = 0) -> Profile:
    """Of each target a moment of its own, of inputs as wide as the target's columns."""
    generator = torch.Generator().manual_seed(seed)
    moments = {}
    for name, (_, width) in expert.shapes.items():
        x = torch.randn(3 * width, width, generator=generator) * torch.linspace(0.3, 2, width)
        moments[name] = low_rank_plus_diagonal(x.T @ x / len(x), 4)
    inputs, prompts = {name: name for name in moments}, describe_prompts(torch.randn(9, 8, generator=generator))
    return Profile(moments, inputs, frozenset(), prompts, dict(expert.fingerprints), 9, 9)
