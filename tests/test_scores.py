"""Each score against its formula on dense matrices."""

import pytest
import torch
from helpers.strategies import tile_sums

from sparselet.errors import UnknownScore
from sparselet.masks import top_k
from sparselet.scores import RANKS_UNTRAINED, REPLACED, SCORES, Candidate, get_score

FORMULAS = {
    "mcs": lambda w, g: w * g,
    "mcs_neg": lambda w, g: -w * g,
    "cs": lambda w, g: (w * g).abs(),
    "gm": lambda w, g: g.abs(),
    "wm": lambda w, g: w.abs(),
}
SHAPES = ((6, 12), (12, 6), (6, 6))


def candidate(shape=(6, 12), block_size=1, kept=8, mask=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    return Candidate(values, gradient, block_size, kept, mask, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block_size", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_score_is_its_formula_summed_over_tiles(name, shape, block_size):
    c = candidate(shape, block_size)
    expected = tile_sums(FORMULAS[name](c.values, c.gradient), block_size)
    torch.testing.assert_close(SCORES[name](c), expected)


@pytest.mark.parametrize("name", [*FORMULAS, "gd"])
def test_a_score_reads_transposed_matrices_in_their_own_order(name):
    c = candidate((12, 6), 3)
    turned = Candidate(c.values.t().contiguous().t(), c.gradient.t().contiguous().t(), 3, c.kept, c.mask, c.generator)
    torch.testing.assert_close(SCORES[name](turned), SCORES[name](c))


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_one_number_a_block_and_changes_nothing(name):
    for block_size in (1, 3):
        c = candidate((6, 12), block_size, kept=3, mask=torch.tensor([0, 2, 5]))
        before = c.values.clone(), c.gradient.clone(), c.mask.clone()
        assert SCORES[name](c).shape == (72 // block_size**2,)
        assert all(torch.equal(*pair) for pair in zip(before, (c.values, c.gradient, c.mask), strict=True))


@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize("kept", [1, 2, 5, 9])
@pytest.mark.parametrize("seed", range(4))
def test_grow_and_drop_exchanges_the_least_moved_for_the_steepest_outside(block_size, kept, seed):
    blocks = 72 // block_size**2
    mask = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))[:kept].sort().values.int()
    c = candidate((6, 12), block_size, kept, mask, seed)
    moved = tile_sums(c.values.abs(), block_size).tolist()
    growth = tile_sums(c.gradient.abs(), block_size).tolist()
    inside = set(mask.tolist())
    stay = set(sorted(inside, key=lambda u: -moved[u])[: kept - round(REPLACED * kept)])
    outside = sorted(set(range(blocks)) - inside, key=lambda u: -growth[u])
    assert set(top_k(SCORES["gd"](c), kept).tolist()) == stay | set(outside[: kept - len(stay)])


def test_grow_and_drop_without_a_mask_keeps_what_moved_most():
    c = candidate(block_size=2)
    torch.testing.assert_close(SCORES["gd"](c), tile_sums(c.values.abs(), 2))


def test_grow_and_drop_takes_dropped_blocks_back_only_when_nothing_else_is_left():
    c = candidate((2, 5), kept=10, mask=torch.arange(10))
    assert top_k(SCORES["gd"](c), 10).tolist() == list(range(10))


def test_grow_and_drop_shrinks_and_grows_to_the_number_kept():
    few_kept = candidate(kept=5, mask=torch.arange(20))
    chosen = set(top_k(SCORES["gd"](few_kept), 5).tolist())
    assert len(chosen & set(range(20))) == 4
    many_kept = candidate(kept=20, mask=torch.arange(5))
    assert set(range(5)) <= set(top_k(SCORES["gd"](many_kept), 20).tolist())


def test_a_dropped_block_does_not_return_at_once_even_where_every_gradient_is_zero():
    c = candidate(kept=5, mask=torch.arange(5))
    still = Candidate(c.values, torch.zeros_like(c.gradient), 1, 5, c.mask, c.generator)
    stay = c.values.view(-1)[:5].abs().topk(4).indices.tolist()
    assert top_k(SCORES["gd"](still), 5).tolist() == [*sorted(stay), 5]


def test_random_is_equal_for_equal_seeds_and_differs_for_others():
    assert torch.equal(SCORES["random"](candidate(seed=3)), SCORES["random"](candidate(seed=3)))
    assert not torch.equal(SCORES["random"](candidate(seed=3)), SCORES["random"](candidate(seed=4)))


def test_scores_said_to_rank_untrained_entries_do_so():
    for name in SCORES:
        c = candidate(kept=4, mask=torch.arange(4))
        untrained = Candidate(torch.zeros_like(c.values), c.gradient, 1, 4, c.mask, c.generator)
        assert (len(SCORES[name](untrained)[4:].unique()) > 1) == (name in RANKS_UNTRAINED), name


def test_an_unknown_score_lists_those_there_are():
    assert get_score("mcs") is SCORES["mcs"]
    with pytest.raises(UnknownScore, match="'snip'; there are mcs, mcs_neg, cs, gm, wm, gd, random"):
        get_score("snip")
