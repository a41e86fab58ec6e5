"""Each score against its formula on dense matrices."""

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from helpers.strategies import BLOCKS, block_sums

from sparselet.delta import block_for
from sparselet.errors import UnknownScore
from sparselet.masks import top_k
from sparselet.scores import REPLACED, SCORES, Candidate, Score, get_score, score_help
from sparselet.selection_settings import SelectionSettings
from sparselet.training import TrainSettings

FORMULAS = {
    "mcs": lambda w, g: w * g,
    "mcs_neg": lambda w, g: -w * g,
    "cs": lambda w, g: (w * g).abs(),
    "gm": lambda w, g: g.abs(),
    "wm": lambda w, g: w.abs(),
}
BASE_FORMULAS = {
    "snip": lambda c: (c.weight * c.gradient).abs(),
    "magnitude": lambda c: c.weight.abs(),
    "wanda": lambda c: c.weight.abs() * c.inputs,
    "fisher": lambda c: c.squares,
}
SHAPES = ((6, 12), (12, 6), (6, 6))


def candidate(shape=(6, 12), block_size=1, kept=8, mask=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, squares = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    return Candidate(
        shape=shape,
        block=block_for(block_size, shape),
        kept=kept,
        generator=torch.Generator().manual_seed(seed),
        mask=mask,
        gradient=gradient,
        squares=squares,
        values=values,
        weight=weight,
        inputs=torch.rand(1, shape[1], generator=generator),
    )


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_score_is_its_formula_summed_over_blocks(name, shape, block_size):
    c = candidate(shape, block_size)
    expected = block_sums(FORMULAS[name](c.values, c.gradient), block_size)
    torch.testing.assert_close(SCORES[name](c), expected)


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("name", BASE_FORMULAS)
def test_a_score_of_the_weight_is_its_formula_summed_over_blocks(name, block_size):
    c = candidate((6, 12), block_size)
    torch.testing.assert_close(SCORES[name](c), block_sums(BASE_FORMULAS[name](c), block_size))


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_lift_is_the_magnitude_in_the_low_rank_part(shape):
    c = candidate(shape, kept=450)
    u, s, v = torch.linalg.svd(c.weight.double(), full_matrices=False)
    torch.testing.assert_close(SCORES["lift"](c).double(), ((u[:, :9] * s[:9]) @ v[:9]).abs().flatten(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [*FORMULAS, "gd"])
def test_a_score_reads_transposed_matrices_in_their_own_order(name):
    c = candidate((12, 6), 3)
    turned = replace(c, values=c.values.t().contiguous().t(), gradient=c.gradient.t().contiguous().t())
    torch.testing.assert_close(SCORES[name](turned), SCORES[name](c))


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_one_number_a_block_and_changes_nothing(name):
    for block_size in (1, 3, "row", "column"):
        c = candidate((6, 12), block_size, kept=3, mask=torch.tensor([0, 2, 5]))
        before = c.values.clone(), c.gradient.clone(), c.mask.clone()
        assert SCORES[name](c).shape == (72 // math.prod(c.block),)
        assert all(torch.equal(*pair) for pair in zip(before, (c.values, c.gradient, c.mask), strict=True))


@pytest.mark.parametrize("block_size", [1, 2, "row", "column"])
@pytest.mark.parametrize("kept", [1, 2, 5, 9])
@pytest.mark.parametrize("seed", range(4))
def test_grow_and_drop_exchanges_the_least_moved_for_the_steepest_outside(block_size, kept, seed):
    blocks = 72 // math.prod(block_for(block_size, (6, 12)))
    mask = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))[:kept].sort().values.int()
    c = candidate((6, 12), block_size, kept, mask, seed)
    moved = block_sums(c.values.abs(), block_size).tolist()
    growth = block_sums(c.gradient.abs(), block_size).tolist()
    inside = set(mask.tolist())
    stay = set(sorted(inside, key=lambda u: -moved[u])[: kept - round(REPLACED * kept)])
    outside = sorted(set(range(blocks)) - inside, key=lambda u: -growth[u])
    assert set(top_k(SCORES["gd"](c), kept).tolist()) == stay | set(outside[: kept - len(stay)])


def test_grow_and_drop_without_a_mask_keeps_what_moved_most():
    c = candidate(block_size=2)
    torch.testing.assert_close(SCORES["gd"](c), block_sums(c.values.abs(), 2))


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
    still = replace(c, gradient=torch.zeros_like(c.gradient), kept=5)
    stay = c.values.view(-1)[:5].abs().topk(4).indices.tolist()
    assert top_k(SCORES["gd"](still), 5).tolist() == [*sorted(stay), 5]


def test_random_is_equal_for_equal_seeds_and_differs_for_others():
    assert torch.equal(SCORES["random"](candidate(seed=3)), SCORES["random"](candidate(seed=3)))
    assert not torch.equal(SCORES["random"](candidate(seed=3)), SCORES["random"](candidate(seed=4)))


def test_scores_said_to_rank_untrained_entries_do_so():
    for name in SCORES:
        c = candidate(kept=4, mask=torch.arange(4))
        untrained = replace(c, values=torch.zeros_like(c.values), kept=4)
        assert (len(SCORES[name](untrained)[4:].unique()) > 1) == SCORES[name].ranks_untrained, name


def test_an_unknown_score_lists_those_there_are():
    assert get_score("mcs") is SCORES["mcs"]
    with pytest.raises(UnknownScore, match=f"'nothing'; there are {', '.join(SCORES)}"):
        get_score("nothing")


def test_a_score_is_added_by_one_function_and_one_line(monkeypatch):
    def steepest(gradient, kept):
        """Largest k·g."""
        return gradient.flatten() * kept

    monkeypatch.setitem(SCORES, "steepest", Score(steepest, ranks_untrained=True))
    assert SelectionSettings(when="paper", score="steepest", initial_mask="random").interval == 100
    assert SCORES["steepest"].needs == ("gradient", "kept")
    assert "steepest: Largest k·g" in score_help()
    c = candidate(kept=2)
    assert torch.equal(SCORES["steepest"](replace(c, values=None)), 2 * c.gradient.flatten())


def test_the_command_line_and_the_documentation_explain_every_score():
    page = (Path(__file__).parents[1] / "docs/training.md").read_text()
    (field,) = [field for field in fields(TrainSettings) if field.name == "score"]
    assert all(f"{name}: {score.help}" in field.metadata["help"] and score.help for name, score in SCORES.items())
    assert all(f"| `{name}` | {score.help.replace('|', chr(92) + '|')} |" in page for name, score in SCORES.items())
