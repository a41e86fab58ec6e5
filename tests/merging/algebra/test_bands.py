"""Large targets in bands of rows: the same bytes as in one piece."""

import pytest
import torch
from helpers.made_experts import OTHER, expert, saved
from helpers.strategies import assert_is, random_delta, spelt_out
from hypothesis import given
from hypothesis import strategies as st

from sparselet import METHODS, merge
from sparselet.delta import block_for
from sparselet.errors import ArgumentError
from sparselet.merging import merge_to
from sparselet.merging.algebra import bands
from sparselet.merging.engine import plan

SHAPE = (12, 12)
SETTINGS = [
    (method, {"trim": trim} if trim else {})
    for method in (name for name, record in METHODS.items() if not record.needs_profiles)
    for trim in (("target", "global") if "trim" in METHODS[method].defaults else (None,))
]


def experts(blocks):
    return [expert(10 * i, block, ("a", "b"), SHAPE, density=0.3) for i, block in enumerate(blocks)]


@pytest.fixture
def small_bands(monkeypatch):
    """All targets are large, and a band is one row of entries or tiles."""
    monkeypatch.setattr(bands, "BAND", 1)
    monkeypatch.setattr(plan, "MAX_MEMORY", 0)


@pytest.mark.parametrize("blocks", [(1, 1, 1), (3, 3, 3), (1, 3, 2), ("row",) * 3, ("column",) * 3, ("row", "column", 3)])
@pytest.mark.parametrize(("method", "parameters"), SETTINGS)
@pytest.mark.parametrize("workers", [1, 3])
def test_bands_give_the_bytes_of_the_whole(tmp_path, monkeypatch, method, parameters, blocks, workers):
    weights = [1.0, -0.5, 2.0]
    expected = merge(experts(blocks), method, weights, parameters, workers=1)
    monkeypatch.setattr(bands, "BAND", 1)
    monkeypatch.setattr(plan, "MAX_MEMORY", 0)
    seen = []
    monkeypatch.setattr(plan, "join_bands", lambda parts: (seen.append(len(parts)), bands.join_bands(parts))[1])
    paths = saved(tmp_path, experts(blocks))
    found = merge(paths, method, weights, parameters, workers=workers)
    of_blocks = {(3, 3, 3): 4, ("column",) * 3: 1}
    assert set(seen) == ({of_blocks.get(blocks, 12)} if METHODS[method].elementwise else set())
    merge_to(tmp_path / "out", paths, method, weights, parameters, workers=workers)
    for name, delta in expected.items():
        assert found[name].block == delta.block
        assert torch.equal(found[name].indices, delta.indices)
        assert torch.equal(found[name].values, delta.values)


@given(
    block=st.sampled_from([1, 2, 3, "row", "column"]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    height=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_what_is_cut_and_joined_is_what_it_was(block, density, height, seed):
    deltas = [random_delta(SHAPE, block, density, seed), random_delta(SHAPE, block, 0.4, seed + 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "BAND", height)
        parts = list(bands.split_into_bands(deltas))
    rows = block_for(block, SHAPE)[0]
    assert len(parts) == -(-12 // (max(1, height // (12 * rows)) * rows))
    for i, delta in enumerate(deltas):
        dense = delta.to_dense()
        assert torch.equal(torch.cat([part[i].to_dense() for part in parts]), dense)
        assert_is(bands.join_bands([part[i] for part in parts]), *spelt_out(delta))


def test_an_error_in_a_band_names_the_target(small_bands):
    with pytest.raises(ArgumentError, match=r"^a: k is 4, but there are 3 experts"):
        merge(experts((1, 1, 1)), "consensus", parameters={"k": 4})


def test_small_targets_between_large_ones_keep_the_order(monkeypatch):
    mixed = [
        {
            "a": random_delta((60, 12), 1, 0.5, 1),
            OTHER: random_delta((2, 2), 1, 0.5, 2),
            "z": random_delta((60, 12), 1, 0.5, 3),
        },
        {"b": random_delta((2, 2), 1, 0.5, 4), "z": random_delta((60, 12), 1, 0.5, 5)},
    ]
    expected = merge(mixed)
    monkeypatch.setattr(bands, "BAND", 24)
    monkeypatch.setattr(plan, "MAX_MEMORY", 40_000)
    found = merge(mixed, workers=2)
    assert list(found) == list(expected) == ["a", "b", OTHER, "z"]
    for name, delta in expected.items():
        assert torch.equal(found[name].values, delta.values)
