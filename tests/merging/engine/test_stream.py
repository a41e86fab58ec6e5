"""Merging target by target: from files to a file as in memory, whole or not at all."""

import os
import re
import resource

import pytest
import torch
from helpers.made_experts import OTHER, Q, V, contents, expert, mixed_experts, names_in, saved
from helpers.strategies import assert_is, random_delta, spelt_out

from sparselet import METHODS, SparseAdapter, SparseDelta, merge
from sparselet.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterFile
from sparselet.delta import block_for
from sparselet.errors import ArgumentError, BadContainer, MissingFile, NonFiniteValue, OutputExists, WriteFailed
from sparselet.fingerprint import fingerprint_weight
from sparselet.merging import merge_to

# Methods that look at each target by itself, and at nothing else, with their defaults.
BY_TARGET = [name for name in METHODS if name not in ("ties", "breadcrumbs", "localize", "cpi", "regmean")]


@pytest.fixture
def restored_threads():
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)


@pytest.mark.parametrize("method", BY_TARGET)
def test_a_missing_target_counts_as_no_change(method):
    merged = merge(mixed_experts(), method)
    empty = SparseDelta.empty((6, 12))
    assert sorted(merged) == [Q, V, OTHER]
    for name in merged:
        parts = [one.get(name, empty) for one in mixed_experts()]
        assert_is(merged[name], *spelt_out(METHODS[method].function(parts, [1.0] * 4)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("blocks", "dtype"), [((1, 3, 3, 1), None), ((1, 3, 3, 1), torch.bfloat16), (("row",) * 4, None)])
def test_merging_files_to_a_file_is_merging_in_memory_byte_for_byte(tmp_path, method, blocks, dtype):
    paths = saved(tmp_path, mixed_experts(blocks), dtype)
    weights = [1.0, 0.5, {"*": 2.0, "*.v": 0.25}, 1.0]
    written = []
    merge_to(tmp_path / "streamed", paths, method, weights, progress=written.append)
    merge([SparseAdapter.load(path) for path in paths], method, weights).save(tmp_path / "in memory")
    assert written == [Q, V, OTHER]
    assert contents(tmp_path / "streamed") == contents(tmp_path / "in memory")
    assert names_in(tmp_path / "streamed") == [CONFIG_FILE, WEIGHTS_FILE]


@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, method, restored_threads):
    names = tuple(f"layers.{i}.{part}" for i in range(4) for part in "qkv")
    paths = saved(tmp_path, [expert(1, names=names), expert(30, 3, names), expert(60, names=names[::2])])
    found = []
    for workers in (1, 2, 3, None):
        written = []
        out = merge_to(tmp_path / f"out{workers}", paths, method, workers=workers, progress=written.append)
        assert written == sorted(names)
        found.append(contents(out))
    assert found == [found[0]] * 4


def test_a_merged_file_loads_and_says_what_it_is(tmp_path):
    base = torch.arange(72.0).view(6, 12)
    merged = SparseAdapter.load(merge_to(tmp_path / "out", [expert(1, 3, base=base), expert(2, 3)], "uniform", [1, 3]))
    assert merged.metadata.base_model_name_or_path == "base"
    assert merged.metadata.block_size == 3
    assert merged.metadata.density == merged.density
    assert merged.fingerprints[Q] == fingerprint_weight(base)


@pytest.mark.parametrize("block_size", ["row", "column"])
def test_a_merge_of_rows_says_what_its_experts_say(tmp_path, block_size):
    experts = [expert(seed, block_size, block_size=block_size) for seed in (1, 2)]
    for method, expected in (("overlap", block_size), ("ties", 1)):
        out = merge_to(tmp_path / method, experts, method)
        merged = SparseAdapter.load(out)
        assert merged.metadata.block_size == expected
        assert {delta.block for delta in merged.values()} == {block_for(expected, (6, 12))}
        assert contents(merge(experts, method).save(tmp_path / f"{method} in memory")) == contents(out)


def test_paths_and_adapters_merge_alike(tmp_path):
    experts = [expert(1), expert(2, 2)]
    path = experts[1].save(tmp_path / "second")
    found = merge([experts[0], str(path)])
    for name, delta in merge(experts).items():
        assert_is(found[name], *spelt_out(delta))


