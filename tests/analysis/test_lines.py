"""Energy over rows, columns and heads, beside a permutation of all entries."""

import pytest
import torch
from helpers.strategies import few
from hypothesis import given
from hypothesis import strategies as st

from sparselet.analysis import lines as module
from sparselet.analysis.concentration import gini
from sparselet.analysis.lines import lines
from sparselet.analysis.spectrum import spectrum


def test_rows_that_hold_everything_stand_out_against_the_shuffle():
    change = torch.zeros(40, 60)
    change[[3, 17]] = torch.randn(2, 60, generator=torch.Generator().manual_seed(1))
    result = lines(change, torch.Generator().manual_seed(0))
    assert result.rows > 0.9 > 0.6 > result.shuffled_rows
    noise = lines(torch.randn(40, 60, generator=torch.Generator().manual_seed(2)), torch.Generator().manual_seed(0))
    assert noise.rows == pytest.approx(noise.shuffled_rows, abs=0.03)


def test_a_head_that_holds_everything_stands_out():
    change = torch.zeros(40, 60)
    change[:, 12:18] = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    result = lines(change, torch.Generator().manual_seed(0), (1, 6))
    assert result.head_shares == pytest.approx([0, 0, 1] + [0] * 7)
    assert result.heads == pytest.approx(0.9)
    assert result.shuffled_heads < 0.3
    assert lines(change, torch.Generator().manual_seed(0)).heads is None


def test_a_sample_of_a_large_target_shows_what_all_of_it_does(monkeypatch):
    change = torch.randn(200, 300, generator=torch.Generator().manual_seed(1)).pow(3)
    whole = lines(change, torch.Generator().manual_seed(0), (0, 20))
    monkeypatch.setattr(module, "PERMUTED", 30_000)
    sample = lines(change, torch.Generator().manual_seed(0), (0, 20))
    assert sample.rows == whole.rows == pytest.approx(gini(change.square().double().sum(1).numpy()))
    for name in ("shuffled_rows", "shuffled_columns", "shuffled_heads"):
        assert getattr(sample, name) == pytest.approx(getattr(whole, name), rel=0.35)


@given(st.integers(0, 2**16), st.integers(-6, 6))
@few
def test_scale_signs_and_the_order_of_rows_and_columns_change_nothing(seed, power):
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(12, 18, generator=generator).pow(3)
    signs = torch.randint(2, change.shape, generator=generator) * 2 - 1
    rows, columns = (torch.randperm(side, generator=generator) for side in change.shape)
    other = change[rows][:, columns] * 2.0**power
    first, second, signed = (lines(matrix, torch.Generator()) for matrix in (change, other, change * signs))
    assert (second.rows, second.columns) == (pytest.approx(first.rows, abs=1e-6), pytest.approx(first.columns, abs=1e-6))
    assert signed == first
    ranks = [spectrum(matrix) for matrix in (change, other)]
    assert ranks[0].stable_rank == pytest.approx(ranks[1].stable_rank, rel=1e-4)
    assert ranks[0].effective_rank == pytest.approx(ranks[1].effective_rank, rel=1e-4)
