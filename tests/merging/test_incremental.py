"""Merges that keep their counts: exact, whatever the order and whoever came and went; and everything wrong with the files."""

import json
import shutil
import tempfile
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.made_experts import OTHER, Q, V, contents, expert, names_in, patterns, saved, weights
from helpers.strategies import few, random_delta, spelt_out
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseAdapter, SparseDelta, merge
from sparselet.adapter import CONFIG_FILE, WEIGHTS_FILE
from sparselet.errors import (
    ArgumentError,
    BadConfig,
    BadContainer,
    BadCounts,
    BadDtype,
    BadShape,
    MissingFile,
    MissingTensor,
    NonFiniteValue,
    OutputExists,
    SparseletError,
    UnknownTensor,
    WrongBase,
)
from sparselet.merging import merge_with_counts, update_merge
from sparselet.merging.incremental import COUNTS_FILE, MAX_SUM, SUM_STEP

FILES = [CONFIG_FILE, WEIGHTS_FILE, COUNTS_FILE]


@st.composite
def several_experts(draw):
    """Two to five experts of one kind of mask and no nice values, some without a target, one perhaps without any entry."""
    side = draw(st.sampled_from([1, 1, 3]))
    base = draw(st.sampled_from([None, torch.ones(6, 12)]))
    experts = []
    for i in range(draw(st.integers(2, 5))):
        names = draw(st.sampled_from([(Q, V, OTHER), (Q, V), (V,), (OTHER,)]))
        density = draw(st.sampled_from([0.3, 0.6, 1.0])) if i else draw(st.sampled_from([0.0, 0.3, 1.0]))
        one = expert(100 * i + draw(st.integers(1, 50)), side, names, base=base, density=density)
        factor = draw(st.sampled_from([1.0, 1 / 3, 1e-5]))
        experts.append(SparseAdapter({n: d.scale(factor) for n, d in one.items()}, one.metadata, one.fingerprints))
    return experts


def drawn_weight(draw, one):
    """A number, or patterns that match a target of the expert."""
    weight = draw(weights | patterns)
    return weight if not isinstance(weight, dict) else {p: w for p, w in weight.items() if any(fnmatchcase(n, p) for n in one)}


@few
@given(several_experts(), st.data())
def test_whoever_came_and_went_in_whatever_order_the_bytes_are_those_of_a_new_merge(experts, data):
    everyone = range(len(experts))
    factors = [drawn_weight(data.draw, one) for one in experts]
    inside = data.draw(st.lists(st.sampled_from(everyone), min_size=1, unique=True))
    with tempfile.TemporaryDirectory() as directory:
        path = merge_with_counts(Path(directory) / "0", [experts[i] for i in inside], [factors[i] for i in inside])
        for step in range(1, 4):
            after = data.draw(st.lists(st.sampled_from(everyone), min_size=1, unique=True))
            if set(after) == set(inside):
                continue
            out, into = [i for i in inside if i not in after], [i for i in after if i not in inside]
            changes = {"add": [experts[i] for i in into], "remove": [experts[i] for i in out]}
            inside, new = after, Path(directory) / str(step)
            path = update_merge(new, path, **changes, weights=[factors[i] for i in into])
        new = merge_with_counts(Path(directory) / "new", [experts[i] for i in inside], [factors[i] for i in inside])
        assert contents(path) == contents(new)
        assert names_in(path) == sorted(FILES)


def absolute(adapter):
    return {name: SparseDelta(d.shape, d.indices, d.values.abs()) for name, d in adapter.items()}


def absolute_weight(weight):
    return {pattern: abs(factor) for pattern, factor in weight.items()} if isinstance(weight, dict) else abs(weight)


@few
@given(several_experts(), st.data())
def test_the_merge_is_that_of_overlap_to_rounding(experts, data):
    factors = [drawn_weight(data.draw, one) for one in experts]
    with tempfile.TemporaryDirectory() as directory:
        kept = SparseAdapter.load(merge_with_counts(Path(directory) / "out", experts, factors))
    expected = merge(experts, "overlap", factors)
    magnitudes = merge([absolute(one) for one in experts], "overlap", [absolute_weight(factor) for factor in factors])
    assert sorted(kept) == sorted(name for name, delta in expected.items() if delta.nnz)
    for name, delta in kept.items():
        assert torch.equal(spelt_out(delta)[1], spelt_out(expected[name])[1])
        # float32 sums round in proportion to their terms, which may cancel
        assert ((delta.values - expected[name].values).abs() <= 1e-6 * magnitudes[name].values + 1e-9).all()
    assert kept.fingerprints == {name: expected.fingerprints[name] for name in kept}
    merge_of = {key: value for key, value in kept.metadata.merge.items() if key != "experts"}
    assert merge_of == {"method": "overlap", "parameters": {}}


