"""`locate` and `compare` against the same numbers computed on all entries at once."""

import pytest
import torch
from helpers.strategies import random_delta

from sparselet.analysis.concentration import concentration
from sparselet.analysis.histogram import Histogram
from sparselet.analysis.locate import compare, locate
from sparselet.delta import SparseDelta
from sparselet.errors import ArgumentError

NAMES = [f"layers.{layer}.attn.{projection}" for layer in (0, 1, 10) for projection in ("q_proj", "v_proj")]


@pytest.fixture
def expert():
    return {name: random_delta((12, 18), 1 + 2 * (i % 2), 0.3, i) for i, name in enumerate(NAMES)}


@pytest.fixture
def base():
    generator = torch.Generator().manual_seed(9)
    return {name: torch.randn(12, 18, generator=generator) for name in NAMES}


def test_the_whole_is_that_of_all_entries_at_once(expert, base):
    result = locate(expert, base=base.__getitem__)
    dense = torch.cat([expert[name].to_dense().reshape(-1) for name in NAMES])
    weights = torch.cat([base[name].reshape(-1) for name in NAMES])
    assert result.whole == concentration(Histogram.of(dense))
    assert result.selected.entries == sum(delta.nnz for delta in expert.values())
    assert result.unchanged.zero == pytest.approx(float((dense == 0).double().mean()))
    assert result.unchanged.small == pytest.approx(float((dense.abs() <= 1e-5).double().mean()))
    assert result.unchanged.small_relative == pytest.approx(float((dense.abs() <= 1e-3 * weights.abs()).double().mean()))
    same = (weights + dense).bfloat16() == weights.bfloat16()
    assert result.unchanged.bf16 == pytest.approx(float(same.double().mean()))


def test_parts_are_in_order_and_share_the_energy(expert):
    result = locate(expert)
    assert [part.name for part in result.layers] == ["layers.0", "layers.1", "layers.10"]
    assert [part.name for part in result.projections] == ["attn.q_proj", "attn.v_proj"]
    for parts in (result.layers, result.projections, result.cells):
        assert sum(part.energy_share for part in parts) == pytest.approx(1.0)
    values = torch.cat([expert[name].to_dense().reshape(-1) for name in NAMES[:2]])
    assert result.layers[0].concentration == concentration(Histogram.of(values))
    assert len(result.ranks) == len(NAMES)


def test_each_target_is_reported_when_it_is_done_and_ranks_can_be_left_out(expert):
    done = []
    assert locate(expert, ranks=False, progress=done.append).ranks == ()
    assert done == NAMES


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
    with pytest.raises(ArgumentError, match="the expert has no targets"):
        locate({})
