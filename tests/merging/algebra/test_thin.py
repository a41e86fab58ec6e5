"""Targets of which next to nothing is selected: merged as any other, in the memory of their entries."""

import math
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselet import METHODS, SparseAdapter, SparseDelta, merge
from sparselet.adapter import AdapterFile
from sparselet.delta import MAX_ENTRIES, MAX_SIDE, block_for
from sparselet.errors import AbsurdShape, BadDtype, NotEnoughMemory
from sparselet.kernels import values_shape
from sparselet.merging import merge_per_expert, merge_to, merge_with_counts, update_merge
from sparselet.merging.algebra import entries
from sparselet.merging.methods import complete_parameters, per_expert_methods

HUGE = [(2**19, 2**19), (MAX_SIDE, MAX_ENTRIES // MAX_SIDE), (MAX_ENTRIES // MAX_SIDE, MAX_SIDE)]
LARGE = [(2**15, 2**15), (MAX_SIDE, 28), (28, MAX_SIDE)]  # whose entries int32 can number
OPTIONS = [{}, {"density_of": "nonzeros"}, {"trim": "target"}, {"trim": "global"}, {"select": "weights"}, {"merge": "ties"}]
CASES = [
    (method, options)
    for method in (name for name, record in METHODS.items() if not record.needs_profiles)
    for options in OPTIONS
    if set(options) <= set(complete_parameters(method, {})) and not (method == "dare" and "trim" in options)
]


def delta(shape, count, seed, block_size=1):
    draw = torch.Generator().manual_seed(seed)
    block = block_for(block_size, shape)
    chosen = torch.unique(torch.randint(math.prod(shape) // math.prod(block), (count,), generator=draw))
    return SparseDelta(shape, chosen, torch.randn(values_shape(len(chosen), block), generator=draw))


@pytest.fixture
def spelt_out(monkeypatch):
    """Switches between the two ways of merging."""

    def switch(wanted):
        monkeypatch.setattr(entries, "SMALL_TARGET", 2**60 if wanted else 0)
        monkeypatch.setattr(entries, "MAX_BLOCKS_PER_SELECTED", 0)

    return switch


def equal(first, second):
    return (
        (first.shape, first.block) == (second.shape, second.block)
        and torch.equal(first.indices, second.indices)
        and first.indices.dtype == second.indices.dtype
        and torch.equal(first.values, second.values)
    )


@pytest.mark.parametrize(("method", "options"), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize(
    "sides", [(1, 1, 1), (4, 4, 4), (1, 4, 2), ("row",) * 3, ("column",) * 3, ("row", 4, "column")], ids=str
)
def test_no_bit_depends_on_whether_the_target_is_spelt_out(spelt_out, method, options, sides):
    deltas = [delta((16, 24), 40, seed, side) for seed, side in enumerate(sides)] + [SparseDelta.empty((16, 24))]
    experts, weights = [{"layer": one} for one in deltas], [1.0, -0.5, 2.0, 1.0]
    found = []
    for whole in (True, False):
        spelt_out(whole)
        found.append(merge(experts, method, weights, options)["layer"])
    assert equal(*found)


@pytest.mark.parametrize("method", per_expert_methods())
def test_no_bit_of_a_single_experts_part_depends_on_it(spelt_out, method):
    deltas = [delta((16, 24), 40, seed, side) for seed, side in enumerate((1, 4, 4))]
    found = []
    for whole in (True, False):
        spelt_out(whole)
        found.append(METHODS[method].per_expert(deltas, [1.0, -0.5, 2.0]))
    assert all(map(equal, *found))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=3), st.sampled_from([1, 2, 4]), st.integers(0, 9))
def test_compact_deltas_go_back_to_their_places(counts, side, seed):
    deltas = [delta((2**13, 2**12), count, seed + i, side) for i, count in enumerate(counts)]
    small, places = entries.compact(entries.common_blocks(deltas))
    for one, other in zip(deltas, small, strict=True):
        assert other.blocks <= max(1, 2 * sum(counts))
        assert torch.equal(places.delta(other.indices.long(), other.values).expand().indices, one.expand().indices)


def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@pytest.mark.parametrize("shape", [*HUGE, *LARGE], ids=str)
def test_huge_targets_take_the_memory_of_their_entries(tmp_path, shape):
    for seed in range(2):
        SparseAdapter({"q": delta(shape, 3, seed), "r": delta(shape, 3, seed, 4)}).save(tmp_path / f"e{seed}")
    paths, before = [tmp_path / "e0", tmp_path / "e1"], memory()
    for method in (name for name, record in METHODS.items() if record.dense and not record.needs_profiles):
        with pytest.raises((AbsurdShape, NotEnoughMemory)):
            merge(paths, method)
    for method in (name for name, record in METHODS.items() if not record.dense):
        assert merge(paths, method).keys() == {"q", "r"}
        if shape in LARGE:
            merge_to(tmp_path / method, paths, method)
        else:
            with pytest.raises(BadDtype, match=r"q\.sparse_indices: .*got torch\.int64"):
                merge_to(tmp_path / method, paths, method)
    for method in (name for name, m in METHODS.items() if m.global_stats):
        for trim in ("global", "target"):
            merge(paths, method, None, {"trim": trim})
    assert memory() - before < 300  # MiB


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_parts_and_counts_of_large_targets_take_the_memory_of_their_entries(tmp_path, shape):
    for seed in range(2):
        SparseAdapter({"q": delta(shape, 3, seed), "r": delta(shape, 3, seed, 4)}).save(tmp_path / f"e{seed}")
    paths, before = [tmp_path / "e0", tmp_path / "e1"], memory()
    for method in per_expert_methods():
        merge_per_expert(tmp_path / f"{method}-each", paths, method)
    merge_with_counts(tmp_path / "counted", paths)
    update_merge(tmp_path / "one", tmp_path / "counted", remove=paths[1:])
    assert equal(AdapterFile(tmp_path / "one")["q"], AdapterFile(paths[0])["q"])
    assert memory() - before < 300