@few
@given(several_experts(), st.lists(weights, min_size=5, max_size=5))
def test_sums_are_exact_and_counts_are_those_of_the_masks(experts, factors):
    with tempfile.TemporaryDirectory() as directory:
        path = merge_with_counts(Path(directory) / "out", experts, factors[: len(experts)])
        tensors = safetensors.torch.load((path / COUNTS_FILE).read_bytes())
        merged = SparseAdapter.load(path)
    for name, delta in merged.items():
        parts = [one.get(name, SparseDelta.empty((6, 12))) for one in experts]
        exact = [[0] * 12 for _ in range(6)]
        for part, factor in zip(parts, factors, strict=False):
            dense = spelt_out(part)[0].tolist()
            for row in range(6):
                for column in range(12):
                    exact[row][column] += round(Fraction(dense[row][column] * factor) / Fraction(SUM_STEP))
        pairs = tensors[name + ".sums"].to(torch.int64)
        sums = (pairs[..., 1] << 32) + (pairs[..., 0] & 0xFFFFFFFF)
        found = SparseDelta(delta.shape, delta.indices, sums.double())  # below 2⁵³, so exact
        assert torch.equal(spelt_out(found)[0], torch.tensor(exact, dtype=torch.float64))
        per_block = tensors[name + ".counts"].reshape(-1, *(1 for _ in delta.values.shape[1:])).expand(delta.values.shape)
        counts = spelt_out(SparseDelta(delta.shape, delta.indices, per_block.double()))[0]
        assert torch.equal(counts, sum(spelt_out(part)[1].double() for part in parts))


@pytest.fixture
def merged(tmp_path):
    """A merge of two experts that kept its counts, and the two."""
    base = torch.ones(6, 12)
    paths = saved(tmp_path, [expert(1, base=base), expert(5, base=base, names=(Q, V, OTHER))])
    return merge_with_counts(tmp_path / "merged", paths, [1 / 3, {"*": 0.5, "*.v": -1}]), *paths


def test_any_number_of_workers_gives_the_same_bytes(merged, tmp_path):
    torch.set_num_threads(3)
    third = expert(9, names=(V,))
    found = []
    for workers in (1, 2, 3, None):
        out, written = tmp_path / f"{workers}", []
        merge_with_counts(out / "new", [*merged[1:], third], workers=workers, progress=written.append)
        update_merge(out / "changed", merged[0], add=[third], remove=[merged[1]], workers=workers, progress=written.append)
        assert written == sorted([Q, V, OTHER]) * 2
        assert torch.get_num_threads() == 3
        found.append(contents(out))
    assert found == [found[0]] * 4
    torch.set_num_threads(1)


def test_an_expert_that_names_a_target_without_entries_adds_nothing_there(tmp_path):
    dropped = SparseAdapter({**expert(5), OTHER: SparseDelta.empty((6, 12))})
    path = merge_with_counts(tmp_path / "one", [expert(1)])
    changed = update_merge(tmp_path / "both", path, add=[dropped])
    assert contents(changed) == contents(merge_with_counts(tmp_path / "new", [dropped, expert(1)]))
    assert sorted(SparseAdapter.load(changed)) == [Q, V]


def test_the_weight_of_an_expert_is_changed_by_taking_it_out_and_adding_it(merged, tmp_path):
    path, first, second = merged
    changed = update_merge(tmp_path / "changed", path, add=[second], remove=[second], weights=[2.0])
    assert contents(changed) == contents(merge_with_counts(tmp_path / "new", [first, second], [1 / 3, 2.0]))


def test_what_an_expert_taken_out_told_of_the_base_model_is_kept(tmp_path):
    known, unknown = expert(1, base=torch.ones(6, 12)), expert(5)
    path = merge_with_counts(tmp_path / "both", [known, unknown])
    left = SparseAdapter.load(update_merge(tmp_path / "left", path, remove=[known]))
    assert left.fingerprints == known.fingerprints
    new = SparseAdapter.load(merge_with_counts(tmp_path / "new", [unknown]))
    assert new.fingerprints == {Q: None, V: None}
    assert left.metadata == new.metadata


