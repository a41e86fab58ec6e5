"""Model Breadcrumbs against its dense definition and mergekit."""

from dataclasses import replace

import pytest
import torch
from helpers.dense_merges import assert_close, band, distinct, elected_mean, factors, full_deltas, normal, stacked
from helpers.strategies import few, random_delta, same_shape
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseAdapter, SparseDelta, merge
from sparselet.errors import ArgumentError, DensityOutOfRange
from sparselet.merging.methods import METHODS, complete_parameters
from sparselet.merging.methods.breadcrumbs import breadcrumbs

cuts = st.sampled_from([(0.15, 0.006), (0.2, 0.1), (0.5, 0.5), (0.9, 0.0), (1.0, 0.0)])
populations = st.sampled_from(["size", "nonzeros"])


def combined(kept, weights, merge, scale=1.0):
    weighted = kept * torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    return elected_mean(kept, weights, scale=scale) if merge == "ties" else scale * weighted.sum(0)


@few
@given(same_shape(1, 4), factors, cuts, populations, st.sampled_from(["linear", "ties"]))
def test_breadcrumbs_is_the_dense_definition(deltas, weights, cut, density_of, merge):
    weights = weights[: len(deltas)]
    kept = torch.stack([band(x, *cut, density_of) for x in stacked(deltas)])
    found = breadcrumbs(deltas, weights, density=cut[0], gamma=cut[1], density_of=density_of, merge=merge, scale=0.5)
    assert_close(found, combined(kept, weights, merge, 0.5), (kept != 0).any(0))


@few
@given(st.lists(distinct(3, 3), min_size=1, max_size=3), cuts, populations)
def test_global_ranks_are_those_of_the_flattened_task_vectors(targets, cut, density_of):
    adapters = [SparseAdapter({f"layers.{t}.q": deltas[i] for t, deltas in enumerate(targets)}) for i in range(3)]
    parameters = {"density": cut[0], "gamma": cut[1], "density_of": density_of, "trim": "global"}
    merged = merge(adapters, "breadcrumbs", parameters=parameters)
    flat = torch.stack([torch.cat([stacked(deltas)[i].flatten() for deltas in targets]) for i in range(3)])
    kept = torch.stack([band(x, *cut, density_of) for x in flat])
    for t, part in enumerate(kept.split([deltas[0].size for deltas in targets], dim=1)):
        part = part.view(3, *targets[t][0].shape)
        assert_close(merged[f"layers.{t}.q"], part.sum(0), (part != 0).any(0))


def test_ranks_in_each_target_need_no_survey(monkeypatch):
    failing = replace(METHODS["breadcrumbs"], global_stats=lambda targets, parameters: pytest.fail("surveyed"))
    monkeypatch.setitem(METHODS, "breadcrumbs", failing)
    merge([SparseAdapter({"q": random_delta((6, 12))})], "breadcrumbs")


@pytest.mark.parametrize("merge", ["linear", "ties"])
@few
@given(distinct(1, 1))
def test_keeping_all_a_single_expert_is_itself_and_cancels_with_itself(merge, deltas):
    alone = breadcrumbs(deltas, [1.0], density=1.0, gamma=0.0, merge=merge)
    assert torch.equal(alone.to_dense(), deltas[0].to_dense())
    assert not breadcrumbs([deltas[0]] * 2, [1.0, -1.0], merge=merge).values.any()


@few
@given(distinct(2, 4), st.randoms(use_true_random=False))
def test_order_does_not_matter(deltas, random):
    shuffled = random.sample(deltas, len(deltas))
    ones = [1.0] * len(deltas)
    for how in ("linear", "ties"):
        first, again = (breadcrumbs(d, ones, density=0.5, merge=how).to_dense() for d in (deltas, shuffled))
        torch.testing.assert_close(first, again)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 0.25]])
@pytest.mark.parametrize(("density", "gamma"), [(0.15, 0.05), (0.35, 0.01), (0.9, 0.1), (0.5, 0.0)])
def test_breadcrumbs_is_mergekits(weights, density, gamma):
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    deltas = full_deltas(3)
    tensors = [torch.zeros(10, 20), *(d.to_dense() for d in deltas)]
    parameters = {"weight": weights, "density": density, "gamma": gamma, "lambda": 0.7}
    expected = mergekit.merge_tensors(tensors, "breadcrumbs", parameters=parameters, base_index=0)
    found = breadcrumbs(deltas, weights, density=density, gamma=gamma, scale=0.7)
    torch.testing.assert_close(found.to_dense(), expected)


def test_with_signs_it_is_mergekits_normalized():
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    deltas = full_deltas(3)
    tensors = [torch.zeros(10, 20), *(d.to_dense() for d in deltas)]
    parameters = {"weight": 1.0, "density": 0.35, "gamma": 0.05, "normalize": True}
    expected = mergekit.merge_tensors(tensors, "breadcrumbs_ties", parameters=parameters, base_index=0)
    found = breadcrumbs(deltas, [1.0] * 3, density=0.35, gamma=0.05, merge="ties")
    torch.testing.assert_close(found.to_dense(), expected)


def test_the_largest_go_and_the_next_stay():
    delta = SparseDelta((1, 10), torch.arange(10), torch.arange(1, 11).float())
    kept = breadcrumbs([delta], [1.0], density=0.3, gamma=0.2)
    assert kept.values.tolist() == [6.0, 7.0, 8.0]
    assert breadcrumbs([delta], [1.0], density=0.3, gamma=0.0).values.tolist() == [8.0, 9.0, 10.0]


def test_equal_magnitudes_at_either_bound_are_kept_and_zeros_never():
    delta = SparseDelta((1, 8), torch.arange(8), torch.tensor([3.0, -3.0, 2.0, 1.0, -1.0, 1.0, 0.0, 0.0]))
    kept = breadcrumbs([delta], [1.0], density=0.25, gamma=0.125)
    assert kept.values.tolist() == [3.0, -3.0, 2.0]
    assert breadcrumbs([delta], [1.0], density=0.5, gamma=0.25).values.tolist() == [2.0, 1.0, -1.0, 1.0]
    assert breadcrumbs([delta], [1.0], density=1.0, gamma=0.0).nnz == 6


def test_gamma_of_the_size_drops_more_of_a_sparse_expert_than_gamma_of_its_entries():
    sparse = normal(random_delta((12, 12), 1, 0.1, 3))
    kept = {p: breadcrumbs([sparse], [1.0], density=0.5, gamma=0.02, density_of=p).nnz for p in ("size", "nonzeros")}
    assert kept == {"size": sparse.nnz - 3, "nonzeros": round(0.5 * sparse.nnz)}


def test_all_empty_experts_stay_empty():
    assert breadcrumbs([SparseDelta.empty((2, 3))] * 2, [1.0, 1.0]).nnz == 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"gamma": 1.0}, r"gamma must be in \[0, 1\), got 1.0"),
        ({"gamma": -0.1}, r"gamma must be in \[0, 1\), got -0.1"),
        ({"gamma": 0.9}, "density and gamma must be at most 1 together, got 0.15 and 0.9"),
        ({"scale": None}, "scale must be a finite number, got None"),
        ({"trim": "row"}, "trim must be one of target, global"),
        ({"density_of": "mask"}, "density_of must be one of size, nonzeros"),
        ({"merge": "sum"}, "merge must be one of linear, ties"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(parameters, message):
    error = DensityOutOfRange if "density" in parameters else ArgumentError
    with pytest.raises(error, match=message):
        complete_parameters("breadcrumbs", parameters)