def test_a_plain_mapping_of_deltas_can_be_merged():
    assert sorted(merge([{Q: random_delta((6, 12))}, expert(2)])) == [Q, V]


def test_the_same_expert_twice_counts_twice():
    one = expert(1)
    for name, delta in merge([one, one], "arithmetic", [1, -1]).items():
        assert not delta.values.any()
        assert delta.nnz == one[name].nnz


def test_asking_whether_a_file_has_a_target_reads_no_tensor(tmp_path, monkeypatch):
    file = AdapterFile(expert(1).save(tmp_path / "a"))
    monkeypatch.setattr(AdapterFile, "__getitem__", lambda *_: pytest.fail("read a tensor"))
    assert Q in file
    assert "layers.9.q" not in file


def test_more_experts_than_a_process_may_have_files_open(tmp_path):
    path = expert(1).save(tmp_path / "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    now = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (now + 20, hard))
    try:
        found = merge([path] * 40, workers=3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for name, delta in merge([expert(1)] * 40).items():
        assert_is(found[name], *spelt_out(delta))


@pytest.mark.parametrize("how", ["replaced", "cut", "gone"])
def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path, how):
    path = expert(1).save(tmp_path / "a")
    opened, file = AdapterFile(path), path / WEIGHTS_FILE
    if how == "replaced":
        expert(2).save(path)
    elif how == "cut":
        os.truncate(file, file.stat().st_size - 4)
    else:
        file.unlink()
    error = MissingFile if how == "gone" else BadContainer
    with pytest.raises(error, match=f"{re.escape(str(file))}.* (was replaced or cut short|can no longer be read)"):
        merge([opened])


# What goes wrong


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_of_the_method_names_the_target_and_leaves_nothing(tmp_path, workers, restored_threads):
    experts = [expert(1), expert(2)]
    for attempt in (
        lambda: merge(experts, "uniform", [{"*": 1, "*.v": -1}, 1], workers=workers),
        lambda: merge_to(tmp_path / "out", experts, "uniform", [{"*": 1, "*.v": -1}, 1], workers=workers),
    ):
        with pytest.raises(ArgumentError, match=f"^{V}: uniform divides by the sum of the weights"):
            attempt()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["overlap", "arithmetic", "ties"])
def test_a_merged_value_beyond_float32_is_refused(tmp_path, method):
    huge = {Q: SparseDelta((1, 1), torch.tensor([0]), torch.tensor([3e38]))}
    for attempt in (
        lambda: merge([huge, huge], method, [4.0, 4.0]),
        lambda: merge_to(tmp_path / "out", [huge, huge], method, [4.0, 4.0]),
    ):
        with pytest.raises(NonFiniteValue, match=f"{Q}: 1 of 1 values are NaN or infinite"):
            attempt()
    assert not any(tmp_path.iterdir())


def test_no_workers_are_refused_before_anything_is_written(tmp_path):
    for attempt in (
        lambda: merge([expert(1)], workers=0),
        lambda: merge_to(tmp_path / "out", [expert(1)], workers=0),
    ):
        with pytest.raises(ArgumentError, match="workers must be at least 1, got 0"):
            attempt()
    assert not any(tmp_path.iterdir())


def test_an_output_that_exists_is_refused_before_an_expert_is_opened_and_untouched(tmp_path):
    kept = tmp_path / "out" / "note"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(OutputExists, match="out exists already"):
        merge_to(kept.parent, [tmp_path / "nothing"])
    assert names_in(kept.parent) == ["note"]


def test_an_empty_directory_is_a_free_output(tmp_path):
    (tmp_path / "out").mkdir()
    assert len(SparseAdapter.load(merge_to(tmp_path / "out", [expert(1)]))) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fails_halfway_leaves_nothing_behind(tmp_path, monkeypatch, workers, restored_threads):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(WriteFailed, match=r"No space left on device\. Nothing was changed") as caught:
            merge_to(tmp_path / "out", [expert(1)], workers=workers)
    assert not any(tmp_path.iterdir())
    assert torch.get_num_threads() == 3  # although the error, and with it the merge's frame, is still held
    assert caught


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_while_writing_puts_everything_back(tmp_path, workers, restored_threads):
    def interrupt(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        merge_to(tmp_path / "out", [expert(1), expert(2)], workers=workers, progress=interrupt)
    assert torch.get_num_threads() == 3
    assert not any(tmp_path.iterdir())
    assert caught