def test_a_merge_fetched_from_the_hub_can_be_changed(merged, tmp_path, monkeypatch):
    path, first, _ = merged
    monkeypatch.setattr("sparselet.hub.sources.fetch", lambda name: {"org/merged": path, "org/first": first}[name])
    changed = update_merge(tmp_path / "changed", "org/merged", remove=["org/first"])
    assert [record["task"] for record in SparseAdapter.load(changed).metadata.merge["experts"]] == ["task 5"]


# Refusals


def assert_refused(error, message, tmp_path, attempt):
    before = names_in(tmp_path)
    with pytest.raises(error, match=message):
        attempt(tmp_path / "out")
    assert names_in(tmp_path) == before


def test_changes_that_make_no_sense_are_refused(merged, tmp_path):
    path, first, second = merged
    stranger, again = expert(9), SparseAdapter.load(first)
    for error, message, changes in (
        (ArgumentError, "nothing to change; give experts to add or to remove", {}),
        (ArgumentError, "1 experts need as many weights, got 2", {"add": [stranger], "weights": [1.0, 2.0]}),
        (ArgumentError, "0 experts need as many weights, got 1", {"remove": [first], "weights": [1.0]}),
        (ArgumentError, "weight 1 must be a finite number", {"add": [stranger], "weights": [float("nan")]}),
        (ArgumentError, "weight 1: no target matches", {"add": [stranger], "weights": [{"*.value": 1.0}]}),
        (
            ArgumentError,
            "expert 1 is not in the merge; remaining experts: (task 1, task 5|task 5, task 1)",
            {"remove": [stranger]},
        ),
        (ArgumentError, "expert0 is not in the merge; remaining experts: task 5", {"remove": [first, first]}),
        (ArgumentError, "no expert would remain in the merge", {"remove": [first, second]}),
        (ArgumentError, "expert0 is already in the merge; to change its weight, remove it in the same step", {"add": [first]}),
        (ArgumentError, "expert 1 is already in the merge", {"add": [again]}),
        (ArgumentError, "expert 2 is already in the merge", {"add": [stranger, stranger]}),
        (ArgumentError, "workers must be at least 1", {"add": [stranger], "workers": 0}),
        (MissingFile, "nothing is not a directory", {"add": [tmp_path / "nothing"]}),
        (WrongBase, "the base weights differ", {"add": [expert(9, base=torch.full((6, 12), 2.0))]}),
        (NonFiniteValue, f"expert 1: {Q}", {"add": [{Q: SparseDelta((6, 12), torch.tensor([0]), torch.tensor([torch.nan]))}]}),
    ):
        assert_refused(error, message, tmp_path, lambda out, c=changes: update_merge(out, path, **c))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputExists):
        update_merge(tmp_path / "out", path, add=[stranger])
    with pytest.raises(OutputExists):
        merge_with_counts(tmp_path / "out", [stranger])
    assert names_in(tmp_path / "out") == ["mine"]


def test_masks_of_several_kinds_are_refused(tmp_path):
    tiles, entries = expert(1, 3), expert(5)
    message = f"{Q}: sums and counts need one kind of block; these experts have single entries and tiles of 3×3"
    assert_refused(ArgumentError, message, tmp_path, lambda out: merge_with_counts(out, [tiles, entries]))
    for first, second in ((tiles, entries), (entries, tiles)):
        path = merge_with_counts(tmp_path / f"merged {first is tiles}", [first])
        assert_refused(ArgumentError, message, tmp_path, lambda out, p=path, s=second: update_merge(out, p, add=[s]))
    for other, message in ((2, "tiles of 2×2 and tiles of 3×3"), ("row", "whole rows and tiles of 3×3")):
        assert_refused(ArgumentError, message, tmp_path, lambda out, o=other: merge_with_counts(out, [tiles, expert(5, o)]))


def single(value):
    return {Q: SparseDelta((1, 2), torch.tensor([1]), torch.tensor([value]))}


