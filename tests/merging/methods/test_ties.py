"""TIES against its dense definition, mergekit and PEFT."""

from dataclasses import replace

import pytest
import torch
from helpers.dense_merges import assert_close, densities, distinct, elected_mean, factors, full_deltas, largest, normal, stacked
from helpers.strategies import few, random_delta, same_shape, spelt_out
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseAdapter, SparseDelta, merge
from sparselet.errors import ArgumentError, DensityOutOfRange
from sparselet.merging.methods import METHODS, complete_parameters
from sparselet.merging.methods.ties import ties

populations = st.sampled_from(["size", "nonzeros"])


@few
@given(same_shape(1, 4), factors, densities, populations, st.sampled_from(["sum", "weighted", "count"]))
def test_ties_is_the_dense_definition(deltas, weights, density, density_of, elect):
    weights = weights[: len(deltas)]
    trimmed = torch.stack([largest(x, density, density_of) for x in stacked(deltas)])
    for mean in ("count", "weights"):
        merged = ties(deltas, weights, density=density, density_of=density_of, elect=elect, mean=mean, scale=1.5)
        assert_close(merged, elected_mean(trimmed, weights, elect, mean, 1.5), (trimmed != 0).any(0))


@few
@given(st.lists(distinct(3, 3), min_size=1, max_size=3), densities, populations)
def test_global_trimming_is_that_of_the_flattened_task_vectors(targets, density, density_of):
    adapters = [SparseAdapter({f"layers.{t}.q": deltas[i] for t, deltas in enumerate(targets)}) for i in range(3)]
    merged = merge(adapters, "ties", parameters={"density": density, "density_of": density_of})
    flat = torch.stack([torch.cat([stacked(deltas)[i].flatten() for deltas in targets]) for i in range(3)])
    trimmed = torch.stack([largest(x, density, density_of) for x in flat]).unsqueeze(1)
    expected = elected_mean(trimmed, [1.0] * 3).flatten()
    sizes = [deltas[0].size for deltas in targets]
    masks = (trimmed != 0).any(0).flatten().split(sizes)
    for t, (values, mask) in enumerate(zip(expected.split(sizes), masks, strict=True)):
        shape = targets[t][0].shape
        assert_close(merged[f"layers.{t}.q"], values.view(shape), mask.view(shape))


def test_trimming_each_target_needs_no_survey(monkeypatch):
    failing = replace(METHODS["ties"], global_stats=lambda targets, parameters: pytest.fail("surveyed"))
    monkeypatch.setitem(METHODS, "ties", failing)
    merge([SparseAdapter({"q": random_delta((6, 12))})], "ties", parameters={"trim": "target"})


@few
@given(distinct(1, 1))
def test_with_density_one_a_single_expert_is_itself_and_cancels_with_itself(deltas):
    assert torch.equal(ties(deltas, [1.0], density=1.0).to_dense(), deltas[0].to_dense())
    assert not ties([deltas[0]] * 2, [1.0, -1.0]).values.any()


@few
@given(distinct(2, 4), st.randoms(use_true_random=False))
def test_order_does_not_matter(deltas, random):
    shuffled = random.sample(deltas, len(deltas))
    ones = [1.0] * len(deltas)
    torch.testing.assert_close(ties(shuffled, ones).to_dense(), ties(deltas, ones).to_dense())


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 0.25], [1.0, -0.75, 0.5]])
@pytest.mark.parametrize("density", [0.1, 0.35, 1.0])
@pytest.mark.parametrize("sparse", [1.0, 0.3])
def test_ties_of_one_target_is_mergekits(weights, density, sparse):
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    deltas = full_deltas(3, density=sparse)
    tensors = [torch.zeros(10, 20), *(d.to_dense() for d in deltas)]
    parameters = {"weight": weights, "density": density, "lambda": 0.7}
    expected = mergekit.merge_tensors(tensors, "ties", parameters=parameters, base_index=0)
    merged = ties(deltas, weights, density=density, trim="target", elect="weighted", mean="weights", scale=0.7)
    torch.testing.assert_close(merged.to_dense(), expected)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 0.25], [1.0, -1.0, 0.5]])
@pytest.mark.parametrize(("elect", "theirs"), [("sum", "total"), ("count", "frequency")])
def test_ties_of_one_target_is_pefts(weights, elect, theirs):
    peft = pytest.importorskip("peft.utils.merge_utils")
    deltas = full_deltas(3)
    expected = peft.ties([d.to_dense() for d in deltas], torch.tensor(weights), 0.35, theirs)
    found = ties(deltas, weights, density=0.35, elect=elect).to_dense()
    trimmed = torch.stack([largest(x, 0.35, "size") for x in stacked(deltas)])
    split = trimmed.sign().sum(0) == 0 if elect == "count" else torch.zeros_like(found, dtype=torch.bool)
    torch.testing.assert_close(found[~split], expected[~split])
    assert not found[split].any()  # there they take the positive ones


def test_density_of_the_size_trims_nothing_of_a_sparser_expert():
    sparse = normal(random_delta((12, 6), 1, 0.1, 3))
    assert ties([sparse], [1.0], density=0.2).nnz == sparse.nnz
    assert ties([sparse], [1.0], density=0.5, density_of="nonzeros").nnz == round(0.5 * sparse.nnz)


def test_k_is_rounded_and_at_least_one_and_ties_of_magnitude_are_all_kept():
    deltas = full_deltas(1, (10, 10))
    assert [ties(deltas, [1.0], density=d).nnz for d in (0.29, 0.296, 0.001)] == [29, 30, 1]
    equal = SparseDelta((1, 4), torch.arange(4), torch.tensor([1.0, -1.0, 1.0, 0.5]))
    assert ties([equal], [1.0], density=0.25).indices.tolist() == [0, 1, 2]


def test_zeros_are_never_kept():
    zeros = SparseDelta((1, 4), torch.arange(4), torch.tensor([0.0, 0.0, 2.0, 0.0]))
    assert ties([zeros], [1.0], density=1.0).indices.tolist() == [2]


def test_disjoint_masks_are_scaled_by_their_own_weight_and_empty_experts_count_for_nothing():
    left, right = (SparseDelta((1, 2), torch.tensor([i]), torch.tensor([1.0 + i])) for i in (0, 1))
    merged = ties([left, right, SparseDelta.empty((1, 2))], [2.0, 3.0, 5.0], density=1.0)
    assert merged.values.tolist() == [2.0, 6.0]
    assert ties([SparseDelta.empty((1, 2))] * 2, [1.0, 1.0]).nnz == 0


def test_tiles_are_trimmed_entry_by_entry():
    tiles = normal(random_delta((6, 12), 3, 0.5))
    merged = ties([tiles], [1.0], density=0.3, density_of="nonzeros")
    assert (merged.block, merged.nnz) == ((1, 1), round(0.3 * tiles.nnz))
    assert spelt_out(merged)[1].sum() == merged.nnz


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"scale": float("inf")}, "scale must be a finite number, got inf"),
        ({"trim": "layer"}, "trim must be one of target, global"),
        ({"density_of": "mask"}, "density_of must be one of size, nonzeros"),
        ({"elect": "frequency"}, "elect must be one of sum, weighted, count"),
        ({"mean": "none"}, "mean must be one of count, weights"),
        ({"density": 0}, r"density must be in \(0, 1\], got 0"),
        ({"density": 20}, "It is a fraction, not a percentage"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(parameters, message):
    error = DensityOutOfRange if "density" in parameters else ArgumentError
    with pytest.raises(error, match=message):
        complete_parameters("ties", parameters)
