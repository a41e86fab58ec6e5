"""SCE against its dense definition and mergekit."""

import itertools

import pytest
import torch
from helpers.dense_merges import factors
from helpers.strategies import few, random_delta, same_shape, spelt_out
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseDelta
from sparselet.errors import ArgumentError, DensityOutOfRange, ShapeMismatch
from sparselet.merging.methods.sce import sce


def most_varied(taus, density, density_of):
    """Which entries are selected, from τ [N, entries]. N² times the variance is the sum of all pairs' squared differences."""
    variance = sum(((one - other) ** 2 for one, other in itertools.combinations(taus, 2)), torch.zeros_like(taus[0]))
    varying = int((variance > 0).sum())
    if density == 1 or not varying:
        return torch.ones_like(variance, dtype=torch.bool)
    k = max(1, round(density * (varying if density_of == "nonzeros" else len(variance))))
    cutoff = variance.sort(descending=True).values[min(k, len(variance)) - 1]
    return (variance >= cutoff) & (variance > 0)


def dense_sce(taus, density, density_of, select):
    """τ [N, entries] in float64 to the merged entries, and which of them are merged."""
    chosen = most_varied(taus, density, density_of)
    energy = (taus**2 * chosen).sum(1)
    shares = energy / energy.sum() if energy.sum() else torch.full_like(energy, 1 / len(energy))
    agree = (taus.sign() == taus.sum(0).sign()) & (taus != 0)
    weight = shares[:, None] * agree
    merged = torch.where(weight.sum(0) > 0, (weight * taus).sum(0) / weight.sum(0), 0.0)
    return (merged * chosen, chosen) if select == "entries" else (merged, torch.ones_like(chosen))


@few
@given(
    same_shape(1, 4),
    factors,
    st.sampled_from([0.05, 0.3, 1.0]),
    st.sampled_from(["nonzeros", "size"]),
    st.sampled_from(["entries", "weights"]),
)
def test_sce_is_its_dense_definition(deltas, weights, density, density_of, select):
    weights = weights[: len(deltas)]
    dense, masks = zip(*map(spelt_out, deltas), strict=True)
    taus = torch.stack([w * d.reshape(-1) for w, d in zip(weights, dense, strict=True)])
    expected, merged = dense_sce(taus, density, density_of, select)
    found, mask = spelt_out(sce(deltas, weights, density=density, density_of=density_of, select=select))
    assert torch.equal(mask.reshape(-1), merged & torch.stack(masks).any(0).reshape(-1))
    torch.testing.assert_close(found.reshape(-1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [0.125, 0.5, 1.0])
def test_sce_equals_mergekits(density):
    api = pytest.importorskip("mergekit.merge_methods.api")
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(6, 12, generator=generator) * (i + 1) for i in range(3)]
    parameters = {"select_topk": density}
    expected = api.merge_tensors([torch.zeros(6, 12), *dense], "sce", parameters=parameters, base_index=0)
    found = sce([SparseDelta.from_dense(d) for d in dense], [1.0] * 3, density=density)
    torch.testing.assert_close(found.to_dense(), expected)


def test_small_deltas_are_merged_as_large_ones():
    """mergekit gives up on the experts' weights where the mean squares sum to less than 1e-6."""
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(6, 12, generator=generator) * (i + 1) for i in range(3)]
    large, small = (sce([SparseDelta.from_dense(d * s) for d in dense], [1.0] * 3).to_dense() for s in (1.0, 2.0**-20))
    assert torch.equal(small * 2.0**20, large)


def line(*values):
    return SparseDelta((1, len(values)), torch.arange(len(values)), torch.tensor(values))


def test_the_expert_that_changes_more_weighs_more():
    merged = sce([line(3.0, 3.0), line(1.0, 1.0)], [1, 1], density=1.0)
    assert merged.values.tolist() == pytest.approx([2.8, 2.8])  # shares 18 / 20 and 2 / 20


def test_minority_signs_are_erased():
    merged = sce([line(2.0, 1.0), line(-1.0, 1.0)], [1, 1], density=1.0)
    assert merged.values.tolist() == pytest.approx([2.0, 1.0])


def test_entries_that_all_share_are_not_selected():
    deltas = [line(5.0, 1.0), line(5.0, 2.0)]
    assert sce(deltas, [1, 1], density=0.9).indices.tolist() == [1]
    assert sce(deltas, [1, 1], density=0.9, density_of="size").indices.tolist() == [1]


def test_the_authors_code_merges_what_was_not_selected_too():
    deltas = [line(5.0, 1.0), line(5.0, 2.0)]
    merged = sce(deltas, [1, 1], density=0.9, select="weights")
    assert merged.values.tolist() == pytest.approx([5.0, 1.8])  # shares 1 / 5 and 4 / 5


def test_density_counts_what_varies_or_all():
    one, zero = line(4.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0), SparseDelta.empty((1, 8))
    assert sce([one, zero], [1, 1], density=0.34).indices.tolist() == [0]
    assert sce([one, zero], [1, 1], density=0.34, density_of="size").indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize("deltas", [[line(1.0, -2.0)], [line(1.0, -2.0)] * 3, [line(1.0, -2.0)] * 7])
def test_experts_that_do_not_vary_are_kept(deltas):
    merged = sce(deltas, [1.0] * len(deltas))
    torch.testing.assert_close(merged.values, deltas[0].values)


def test_a_vote_of_zero_elects_no_sign():
    assert sce([line(1.0, 2.0), line(-1.0, 1.0)], [1, 1], density=1.0).values.tolist() == pytest.approx([0.0, 12 / 7])


def test_tiles_stay_tiles_where_nothing_is_selected():
    tiles = [random_delta((6, 12), 3, 0.5, seed) for seed in (1, 2)]
    assert sce(tiles, [1, 1], density=1.0).block == (3, 3)
    assert sce(tiles, [1, 1], density=0.5).block == (1, 1)


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"density": 0}, DensityOutOfRange, r"density must be in \(0, 1\], got 0"),
        ({"density": 10}, DensityOutOfRange, "density must be in"),
        ({"density_of": "rows"}, ArgumentError, "density_of must be one of nonzeros, size, got 'rows'"),
        ({"select": "all"}, ArgumentError, "select must be one of entries, weights, got 'all'"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, error, message):
    with pytest.raises(error, match=message):
        sce([SparseDelta.empty((1, 1))] * 2, [1.0, 1.0], **parameters)


def test_other_shapes_are_refused():
    with pytest.raises(ShapeMismatch, match="different shapes"):
        sce([random_delta((6, 6)), random_delta((6, 12))], [1, 1])