def test_changes_beyond_what_the_sums_hold_are_refused(tmp_path):
    largest = SparseAdapter.load(merge_with_counts(tmp_path / "largest", [single(MAX_SUM)]))
    assert largest[Q].values.tolist() == [MAX_SUM]
    message = f"{Q}: sums can be stored up to 4096, got"
    halves = [single(3000.0), single(-3000.5)]
    assert_refused(ArgumentError, f"{message} 4097", tmp_path, lambda out: merge_with_counts(out, [single(MAX_SUM + 1)]))
    assert_refused(ArgumentError, f"{message} 8192", tmp_path, lambda out: merge_with_counts(out, [single(1.0)], [8192]))
    assert_refused(ArgumentError, f"{message} 6000.5", tmp_path, lambda out: merge_with_counts(out, halves))
    path = tmp_path / "largest"
    assert_refused(ArgumentError, f"{message} 4097", tmp_path, lambda out: update_merge(out, path, add=[single(1.0)]))
    changed = update_merge(tmp_path / "changed", path, add=[single(0.0)])
    assert SparseAdapter.load(update_merge(tmp_path / "back", changed, remove=[single(MAX_SUM)]))[Q].values.tolist() == [0.0]


def test_an_expert_that_was_changed_since_is_not_taken_out(tmp_path):
    values = torch.randn(600, generator=torch.Generator().manual_seed(0))
    wide = {Q: SparseDelta((30, 30), torch.arange(600), values)}
    path = merge_with_counts(tmp_path / "wide", [wide])
    path = update_merge(tmp_path / "wider", path, add=[{Q: SparseDelta((30, 30), torch.tensor([0]), torch.tensor([1.0]))}])
    values = values.clone()
    values[7] += 1  # which the digest does not look at
    edited = {Q: SparseDelta((30, 30), torch.arange(600), values)}
    message = f"{Q}: an expert to remove differs from the one that was merged"
    assert_refused(ArgumentError, message, tmp_path, lambda out: update_merge(out, path, remove=[edited]))
    moved = torch.arange(600)
    moved[599] = 700
    edited = {Q: SparseDelta((30, 30), moved, wide[Q].values)}
    assert_refused(ArgumentError, message, tmp_path, lambda out: update_merge(out, path, remove=[edited]))


# Files


def rewrite(path, change):
    """Write the counts file anew with other tensors."""
    tensors = safetensors.torch.load((path / COUNTS_FILE).read_bytes())
    change(tensors)
    (path / COUNTS_FILE).write_bytes(safetensors.torch.save(tensors))


def reconfigure(path, change):
    config = json.loads((path / CONFIG_FILE).read_text())
    change(config)
    (path / CONFIG_FILE).write_text(json.dumps(config))


def spoilt_values(path):
    adapter = SparseAdapter.load(path)
    {**adapter}[Q].values[0] += 1.0
    adapter.save(path)


def low_values(path):
    SparseAdapter.load(path).save(path, torch.bfloat16)


def foreign(path):
    """Counts of another merge with the same masks."""
    adapter = SparseAdapter.load(path)
    others = [SparseAdapter({n: d.scale(3) for n, d in adapter.items()})]
    other = merge_with_counts(path.parent / "other", others)
    shutil.copy(other / COUNTS_FILE, path / COUNTS_FILE)
    shutil.rmtree(other)


