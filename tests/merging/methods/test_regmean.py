"""RegMean against the normal equations, solved row by row in float64 with numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.dense_merges import normal, stacked
from helpers.strategies import few, random_delta, spelt_out
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseDelta
from sparselet.errors import ArgumentError, MissingProfile
from sparselet.merging.methods.regmean import regmean, solve_on_masks
from sparselet.profiles.profile import SecondMoment, low_rank_plus_diagonal

OUT, IN = 6, 12


def deltas_of(count, density=0.3, shape=(OUT, IN)):
    return [normal(random_delta(shape, 1, density, seed), seed) for seed in range(count)]


def inputs(seed, tokens=40, width=IN):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 3, width)


def moment(seed, rank=None, transposed=False, **sizes):
    x = inputs(seed, **sizes)
    return replace(low_rank_plus_diagonal(x.T @ x / len(x), rank), transposed=transposed)


def oracle(deltas, weights, matrices, mask, off_diagonal=1.0, ridge=1e-3):
    """The minimum of Σ w·‖(M − ΔW)·X‖², one output row at a time; mask: which entries may differ from 0."""
    dense, merged = stacked(deltas).numpy(), np.zeros(mask.shape)
    scaled = []
    for matrix in matrices:
        c = matrix.double().numpy()
        diagonal = np.diag(np.diag(c))
        scaled.append((off_diagonal * c + (1 - off_diagonal) * diagonal) / np.trace(c) + ridge / len(c) * np.eye(len(c)))
    total = sum(w * c for w, c in zip(weights, scaled, strict=True))
    for i, row in enumerate(mask.numpy()):
        s = np.flatnonzero(row)
        known = sum(w * c @ delta[i] for w, c, delta in zip(weights, scaled, dense, strict=True))
        merged[i, s] = np.linalg.solve(total[np.ix_(s, s)], known[s])
    return torch.from_numpy(merged)


def union_of(deltas):
    return torch.stack([spelt_out(delta)[1] for delta in deltas]).any(0)


@few
@given(
    density=st.sampled_from([0.05, 0.2, 0.5, 0.8, 1.0]),
    count=st.integers(2, 4),
    weights=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=4, max_size=4),
    off_diagonal=st.sampled_from([0.0, 0.5, 1.0]),
    ridge=st.sampled_from([1e-3, 0.5]),
    rank=st.sampled_from([1, 4, None]),
)
def test_the_merge_solves_the_normal_equations_on_the_union(density, count, weights, off_diagonal, ridge, rank):
    deltas, moments = deltas_of(count, density), [moment(i, rank) for i in range(count)]
    weights, mask = weights[:count], union_of(deltas)
    merged = regmean(deltas, weights, off_diagonal=off_diagonal, ridge=ridge, moments=moments)
    expected = oracle(deltas, weights, [m.to_dense() for m in moments], mask, off_diagonal, ridge)
    values, selected = spelt_out(merged)
    assert torch.equal(selected, mask)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)


def test_the_full_merge_is_the_papers_formula():
    deltas, weights = deltas_of(3), [1.0, 0.5, 2.0]
    grams = [inputs(i).T @ inputs(i) for i in range(3)]  # of the tokens themselves, not their mean
    scaled = [gram / gram.trace() for gram in grams]
    expected = sum(w * d @ c for w, d, c in zip(weights, stacked(deltas), scaled, strict=True)) @ torch.linalg.inv(
        sum(w * c for w, c in zip(weights, scaled, strict=True))
    )
    merged = regmean(deltas, weights, mask="full", ridge=0.0, moments=[moment(i) for i in range(3)])
    torch.testing.assert_close(spelt_out(merged)[0], expected, rtol=1e-4, atol=1e-4)


def test_no_other_matrix_is_closer_to_the_experts_outputs():
    deltas, xs = deltas_of(3), [inputs(i) for i in range(3)]
    xs = [x / x.square().sum().sqrt() for x in xs]
    merged = spelt_out(regmean(deltas, [1.0] * 3, ridge=0.0, moments=[moment(i) for i in range(3)]))[0].requires_grad_()
    loss = sum(((merged - d) @ x.T).square().sum() for d, x in zip(stacked(deltas), xs, strict=True))
    loss.backward()
    assert (merged.grad * union_of(deltas)).abs().max() < 1e-5  # autograd agrees that this is the minimum on the union
    assert merged.grad.abs().max() > 1e-2


def test_whole_rows_stay_whole_rows_and_are_not_changed_by_the_mask():
    deltas = []
    for seed in range(3):
        mask = torch.zeros(OUT, IN, dtype=torch.bool)
        mask[seed] = mask[seed + 1] = True
        deltas.append(SparseDelta.from_dense(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)), mask))
    moments = [moment(i) for i in range(3)]
    union, full = (regmean(deltas, [1.0] * 3, mask=mask, moments=moments) for mask in ("union", "full"))
    torch.testing.assert_close(spelt_out(union)[0], spelt_out(full)[0], rtol=1e-6, atol=1e-7)
    assert torch.equal(spelt_out(full)[1].any(1), torch.tensor([True] * 4 + [False] * 2))


def test_a_transposed_target_is_merged_as_its_transpose():
    deltas = deltas_of(3)
    turned = [SparseDelta.from_dense(d.to_dense().T.contiguous(), d.mask().T.contiguous()) for d in deltas]
    straight = regmean(deltas, [1.0] * 3, moments=[moment(i) for i in range(3)])
    other = regmean(turned, [1.0] * 3, moments=[moment(i, transposed=True) for i in range(3)])
    torch.testing.assert_close(spelt_out(other)[0].T, spelt_out(straight)[0])
    assert torch.equal(spelt_out(other)[1].T, spelt_out(straight)[1])


@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize("mask", ["union", "full"])
def test_one_expert_is_itself_whatever_its_inputs_and_weight(weight, mask):
    (delta,) = deltas_of(1)
    alone = regmean([delta], [weight], mask=mask, moments=[moment(0, rank=2)])
    beside = regmean([delta, deltas_of(2)[1]], [weight, 0.0], mask=mask, moments=[moment(0, 2), moment(1, 2)])
    for merged in (alone, beside):
        assert torch.equal(spelt_out(merged)[0], spelt_out(delta)[0])
    torch.testing.assert_close(
        spelt_out(regmean([delta] * 3, [weight] * 3, moments=[moment(i, 2) for i in range(3)]))[0], spelt_out(delta)[0]
    )


def test_the_order_of_the_experts_changes_nothing_beyond_rounding():
    deltas, moments, weights = deltas_of(4), [moment(i, 3) for i in range(4)], [1.0, 2.0, 0.5, 1.0]
    expected = regmean(deltas, weights, moments=moments)
    order = [2, 0, 3, 1]
    merged = regmean([deltas[i] for i in order], [weights[i] for i in order], moments=[moments[i] for i in order])
    torch.testing.assert_close(merged.to_dense(), expected.to_dense(), rtol=1e-5, atol=1e-6)


def test_louder_inputs_weigh_no_more():
    deltas, (first, second) = deltas_of(2), (moment(0), moment(1))
    louder = SecondMoment(second.factor * 10, second.diagonal * 100)
    merged = [regmean(deltas, [1.0, 1.0], moments=[first, m]).to_dense() for m in (second, louder)]
    torch.testing.assert_close(*merged, rtol=1e-4, atol=1e-5)


def test_a_target_that_an_expert_lacks_is_left_to_the_others():
    deltas, moments = deltas_of(2), [moment(0), moment(1)]
    expected = regmean(deltas, [1.0, 1.0], moments=moments)
    merged = regmean([*deltas, SparseDelta.empty((OUT, IN))], [1.0] * 3, moments=[*moments, None])
    assert torch.equal(merged.to_dense(), expected.to_dense())
    kept = regmean([*deltas, SparseDelta.empty((OUT, IN))], [1.0] * 3, moments=[*moments, moment(2)])
    assert not torch.allclose(kept.to_dense(), expected.to_dense())  # its inputs ask for no change
    with pytest.raises(MissingProfile, match="the profile of expert 2 has no inputs of a target that it changes"):
        regmean(deltas, [1.0, 1.0], moments=[moments[0], None])


@few
@given(seed=st.integers(0, 999), density=st.sampled_from([0.1, 0.45, 0.55, 0.9]))
def test_rows_are_solved_alike_by_their_mask_and_by_its_complement(seed, density):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(9, IN, generator=generator) < density
    left = torch.randn(9, IN, generator=generator, dtype=torch.float64)
    matrix = moment(seed).to_dense()
    x = solve_on_masks(left, matrix, mask)
    assert not x[~mask].any()
    torch.testing.assert_close((x @ matrix)[mask], left[mask])


def test_bad_parameters_and_weights_are_refused_by_name():
    deltas, moments = deltas_of(2), [moment(i, tokens=3, width=IN) for i in range(2)]
    with pytest.raises(ArgumentError, match="regmean takes no negative weights, got -1"):
        regmean(deltas, [1.0, -1.0], moments=moments)
    with pytest.raises(ArgumentError, match="ridge must be larger"):
        regmean(deltas, [1.0, 1.0], mask="full", ridge=0.0, moments=[SecondMoment(m.factor, torch.zeros(IN)) for m in moments])
    with pytest.raises(ArgumentError, match="ridge must be at least 0, got -1"):
        regmean(deltas, [1.0, 1.0], ridge=-1.0)
