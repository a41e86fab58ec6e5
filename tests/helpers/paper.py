"""The paper's schedule of masks, for tests of the selection phase."""

from typing import Any

from sparselet import SparseletConfig

PAPER = {"when": "paper", "score": "mcs"}


def paper_config(**settings: Any) -> SparseletConfig:
    """A configuration that selects masks as the paper does, but for the settings that are given."""
    return SparseletConfig(**{**PAPER, **settings})