WRONG = {
    "missing": (lambda p: (p / COUNTS_FILE).unlink(), MissingFile, "merge with `keep_counts=True`"),
    "truncated": (lambda p: (p / COUNTS_FILE).write_bytes((p / COUNTS_FILE).read_bytes()[:-4]), BadContainer, "not a whole"),
    "empty": (lambda p: (p / COUNTS_FILE).write_bytes(b""), BadContainer, "not a whole safetensors file"),
    "text": (lambda p: (p / COUNTS_FILE).write_text("counts"), BadContainer, "not a whole safetensors file"),
    "no counts": (lambda p: rewrite(p, lambda t: t.pop(f"{V}.counts")), MissingTensor, f"{V}.counts is missing"),
    "no sums": (lambda p: rewrite(p, lambda t: t.pop(f"{Q}.sums")), MissingTensor, f"{Q}.sums is missing"),
    "unknown": (lambda p: rewrite(p, lambda t: t.update(x=torch.zeros(1))), UnknownTensor, "x belongs to no target"),
    "float": (lambda p: rewrite(p, lambda t: t.update({f"{Q}.sums": t[f"{Q}.sums"].float()})), BadDtype, "F32; expected I32"),
    "long": (lambda p: rewrite(p, lambda t: t.update({f"{Q}.counts": t[f"{Q}.counts"].long()})), BadDtype, "I64; expected I32"),
    "shorter": (lambda p: rewrite(p, lambda t: t.update({f"{Q}.counts": t[f"{Q}.counts"][1:]})), BadShape, "expected"),
    "flat": (lambda p: rewrite(p, lambda t: t.update({f"{Q}.sums": t[f"{Q}.sums"].reshape(-1)})), BadShape, "expected"),
    "zero counts": (lambda p: rewrite(p, lambda t: t[f"{Q}.counts"].zero_()), BadCounts, f"{Q}: sums and counts do not"),
    "many counts": (lambda p: rewrite(p, lambda t: t[f"{Q}.counts"].fill_(3)), BadCounts, f"{Q}: sums and counts do not"),
    "negative": (lambda p: rewrite(p, lambda t: t[f"{Q}.counts"].neg_()), BadCounts, f"{Q}: sums and counts do not"),
    "sums": (lambda p: rewrite(p, lambda t: t[f"{V}.sums"][0].add_(1)), BadCounts, f"{V}: sums and counts do not"),
    "values": (spoilt_values, BadCounts, f"{Q}: sums and counts do not give the adapter's values"),
    "rounded values": (low_values, BadCounts, "sums and counts do not give the adapter's values"),
    "foreign": (foreign, BadCounts, "sums and counts do not give the adapter's values"),
    "another method": (lambda p: reconfigure(p, lambda c: c["merge"].update(method="ties")), BadConfig, "merges by overlap"),
    "no merge": (lambda p: reconfigure(p, lambda c: c.pop("merge")), BadConfig, "merge is None"),
    "merge is text": (lambda p: reconfigure(p, lambda c: c.update(merge="yes")), BadConfig, "merge is 'yes'"),
    "no experts": (lambda p: reconfigure(p, lambda c: c["merge"].pop("experts")), BadConfig, "merge.experts is None"),
    "a number": (lambda p: reconfigure(p, lambda c: c["merge"].update(experts=[1])), BadConfig, "list of experts"),
    "no digest": (
        lambda p: reconfigure(p, lambda c: c["merge"]["experts"][0].pop("digest")),
        BadConfig,
        "list of objects with",
    ),
    "no weight": (lambda p: reconfigure(p, lambda c: c["merge"]["experts"][0].update(weight=None)), BadConfig, "finite number"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_counts_file_is_refused_by_name_and_nothing_is_written(merged, tmp_path, wrong):
    spoil, error, message = WRONG[wrong]
    path, first, _ = merged
    spoil(path)
    for changes in ({"add": [expert(9)]}, {"remove": [first]}):
        assert_refused(error, message, tmp_path, lambda out, c=changes: update_merge(out, path, **c))


def test_counts_beyond_the_number_of_experts_are_refused_where_the_values_do_not_tell(tmp_path):
    path = merge_with_counts(tmp_path / "merged", [single(0.0)])
    rewrite(path, lambda tensors: tensors[f"{Q}.counts"].fill_(2))
    assert_refused(BadCounts, f"{Q}: sums and counts", tmp_path, lambda out: update_merge(out, path, add=[single(1.0)]))


def test_a_link_out_of_the_directory_is_not_followed(merged, tmp_path):
    path, _, _ = merged
    shutil.move(path / COUNTS_FILE, tmp_path / "elsewhere")
    (path / COUNTS_FILE).symlink_to(tmp_path / "elsewhere")
    assert_refused(SparseletError, "symbolic link", tmp_path, lambda out: update_merge(out, path, add=[expert(9)]))


def test_what_is_no_sparse_adapter_cannot_be_changed(tmp_path, base_dir):
    assert_refused(
        MissingFile,
        "nothing is not a directory",
        tmp_path,
        lambda out: update_merge(out, tmp_path / "nothing", add=[expert(9)]),
    )
    other = tmp_path / "lora"
    other.mkdir()
    (other / CONFIG_FILE).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    factors = {f"base_model.model.{Q}.lora_{x}.weight": torch.ones(s) for x, s in (("A", (2, 12)), ("B", (6, 2)))}
    (other / WEIGHTS_FILE).write_bytes(safetensors.torch.save(factors))
    message = "lora is not a sparse adapter, so experts cannot be added or removed"
    assert_refused(ArgumentError, message, tmp_path, lambda out: update_merge(out, other, add=[expert(9)]))
    dense = SparseAdapter({Q: random_delta((6, 12), 1, 1.0)})
    both = merge_with_counts(tmp_path / "both", [other, dense])  # every expert can be in it
    changed = SparseAdapter.load(update_merge(tmp_path / "changed", both, remove=[other]))
    assert torch.equal(changed[Q].values, dense[Q].values)
