"""`locate` against the same numbers computed on all entries at once."""

import pytest
import torch
from helpers.strategies import random_delta

from sparselet.analysis.concentration import concentration
from sparselet.analysis.histogram import Histogram
from sparselet.analysis.locate import locate
from sparselet.errors import ArgumentError
from sparselet.formats.expert import full_delta

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
    rounded = ((weights + dense).bfloat16().double() - weights.bfloat16().double()).abs()
    bounds = (rounded == 0, rounded <= 1e-5, rounded <= 1e-3 * weights.abs())
    assert list(vars(result.unchanged_bf16).values()) == [pytest.approx(float(x.double().mean())) for x in bounds]
    assert locate(expert).unchanged_bf16 is None


def test_parts_are_in_order_and_share_the_energy(expert):
    result = locate(expert)
    assert [part.name for part in result.layers] == ["layers.0", "layers.1", "layers.10"]
    assert [part.name for part in result.projections] == ["attn.q_proj", "attn.v_proj"]
    for parts in (result.layers, result.projections, result.cells):
        assert sum(part.energy_share for part in parts) == pytest.approx(1.0)
    values = torch.cat([expert[name].to_dense().reshape(-1) for name in NAMES[:2]])
    assert result.layers[0].concentration == concentration(Histogram.of(values))
    assert [structure.name for structure in result.structures] == NAMES


def test_each_target_is_reported_when_it_is_done_and_structure_can_be_left_out(expert):
    done = []
    assert locate(expert, structure=False, progress=done.append).structures == ()
    assert done == NAMES


def test_dense_changes_and_vectors_are_looked_at_too():
    change = torch.randn(30, 40, generator=torch.Generator().manual_seed(1))
    result = locate(
        {"layers.0.q_proj": full_delta(change), "norm": full_delta(torch.ones(1, 16))}, heads={"layers.0.q_proj": (0, 10)}
    )
    assert [structure.name for structure in result.structures] == ["layers.0.q_proj"]
    shares = result.structures[0].lines.head_shares
    energy = change.double().square().view(3, -1).sum(1)
    assert list(shares) == pytest.approx((energy / energy.sum()).tolist())


def test_an_expert_without_targets_is_refused():
    with pytest.raises(ArgumentError, match="the expert has no targets"):
        locate({})
