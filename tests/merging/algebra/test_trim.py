"""Trimming by magnitude, in one target and over all targets of an expert, against sorting."""

import pytest
import torch
from helpers.dense_merges import distinct, normal, ranked, stacked
from helpers.strategies import deltas, few, random_delta, spelt_out
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseDelta
from sparselet.errors import ArgumentError
from sparselet.merging.algebra.trim import entries_of, expert_magnitudes_at, magnitudes_at, require_trim, within


@few
@given(deltas(), st.sampled_from([0.0, 0.25, 0.5, 2.0]), st.sampled_from([0.5, 0.75, float("inf")]))
def test_within_keeps_exactly_the_entries_between_the_bounds(delta, low, high):
    dense, _ = spelt_out(delta)
    mask = (dense.abs() >= low) & (dense.abs() <= high) & (dense != 0)
    kept = within(delta, low, high)
    assert kept.block == (1, 1)
    assert torch.equal(spelt_out(kept)[1], mask)
    assert torch.equal(kept.to_dense().double(), dense * mask)


def test_nothing_is_copied_where_all_is_kept():
    delta = normal(random_delta((6, 12)))
    assert within(delta, 0.0) is delta


@few
@given(deltas(), st.lists(st.integers(1, 80), min_size=1, max_size=3))
def test_magnitudes_at_ranks_are_those_of_sorting(delta, ranks):
    dense, mask = spelt_out(delta)
    assert magnitudes_at(delta, ranks) == tuple(ranked(dense[mask], k) for k in ranks)


@few
@given(
    st.lists(distinct(3, 3), min_size=1, max_size=3),
    st.sampled_from([(0.1, 0.02), (0.5, 0.5), (1.0, 0.0)]),
    st.sampled_from(["size", "nonzeros"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_magnitudes_of_experts_are_those_of_all_their_entries_together(targets, fractions, density_of, dtype):
    targets = [[d.to(dtype) for d in deltas] for deltas in targets]

    def ranks(entries):
        return [round(f * entries) + 1 for f in fractions]

    found = expert_magnitudes_at(lambda: ((deltas, [1.0] * 3) for deltas in targets), ranks, density_of)
    for i in range(3):
        flat = torch.cat([stacked(deltas)[i].flatten() for deltas in targets])
        count = len(flat) if density_of == "size" else int((flat != 0).sum())
        assert found[i] == tuple(ranked(flat, k) for k in ranks(count))


def test_magnitudes_of_experts_are_exact_where_the_upper_bits_agree():
    values = 1.0 + torch.arange(64) * 2.0**-23
    delta = SparseDelta((1, 64), torch.arange(64), values)
    found = expert_magnitudes_at(lambda: [([delta], [1.0]), ([delta], [1.0])], lambda entries: range(1, entries + 2), "size")
    assert list(found[0]) == [*values.flip(0).repeat_interleave(2).tolist(), 0.0]


def test_experts_are_read_once_where_no_rank_is_reached():
    calls = []

    def targets():
        calls.append(0)
        return [([random_delta((6, 12), 1, 0.1)], [1.0])]

    assert expert_magnitudes_at(targets, lambda entries: [entries], "size") == [(0.0,)]
    assert len(calls) == 1


def test_what_a_density_is_a_fraction_of():
    delta = SparseDelta((2, 4), torch.arange(3), torch.tensor([1.0, 0.0, -2.0]))
    assert (entries_of(delta, "size"), entries_of(delta, "nonzeros")) == (8, 2)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (("entries",), "density_of must be one of size, nonzeros, got 'entries'"),
        (("size", "layer"), "trim must be one of target, global, got 'layer'"),
    ],
)
def test_other_choices_are_refused(choices, message):
    with pytest.raises(ArgumentError, match=message):
        require_trim(*choices)
