"""Merging against its dense definition (paper, Eq. 4), and from files against in memory."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_is, few, random_delta, same_shape, spelt_out

from sparselet import METHODS, SparseAdapter, SparseDelta, merge
from sparselet.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterFile
from sparselet.errors import ArgumentError, NonFiniteValue, OutputExists, ShapeMismatch, UnknownMethod, WriteFailed, WrongBase
from sparselet.fingerprint import fingerprint_weight
from sparselet.merging import merge_to, overlap, uniform

factors = st.integers(-4, 4).map(lambda n: n / 2)
Q, V = "layers.0.q", "layers.0.v"


def stacked(deltas):
    dense, masks = zip(*map(spelt_out, deltas), strict=True)
    return torch.stack(dense), torch.stack(masks)


def assert_close(delta, dense, mask):
    found, selected = spelt_out(delta)
    assert torch.equal(selected, mask)
    torch.testing.assert_close(found, dense, rtol=1e-6, atol=1e-7)


@few
@given(same_shape(1, 4), st.lists(factors, min_size=4, max_size=4))
def test_overlap_is_the_dense_sum_over_the_count_of_masks(deltas, weights):
    dense, masks = stacked(deltas)
    weights = weights[: len(deltas)]
    expected = (dense * torch.tensor(weights).view(-1, 1, 1)).sum(0) / masks.sum(0).clamp(min=1)
    assert_close(overlap(deltas, weights), expected, masks.any(0))


@few
@given(same_shape(1, 4))
def test_uniform_is_the_dense_mean(deltas):
    dense, masks = stacked(deltas)
    assert_close(uniform(deltas, [1.0] * len(deltas)), dense.mean(0), masks.any(0))


@few
@given(same_shape(2, 4), st.lists(st.integers(1, 5).map(lambda n: n / 2), min_size=4, max_size=4))
def test_uniform_with_weights_is_the_dense_weighted_mean(deltas, weights):
    dense, masks = stacked(deltas)
    weights = torch.tensor(weights[: len(deltas)])
    expected = (dense * weights.view(-1, 1, 1)).sum(0) / weights.sum()
    assert_close(uniform(deltas, weights.tolist()), expected, masks.any(0))


@few
@given(same_shape(1, 1), st.sampled_from(sorted(METHODS)))
def test_one_expert_with_weight_one_is_itself(deltas, method):
    merged = METHODS[method](deltas, [1.0])
    assert_is(merged, *spelt_out(deltas[0]))
    assert merged.block_size == deltas[0].block_size or merged.nnz == 0


@few
@given(same_shape(1, 1))
def test_weights_one_and_minus_one_cancel(deltas):
    merged = overlap([deltas[0], deltas[0]], [1.0, -1.0])
    assert_is(merged, torch.zeros(merged.shape), spelt_out(deltas[0])[1])


@few
@given(same_shape(1, 3), st.sampled_from(sorted(METHODS)), st.randoms(use_true_random=False))
def test_order_does_not_matter(deltas, method, random):
    shuffled = random.sample(deltas, len(deltas))
    ones = [1.0] * len(deltas)
    assert_close(METHODS[method](shuffled, ones), *spelt_out(METHODS[method](deltas, ones)))


def test_order_of_experts_with_rounding_matters_only_to_float_tolerance():
    generator = torch.Generator().manual_seed(0)
    deltas = [SparseDelta.from_dense(torch.randn(6, 12, generator=generator)) for _ in range(5)]
    for method in METHODS.values():
        forward, backward = method(deltas, [1.0] * 5), method(deltas[::-1], [1.0] * 5)
        torch.testing.assert_close(forward.values, backward.values)


def test_an_entry_selected_with_value_zero_counts():
    one, zero = (SparseDelta((1, 2), torch.tensor([0]), torch.tensor([value])) for value in (1.0, 0.0))
    assert overlap([one, zero], [1, 1]).values.tolist() == [0.5]
    assert overlap([zero, zero], [1, 1]).nnz == 1


@pytest.mark.parametrize("method", METHODS)
def test_tiles_of_one_size_stay_tiles_and_others_become_entries(method):
    tiles, other_tiles, other_block = (random_delta((6, 12), b, 0.5, s) for b, s in ((3, 1), (3, 2), (2, 3)))
    empty = SparseDelta.empty((6, 12))
    assert METHODS[method]([tiles, other_tiles, empty], [1, 1, 1]).block_size == 3
    assert METHODS[method]([tiles, other_block], [1, 1]).block_size == 1
    assert METHODS[method]([empty, empty], [1, 1]).nnz == 0


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_experts_are_summed_in_float32(method):
    low = SparseDelta((1, 1), torch.tensor([0]), torch.tensor([256.0], dtype=torch.bfloat16))
    high = SparseDelta((1, 1), torch.tensor([0]), torch.tensor([1.0], dtype=torch.bfloat16))
    merged = METHODS[method]([low, high], [1, 1])
    assert merged.values.dtype == torch.float32
    assert merged.values.tolist() == [128.5]


def test_overlap_equals_mergekits_ram_with_epsilon_zero():
    ram = pytest.importorskip("mergekit.merge_methods.ram")
    dense = [spelt_out(random_delta((6, 12), b, 0.5, s))[0].float() for b, s in ((1, 1), (2, 2), (3, 3))]
    expected = ram.ram_merge(tensors=dense, base_tensor=torch.zeros(6, 12), epsilon=0.0)
    found = overlap([SparseDelta.from_dense(d) for d in dense], [1, 1, 1])
    torch.testing.assert_close(found.to_dense(), expected)


def expert(seed, block_size=1, names=(Q, V), shape=(6, 12), base=None, **metadata):
    deltas = {name: random_delta(shape, block_size, 0.4, seed + i) for i, name in enumerate(names)}
    fingerprints = None if base is None else {name: fingerprint_weight(base) for name in names}
    return SparseAdapter(deltas, {"task": f"task {seed}", "base_model_name_or_path": "base", **metadata}, fingerprints)


def mixed_experts():
    """Element and tile masks; each lacks a target that another has."""
    return [expert(1), expert(11, 3, (Q,)), expert(21, 3, (V, "layers.1.q")), expert(31, 1, ())]


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_target_counts_as_no_change(method):
    merged = merge(mixed_experts(), method)
    empty = SparseDelta.empty((6, 12))
    assert sorted(merged) == [Q, V, "layers.1.q"]
    for name in merged:
        parts = [adapter.get(name, empty) for adapter in mixed_experts()]
        assert_is(merged[name], *spelt_out(METHODS[method](parts, [1.0] * 4)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_merging_files_to_a_file_is_merging_in_memory_byte_for_byte(tmp_path, method, dtype):
    paths = [adapter.save(tmp_path / str(i), dtype) for i, adapter in enumerate(mixed_experts())]
    weights = [1.0, 0.5, 2.0, 1.0]
    written = []
    merge_to(tmp_path / "streamed", paths, method, weights, progress=written.append)
    merge([SparseAdapter.load(path) for path in paths], method, weights).save(tmp_path / "in memory")
    assert written == [Q, V, "layers.1.q"]
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "in memory" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "streamed").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_a_merged_file_loads_and_says_how_it_was_merged(tmp_path):
    adapters = [expert(1, 3), expert(2, 3)]
    merged = SparseAdapter.load(merge_to(tmp_path / "out", adapters, "uniform", [1, 3]))
    assert merged.metadata["merge"]["method"] == "uniform"
    assert merged.metadata["merge"]["weights"] == [1.0, 3.0]
    assert [e["task"] for e in merged.metadata["merge"]["experts"]] == ["task 1", "task 2"]
    assert merged.metadata["base_model_name_or_path"] == "base"
    assert merged.metadata["block_size"] == 3
    assert merged.metadata["density"] == merged.density


def test_paths_and_adapters_merge_alike(tmp_path):
    adapters = [expert(1), expert(2, 2)]
    path = adapters[1].save(tmp_path / "second")
    found = merge([adapters[0], str(path)])
    for name, delta in merge(adapters).items():
        assert_is(found[name], *spelt_out(delta))


def test_a_plain_mapping_of_deltas_can_be_merged():
    merged = merge([{Q: random_delta((6, 12))}, expert(2)])
    assert sorted(merged) == [Q, V]


def test_asking_whether_a_file_has_a_target_reads_no_tensor(tmp_path, monkeypatch):
    file = AdapterFile(expert(1).save(tmp_path / "a"))
    monkeypatch.setattr(AdapterFile, "__getitem__", lambda *_: pytest.fail("read a tensor"))
    assert Q in file
    assert "layers.9.q" not in file


def test_merging_keeps_the_fingerprint_of_the_base(tmp_path):
    base = torch.arange(72.0).view(6, 12)
    merged = merge([expert(1), expert(2, base=base), expert(3, base=base.bfloat16())])
    assert merged.fingerprints[Q] == fingerprint_weight(base)


def assert_refused(error, message, adapters, tmp_path, method="overlap", weights=None, parameters=None):
    """Both ways of merging refuse, before anything is written."""
    with pytest.raises(error, match=message):
        merge(adapters, method, weights, parameters)
    with pytest.raises(error, match=message):
        merge_to(tmp_path / "out", adapters, method, weights, parameters, lambda name: pytest.fail(f"merged {name}"))
    assert not any(p.name.startswith((".out", "out")) for p in tmp_path.iterdir())


def test_no_expert_is_refused(tmp_path):
    assert_refused(ArgumentError, "no adapter to merge", [], tmp_path)


def test_an_unknown_method_lists_those_there_are(tmp_path):
    assert_refused(UnknownMethod, f"'mean'; there are {', '.join(METHODS)}", [expert(1)], tmp_path, "mean")


@pytest.mark.parametrize("method", ["overlap", "uniform"])
def test_a_parameter_the_method_does_not_take_is_refused(tmp_path, method):
    message = f"{method} has no parameter 'density'; it takes none"
    assert_refused(UnknownMethod, message, [expert(1)], tmp_path, method, None, {"density": 0.2})


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 1.0, 1.0]])
def test_a_wrong_number_of_weights_is_refused(tmp_path, weights):
    message = f"2 adapters need as many weights, got {len(weights)}"
    assert_refused(ArgumentError, message, [expert(1), expert(2)], tmp_path, weights=weights)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(tmp_path, weight):
    assert_refused(ArgumentError, "weights must be finite", [expert(1), expert(2)], tmp_path, weights=[1.0, weight])


def test_experts_of_different_shapes_are_refused(tmp_path):
    message = rf"{Q}: adapter 2 has shape \[12, 6\], an earlier one \[6, 12\]"
    assert_refused(ShapeMismatch, message, [expert(1), expert(2, shape=(12, 6))], tmp_path)
    with pytest.raises(ShapeMismatch, match="different shapes"):
        overlap([random_delta((6, 12)), random_delta((12, 6))], [1, 1])


def test_experts_of_different_base_models_are_refused_before_any_target_is_merged(tmp_path):
    bases = [torch.full((6, 12), value) for value in (1.0, 2.0)]
    adapters = [expert(i, base=base).save(tmp_path / f"expert{i}") for i, base in enumerate(bases)]
    assert_refused(
        WrongBase, "expert1 and the adapters before it: the base weights differ in 2 of 2 targets", adapters, tmp_path
    )


def test_an_expert_with_modules_trained_in_full_is_refused(tmp_path):
    adapter = SparseAdapter({Q: random_delta((6, 12))}, {"modules_to_save": ["score"]}, modules={"score.weight": torch.ones(2)})
    for refused in (adapter, adapter.save(tmp_path / "trained")):
        assert_refused(ArgumentError, "modules_to_save", [expert(1), refused], tmp_path)


def test_uniform_refuses_weights_that_sum_to_zero_and_names_the_target():
    with pytest.raises(ArgumentError, match=f"{Q}: uniform divides by the sum of the weights"):
        merge([expert(1), expert(2)], "uniform", [1, -1])


def test_an_output_that_exists_is_refused_and_untouched(tmp_path):
    kept = tmp_path / "out" / "note"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(OutputExists, match="out exists already"):
        merge_to(kept.parent, [expert(1)])
    assert [p.name for p in kept.parent.iterdir()] == ["note"]


def test_an_empty_directory_is_a_free_output(tmp_path):
    (tmp_path / "out").mkdir()
    assert len(SparseAdapter.load(merge_to(tmp_path / "out", [expert(1)]))) == 2


def spoil_last_value(path, value):
    """Overwrite the file's last value, which belongs to the last target."""
    file = path / WEIGHTS_FILE
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header[f"base_model.model.{V}.sparse_values"]["data_offsets"][1] == max(
        record["data_offsets"][1] for name, record in header.items() if name != "__metadata__"
    )
    file.write_bytes(raw[:-4] + torch.tensor([value]).numpy().tobytes())


def test_an_expert_file_found_wrong_halfway_leaves_nothing_behind(tmp_path):
    paths = [expert(i).save(tmp_path / f"expert{i}") for i in (1, 2)]
    spoil_last_value(paths[1], float("nan"))
    written = []
    with pytest.raises(NonFiniteValue, match=rf"expert2.*{V}: .*1 of \d+ values are NaN or infinite"):
        merge_to(tmp_path / "out", paths, progress=written.append)
    assert written == [Q]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expert1", "expert2"]


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_value_beyond_float32_is_refused(tmp_path, method):
    huge = {Q: SparseDelta((1, 1), torch.tensor([0]), torch.tensor([3e38]))}
    for attempt in (lambda: merge([huge, huge], method), lambda: merge_to(tmp_path / "out", [huge, huge], method)):
        with pytest.raises(NonFiniteValue, match=f"{Q}: 1 of 1 values are NaN or infinite"):
            attempt()
    assert not any(tmp_path.iterdir())


def test_a_disk_that_fails_halfway_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WriteFailed, match=r"No space left on device\. Nothing was changed"):
        merge_to(tmp_path / "out", [expert(1)])
    assert not any(tmp_path.iterdir())
