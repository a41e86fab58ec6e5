"""`compare`: an expert beside itself, and beside one that shares a target."""

import pytest
from helpers.strategies import random_delta

from sparselet.analysis.compare import compare
from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError

NAMES = [f"layers.{layer}.attn.{projection}" for layer in (0, 1) for projection in ("q_proj", "v_proj")]


@pytest.fixture
def expert():
    return {name: random_delta((12, 18), 1 + 2 * (i % 2), 0.3, i) for i, name in enumerate(NAMES)}


def test_an_expert_compared_with_itself_is_the_same_everywhere(expert):
    result = compare(expert, expert, density=0.1)
    assert result.masks.jaccard == result.largest.jaccard == 1.0
    assert result.masks.cosine == pytest.approx(1.0)
    assert result.directions[0] == pytest.approx(1.0)


def test_only_common_targets_are_compared_and_there_must_be_one(expert):
    other = {NAMES[0]: expert[NAMES[0]].scale(-1.0), "elsewhere": SparseDelta.empty((2, 2))}
    result = compare(expert, other)
    assert result.targets == (NAMES[0],)
    assert result.masks.cosine == pytest.approx(-1.0)
    assert result.masks.sign_agreement == 0.0
    with pytest.raises(ArgumentError, match="a and b have no target in common"):
        compare(expert, {"elsewhere": SparseDelta.empty((2, 2))}, names=("a", "b"))
