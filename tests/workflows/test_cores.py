"""Cores against their dense definition, and groups against reachability."""

import pytest
import torch
from helpers.dense_merges import full_deltas, largest, stacked
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseAdapter, SparseDelta, core, group
from sparselet.errors import ArgumentError, DensityOutOfRange
from sparselet.merging.methods.cpi import cpi
from sparselet.workflows.cores import components


def expert(*deltas):
    return SparseAdapter({f"layers.{i}.q": delta for i, delta in enumerate(deltas)})


@pytest.mark.parametrize("trim", ["global", "target"])
def test_a_core_holds_the_largest_changes_with_their_values(trim):
    small, large = full_deltas(2)
    made = expert(small.scale(0.01), large)
    found = core(made, 0.1, trim=trim)
    x = torch.cat([stacked([made[name]]).reshape(-1) for name in made])
    expected = largest(x, 0.1, "size") if trim == "global" else torch.cat([largest(p, 0.1, "size") for p in x.split(200)])
    assert torch.equal(torch.cat([found[name].to_dense().double().reshape(-1) for name in found]), expected)
    assert found.nnz == 40


def test_of_a_sparse_expert_the_core_lies_in_its_mask():
    (dense,) = full_deltas(1)
    sparse = dense.restrict(torch.rand(dense.shape, generator=torch.Generator().manual_seed(1)) < 0.3)
    for kind in ("largest", "random"):
        found = core(expert(sparse), 0.5, density_of="nonzeros", core=kind)
        assert found.nnz == pytest.approx(sparse.nnz / 2, abs=1)
        assert found["layers.0.q"].overlap(sparse) == found.nnz


@pytest.mark.parametrize("kind", ["largest", "random"])
def test_it_is_the_core_that_cpi_keeps(kind):
    first, base = full_deltas(2)
    found = core(expert(first), 0.1, core=kind, seed=3)["layers.0.q"]
    merged = cpi([first, base], [1.0, 1.0], density=0.1, core=kind, seed=3)
    assert torch.equal(merged.restrict(found).values, found.values)


def test_what_is_out_of_range_is_refused():
    made = expert(*full_deltas(1))
    with pytest.raises(DensityOutOfRange):
        core(made, 0.0)
    with pytest.raises(ArgumentError, match="core must be one of"):
        core(made, core="first")
    with pytest.raises(ArgumentError, match="threshold"):
        group([made], 0.0)


edges = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=12)


@given(edges)
def test_components_are_what_can_be_reached(pairs):
    reach = torch.eye(8, dtype=torch.bool)
    for a, b in pairs:
        reach[a, b] = reach[b, a] = True
    for _ in range(8):
        reach = (reach.float() @ reach.float()) > 0
    found = components(8, pairs)
    assert sorted(node for part in found for node in part) == list(range(8))
    assert all(
        reach[part][:, part].all() and not reach[part].any(0)[[n for n in range(8) if n not in part]].any() for part in found
    )
    assert [part[0] for part in found] == sorted(part[0] for part in found)


def masks(*sets):
    """Adapters whose masks are these sets of numbers below 100."""
    return [expert(SparseDelta((10, 10), torch.tensor(sorted(chosen)), torch.ones(len(chosen)))) for chosen in sets]


def test_linked_cores_are_one_group_at_the_threshold():
    a, b, c, d = set(range(10)), set(range(5, 15)), set(range(10, 20)), set(range(50, 60))
    groups, pairs = group(masks(a, c, b, d), threshold=5 / 15)
    assert groups == [[0, 1, 2], [3]]
    assert pairs[0, 2].jaccard == pytest.approx(5 / 15)
    assert pairs[0, 3].chance == pytest.approx(0.1 / 1.9)
    assert group(masks(a, c, b, d), threshold=0.34)[0] == [[0], [1], [2], [3]]


def test_targets_that_one_core_lacks_count_as_not_shared():
    one = SparseAdapter({"a": SparseDelta((10, 10), torch.arange(4), torch.ones(4))})
    both = SparseAdapter({"a": one["a"], "b": SparseDelta((10, 10), torch.arange(4), torch.ones(4))})
    overlap = group([one, both])[1][0, 1]
    assert (overlap.jaccard, overlap.size) == (0.5, 200)
