"""Pooled profiles against the moments and states of all rows together."""

import pytest
import torch
from helpers.made_profiles import profile_for
from helpers.strategies import few
from helpers.tiny import make_adapter, make_model
from hypothesis import given
from hypothesis import strategies as st

from sparselet.errors import ArgumentError, ShapeMismatch, WrongBase
from sparselet.profiles.collect import describe_prompts
from sparselet.profiles.file import read_profile, write_profile
from sparselet.profiles.pool import pool_profiles
from sparselet.profiles.profile import Profile, SecondMoment, low_rank_plus_diagonal

WIDTH = 6


def profile_of(x, states, task=None, names=("q", "k"), transposed=frozenset(), prints=None, rank=None):
    """The profile of inputs x [tokens, width], shared by the targets, and prompt states [prompts, width]."""
    x = x.double()
    moments = {names[0]: low_rank_plus_diagonal(x.T @ x / len(x), rank)}
    inputs = dict.fromkeys(names, names[0])
    prints = dict.fromkeys(names) if prints is None else prints
    return Profile(moments, inputs, transposed, describe_prompts(states, None), prints, len(x), 3, task)


@few
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_it_is_the_profile_of_all_rows_together(counts, seed):
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(count, WIDTH, generator=generator) for count in counts]
    states = [torch.randn(2 * count, 8, generator=generator) + i for i, count in enumerate(counts)]
    pooled = pool_profiles([profile_of(x, s, f"t{i}") for i, (x, s) in enumerate(zip(xs, states, strict=True))])
    whole = profile_of(torch.cat(xs), torch.cat(states))
    torch.testing.assert_close(pooled.moment("k").to_dense(), whole.moment("k").to_dense(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled.prompts.mean, whole.prompts.mean, rtol=1e-5, atol=1e-6)
    expected = whole.prompts.covariance.to_dense()
    torch.testing.assert_close(pooled.prompts.covariance.to_dense(), expected, rtol=1e-4, atol=1e-5)
    assert (pooled.tokens, pooled.rows, pooled.prompts.count) == (sum(counts), 3 * len(counts), 2 * sum(counts))
    assert pooled.task == "+".join(f"t{i}" for i in range(len(counts)))


def test_a_low_rank_keeps_the_diagonal_exact():
    xs = [torch.randn(40, WIDTH), torch.randn(20, WIDTH)]
    pooled = pool_profiles([profile_of(x, torch.randn(4, 8), rank=2) for x in xs]).moment("q")
    both = torch.cat(xs).double()
    assert len(pooled.factor) == 2
    torch.testing.assert_close(pooled.full_diagonal(), both.square().mean(0), rtol=1e-5, atol=1e-6)


def test_targets_share_an_input_where_they_do_in_all_profiles():
    x, states = torch.randn(9, WIDTH), torch.randn(4, 8)
    first, second = profile_of(x, states, names=("q", "k", "v")), profile_of(2 * x, states, names=("k", "v"))
    pooled = pool_profiles([first, second])
    assert pooled.inputs == {"q": "q", "k": "k", "v": "k"}
    assert sorted(pooled.moments) == ["k", "q"]
    c = first.moment("q").to_dense()
    torch.testing.assert_close(pooled.moment("q").to_dense(), c)
    torch.testing.assert_close(pooled.moment("v").to_dense(), (c + 4 * c) / 2, rtol=1e-5, atol=1e-6)


def test_it_can_be_written_and_read(tmp_path):
    model = make_model()
    experts = [make_adapter(model, seed=seed) for seed in (1, 2)]
    pooled = pool_profiles([profile_for(expert, seed) for seed, expert in enumerate(experts)])
    read = read_profile(write_profile(pooled, tmp_path / "profile.safetensors"))
    assert (read.inputs, read.fingerprints, read.tokens) == (pooled.inputs, pooled.fingerprints, pooled.tokens)
    assert torch.equal(read.prompts.mean, pooled.prompts.mean)


def test_what_does_not_belong_together_is_refused():
    states = torch.randn(4, 8)
    prints = [{name: {"dtype": "float32", "sample": s * 16, "signs": s * 16} for name in ("q", "k")} for s in "01"]
    x = torch.randn(9, WIDTH)
    with pytest.raises(WrongBase, match="the profiles of one merge"):
        pool_profiles([profile_of(x, states, prints=p) for p in prints])
    with pytest.raises(ShapeMismatch, match=r"q: the profiles have widths \[6, 4\]"):
        pool_profiles([profile_of(x, states), profile_of(x[:, :4], states)])
    with pytest.raises(ShapeMismatch, match="prompts: the profiles have widths"):
        pool_profiles([profile_of(x, states), profile_of(x, states[:, :4])])
    with pytest.raises(ArgumentError, match="profiles must be at least one"):
        pool_profiles([])


def test_one_profile_stays_as_it_is():
    profile = profile_of(torch.randn(9, WIDTH), torch.randn(4, 8), "alone", rank=2)
    pooled = pool_profiles([profile])
    assert isinstance(pooled.moment("q"), SecondMoment)
    assert torch.equal(pooled.moment("q").factor, profile.moment("q").factor)
    assert pooled.prompts is profile.prompts
