"""DELLA against its formula and mergekit."""

import pytest
import torch
from helpers.dense_merges import assert_close, distinct, elected_mean, full_deltas, normal, stacked
from helpers.strategies import few, random_delta, same_shape
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseDelta
from sparselet.errors import ArgumentError, DensityOutOfRange, ShapeMismatch
from sparselet.merging.algebra.trim import within
from sparselet.merging.methods import complete_parameters
from sparselet.merging.methods.della import della, keep_probabilities

populations = st.sampled_from(["size", "nonzeros"])
windows = st.sampled_from([(0.7, 0.07), (0.5, 0.3), (0.25, 0.25), (0.75, 0.25), (0.4, 0.0)])


def probabilities(x, density, epsilon, density_of):
    """Row by row, one entry after the other; 0 where x is 0."""
    found = torch.zeros_like(x)
    for r, row in enumerate(x):
        pool = row.abs() if density_of == "size" else row[row != 0].abs()
        for c in row.nonzero().flatten():
            below, equal = (pool < row[c].abs()).sum(), (pool == row[c].abs()).sum()
            rank = below + (equal + 1) / 2
            share = (rank - 1) / (len(pool) - 1) if len(pool) > 1 else 0.5
            found[r, c] = density + epsilon * (2 * share - 1)
    return found


def dense_probabilities(delta, *arguments):
    nonzeros = within(delta, 0.0)
    return SparseDelta(delta.shape, nonzeros.indices, keep_probabilities(nonzeros, *arguments)).to_dense().double()


@few
@given(same_shape(1, 1), windows, populations)
def test_probabilities_are_those_of_the_rank_in_the_row(deltas, window, density_of):
    expected = probabilities(stacked(deltas)[0], *window, density_of)
    torch.testing.assert_close(dense_probabilities(deltas[0], *window, density_of), expected, rtol=0, atol=1e-6)


def test_probabilities_by_hand():
    x = torch.tensor([[1.0, -3.0, 2.0, 0.0, 0.0], [0.0] * 5, [2.0, -2.0, 5.0, 1.0, 7.0], [0.0, 4.0, 0.0, 0.0, 0.0]])
    delta = SparseDelta.from_dense(x)
    size = torch.tensor([[0.5, 0.7, 0.6, 0, 0], [0.0] * 5, [0.45, 0.45, 0.6, 0.3, 0.7], [0, 0.7, 0, 0, 0]])
    nonzeros = torch.tensor([[0.3, 0.7, 0.5, 0, 0], [0.0] * 5, [0.45, 0.45, 0.6, 0.3, 0.7], [0, 0.5, 0, 0, 0]])
    torch.testing.assert_close(dense_probabilities(delta, 0.5, 0.2, "size").float(), size)
    torch.testing.assert_close(dense_probabilities(delta, 0.5, 0.2, "nonzeros").float(), nonzeros)


@few
@given(distinct(1, 1), windows)
def test_the_mean_probability_is_the_density(deltas, window):
    found = dense_probabilities(deltas[0], *window, "nonzeros")[deltas[0].mask()]
    assert float(found.mean()) == pytest.approx(window[0]) or not deltas[0].nnz


def replaying(monkeypatch, masks):
    """Let mergekit's Bernoulli draws be those given, one after the other; returns the probabilities that it asked for."""
    asked, left = [], list(masks)

    def bernoulli(probabilities):
        asked.append(probabilities)
        return left.pop(0).to(probabilities.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return asked


def drawn(delta, **parameters):
    return della([delta], [1.0], **parameters).mask()


@pytest.mark.parametrize("sparse", [1.0, 0.3])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 0.25]])
def test_probabilities_and_merge_are_mergekits_that_rescales_to_the_norm(monkeypatch, weights, sparse):
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    deltas = full_deltas(3, density=sparse)
    window = {"density": 0.6, "epsilon": 0.2}
    asked = replaying(monkeypatch, [drawn(d, **window) for d in deltas])
    tensors = [torch.zeros(10, 20), *(d.to_dense() for d in deltas)]
    parameters = {"weight": weights, **window, "lambda": 1.1}
    expected = mergekit.merge_tensors(tensors, "della", parameters=parameters, base_index=0)
    for delta, theirs in zip(deltas, asked, strict=True):
        ours = dense_probabilities(delta, 0.6, 0.2, "size").float()
        torch.testing.assert_close(ours, theirs * (ours > 0))
    found = della(deltas, weights, **window, scale=1.1, rescale="norm", elect="weighted", mean="weights")
    torch.testing.assert_close(found.to_dense(), expected)


@few
@given(same_shape(1, 4), windows, populations, st.sampled_from(["sum", "weighted", "count"]), st.integers(0, 5))
def test_della_merges_what_was_drawn_and_divides_it_by_its_probability(deltas, window, density_of, elect, seed):
    weights = [1.0, -0.5, 2.0, 0.25][: len(deltas)]
    prune = {"density": window[0], "epsilon": window[1], "density_of": density_of, "seed": seed}
    masks = torch.stack([drawn(d, **prune) for d in deltas])
    x = stacked(deltas)
    kept = torch.stack([(v / probabilities(v, *window, density_of)).nan_to_num() for v in x]) * masks
    merged = della(deltas, weights, **prune, elect=elect, mean="weights", scale=0.5)
    assert_close(merged, elected_mean(kept.float().double(), weights, elect, "weights", 0.5), masks.any(0))


@pytest.mark.parametrize("density_of", ["size", "nonzeros"])
def test_the_rate_at_each_rank_is_its_probability_within_five_deviations(density_of):
    (delta,) = full_deltas(1, (2000, 20))
    mask = drawn(delta, density=0.5, epsilon=0.4, density_of=density_of, seed=3)
    ranks = delta.to_dense().abs().argsort(1).argsort(1)
    for rank in range(20):
        p, n = 0.1 + 0.8 * rank / 19, 2000
        assert abs(float(mask[ranks == rank].sum()) - p * n) < 5 * (p * (1 - p) * n) ** 0.5


def test_kept_entries_are_exactly_the_value_over_the_probability():
    (delta,) = full_deltas(1)
    merged = della([delta], [1.0])
    kept = merged.indices.long()
    assert 0 < merged.nnz < delta.nnz
    assert torch.equal(merged.values, delta.values[kept] / keep_probabilities(delta, 0.7, 0.07, "size")[kept])


@few
@given(distinct(1, 1))
def test_dropping_nothing_a_single_expert_is_itself_and_any_draw_cancels_with_itself(deltas):
    alone = della(deltas, [1.0], density=1.0, epsilon=0.0)
    assert torch.equal(alone.to_dense(), deltas[0].to_dense())
    assert not della([deltas[0]] * 2, [1.0, -1.0]).values.any()


@few
@given(distinct(2, 4), st.randoms(use_true_random=False))
def test_order_does_not_matter(deltas, random):
    shuffled = random.sample(deltas, len(deltas))
    ones = [1.0] * len(deltas)
    torch.testing.assert_close(della(deltas, ones).to_dense(), della(shuffled, ones).to_dense())


def test_each_seed_draws_anew():
    (delta,) = full_deltas(1)
    assert not torch.equal(drawn(delta, seed=0), drawn(delta, seed=1))


def test_layout_and_dtype_and_selected_zeros_do_not_change_the_draw():
    tiles = random_delta((6, 12), 3, 0.5)
    forms = [tiles, tiles.to(torch.bfloat16), SparseDelta.from_dense(tiles.to_dense())]
    first, *others = (della([form], [1.0], density_of="nonzeros") for form in forms)
    for other in others:
        assert torch.equal(other.to_dense(), first.to_dense())


def test_a_large_target_has_ranks_without_rounding():
    columns = 2**25 + 3
    delta = SparseDelta((2, columns), torch.tensor([0, columns - 1, columns, 2 * columns - 1]), torch.tensor([1.0, 2, 3, 4]))
    found = keep_probabilities(delta, 0.5, 0.25, "nonzeros")
    assert found.tolist() == [0.25, 0.75, 0.25, 0.75]


def test_empty_experts_stay_empty_and_shapes_must_agree():
    assert della([SparseDelta.empty((2, 3))] * 2, [1.0, 1.0]).nnz == 0
    with pytest.raises(ShapeMismatch, match="different shapes"):
        della([normal(random_delta((6, 12))), normal(random_delta((12, 6)))], [1.0, 1.0])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"epsilon": 0.4}, r"density ± epsilon must lie in \[0, 1\], got 0.7 ± 0.4. Lower epsilon"),
        ({"epsilon": -0.1}, r"epsilon must be in \[0, 1\), got -0.1"),
        ({"seed": True}, "seed must be an integer of at least 0, got True"),
        ({"scale": "1"}, "scale must be a finite number, got '1'"),
        ({"density_of": "row"}, "density_of must be one of size, nonzeros"),
        ({"rescale": "l1"}, "rescale must be one of density, norm, none"),
        ({"elect": "total"}, "elect must be one of sum, weighted, count"),
        ({"mean": "sum"}, "mean must be one of count, weights"),
        ({"density": 2}, r"density must be in \(0, 1\], got 2"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(parameters, message):
    error = DensityOutOfRange if "density" in parameters else ArgumentError
    with pytest.raises(error, match=message):
        complete_parameters("della", parameters)


def test_density_under_epsilon_is_refused():
    with pytest.raises(ArgumentError, match=r"got 0.05 ± 0.07"):
        complete_parameters("della", {"density": 0.05})
