"""What is refused before the first target is merged; weights by pattern; surveys."""

import json

import pytest
import torch
from helpers.made_experts import OTHER, Q, V, expert, mixed_experts, names_in, saved, weights
from helpers.strategies import few, random_delta
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseAdapter, SparseDelta, merge
from sparselet.adapter import WEIGHTS_FILE
from sparselet.errors import ArgumentError, MissingFile, NonFiniteValue, ShapeMismatch, UnknownMethod, WrongBase
from sparselet.fingerprint import fingerprint_weight
from sparselet.merging import METHODS, merge_to, merge_with_counts
from sparselet.merging.engine.plan import MergePlan, weight_for
from sparselet.merging.method import MergeMethod


def assert_refused(error, message, experts, tmp_path, method="overlap", weights=None, parameters=None, base=None):
    """All ways of merging refuse, before anything is written."""
    attempts = [
        lambda: merge(experts, method, weights, parameters, base=base),
        lambda: merge_to(tmp_path / "out", experts, method, weights, parameters, base=base, progress=pytest.fail),
    ]
    if method == "overlap" and not parameters:
        attempts.append(lambda: merge_with_counts(tmp_path / "out", experts, weights, base=base, progress=pytest.fail))
    for attempt in attempts:
        with pytest.raises(error, match=message):
            attempt()
    assert not any(name.startswith((".out", "out")) for name in names_in(tmp_path))


# Weights


def test_of_patterns_the_longest_that_matches_counts():
    weight = {"*": 0.5, "*.v": 2.0, "layers.0.*": 3.0, "layers.1.v": 4.0}
    assert [weight_for(weight, name) for name in (Q, V, "layers.1.v", OTHER)] == [3.0, 3.0, 4.0, 0.5]
    assert weight_for({"*.v": 2.0}, Q) == 1.0
    assert weight_for({}, Q) == 1.0
    assert weight_for(0.25, Q) == 0.25


def test_patterns_heed_case_and_know_sets():
    assert weight_for({"*.Q": 2.0}, Q) == 1.0
    assert weight_for({"*.[qk]": 2.0}, Q) == 2.0
    assert weight_for({"layers.?.q": 2.0}, Q) == 2.0


@few
@given(
    st.dictionaries(st.sampled_from(["*", "*.v", "*.q", "layers.0.*", "layers.?.v", "layers.0.q", "l*"]), weights),
    st.randoms(use_true_random=False),
)
def test_the_order_of_patterns_does_not_matter(pattern, random):
    shuffled = dict(random.sample(list(pattern.items()), len(pattern)))
    for name in (Q, V, OTHER):
        assert weight_for(shuffled, name) == weight_for(pattern, name)


def test_weights_by_pattern_are_weights_of_each_target():
    experts = [expert(1, names=(Q, V, OTHER)), expert(5)]
    merged = merge(experts, "arithmetic", [{"*": 0.5, "*.v": 2}, 3])
    for name, weight in ((Q, 0.5), (V, 2.0), (OTHER, 0.5)):
        parts = [one.get(name, SparseDelta.empty((6, 12))) for one in experts]
        assert torch.equal(merged[name].to_dense(), METHODS["arithmetic"].function(parts, [weight, 3.0]).to_dense())


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 1.0, 1.0]])
def test_a_wrong_number_of_weights_is_refused(tmp_path, weights):
    message = f"2 experts need as many weights, got {len(weights)}"
    assert_refused(ArgumentError, message, [expert(1), expert(2)], tmp_path, weights=weights)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf"), True, "1", None, [1.0]])
def test_a_weight_that_is_no_finite_number_is_refused(tmp_path, weight):
    experts = [expert(1), expert(2)]
    assert_refused(ArgumentError, "weight 2 must be a finite number", experts, tmp_path, weights=[1.0, weight])
    message = r"weight 1 for \*\.v must be a finite number"
    assert_refused(ArgumentError, message, experts, tmp_path, weights=[{"*": 1.0, "*.v": weight}, 1.0])


def test_a_pattern_that_matches_no_target_is_refused(tmp_path):
    message = rf"weight 2: no target matches '\*\.value'; the first target is {Q}"
    assert_refused(ArgumentError, message, [expert(1), expert(2)], tmp_path, weights=[1.0, {"*": 1.0, "*.value": 2.0}])
    assert len(merge([expert(1, names=(Q,)), expert(2)], weights=[{"*.v": 2.0}, 1.0])) == 2  # of some expert's targets
    assert len(merge([SparseAdapter({})], weights=[{"*.v": 2.0}])) == 0


# Experts


@pytest.mark.parametrize("experts", [[], (), "expert-a"])
def test_no_expert_and_a_name_that_is_not_in_a_list_are_refused(tmp_path, experts):
    assert_refused(ArgumentError, "experts must be a list of at least one expert, got", experts, tmp_path)


def test_a_path_that_is_not_in_a_list_is_refused(tmp_path):
    (path,) = saved(tmp_path, [expert(1)])
    assert_refused(ArgumentError, "experts must be a list of at least one expert", path, tmp_path)


def test_an_expert_that_is_not_there_is_named(tmp_path):
    assert_refused(MissingFile, "nothing is not a directory", [expert(1), tmp_path / "nothing"], tmp_path)


def test_an_unknown_method_lists_those_there_are(tmp_path):
    assert_refused(UnknownMethod, f"'mean'; there are {', '.join(METHODS)}", [expert(1)], tmp_path, "mean")


@pytest.mark.parametrize("method", ["overlap", "uniform"])
def test_a_parameter_the_method_does_not_take_is_refused(tmp_path, method):
    message = f"{method} has no parameter 'density'; it takes none"
    assert_refused(UnknownMethod, message, [expert(1)], tmp_path, method, None, {"density": 0.2})


def test_a_parameter_out_of_range_is_refused_before_an_expert_is_opened(tmp_path):
    assert_refused(ArgumentError, "density must be in", [tmp_path / "nothing"], tmp_path, "ties", None, {"density": 2})


def test_experts_of_different_shapes_are_refused(tmp_path):
    message = rf"{Q}: expert 2 has shape \[12, 6\], a previous expert \[6, 12\]"
    assert_refused(ShapeMismatch, message, [expert(1), expert(2, shape=(12, 6))], tmp_path)


def test_experts_of_different_base_models_are_refused(tmp_path):
    bases = [torch.full((6, 12), value) for value in (1.0, 2.0)]
    paths = saved(tmp_path, [expert(i, base=base) for i, base in enumerate(bases)])
    message = "expert1 and the experts before it: the base weights differ in 2 of 2 targets"
    assert_refused(WrongBase, message, paths, tmp_path)


def test_an_expert_with_modules_trained_in_full_is_refused(tmp_path):
    adapter = SparseAdapter({Q: random_delta((6, 12))}, {"modules_to_save": ["score"]}, modules={"score.weight": torch.ones(2)})
    for refused, name in ((adapter, "expert 2"), (adapter.save(tmp_path / "trained"), "trained")):
        message = rf"{name} trained modules in full \(modules_to_save\)"
        assert_refused(ArgumentError, message, [expert(1), refused], tmp_path)


def spoil_last_value(path, value):
    """Overwrite the file's last value, which belongs to the last target."""
    file = path / WEIGHTS_FILE
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header[f"base_model.model.{V}.sparse_values"]["data_offsets"][1] == max(
        record["data_offsets"][1] for name, record in header.items() if name != "__metadata__"
    )
    file.write_bytes(raw[:-4] + torch.tensor([value]).numpy().tobytes())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["overlap", "ties"])
def test_nan_in_an_expert_is_found_before_any_target_is_merged(tmp_path, monkeypatch, method, value):
    paths = saved(tmp_path, [expert(1), expert(2)])
    spoil_last_value(paths[1], value)
    monkeypatch.setattr(MergePlan, "survey", lambda plan: pytest.fail("surveyed"))
    message = rf"expert1.*{V}: .*1 of \d+ values are NaN or infinite"
    assert_refused(NonFiniteValue, message, paths, tmp_path, method)
    assert names_in(tmp_path) == ["expert0", "expert1"]


@pytest.mark.parametrize("as_mapping", [SparseAdapter, dict])
def test_nan_in_an_expert_in_memory_is_found_before_any_target_is_merged(tmp_path, as_mapping):
    spoilt = expert(2)[V]
    values = spoilt.values.clone()
    values[-1] = float("nan")
    wrong = as_mapping({Q: expert(2)[Q], V: SparseDelta(spoilt.shape, spoilt.indices, values)})
    assert_refused(NonFiniteValue, rf"expert 2: {V}: 1 of \d+ values are NaN or infinite", [expert(1), wrong], tmp_path)


# The base model's fingerprints


def test_the_fingerprints_do_not_depend_on_the_order_of_the_experts():
    base = torch.arange(72.0).view(6, 12) / 7
    experts = [expert(1), expert(2, base=base.bfloat16()), expert(3, base=base, names=(Q,)), expert(4, base=base.half())]
    for order in (experts, experts[::-1], [*experts[2:], *experts[:2]]):
        merged = merge(order)
        assert merged.fingerprints[Q] == fingerprint_weight(base)
        assert merged.fingerprints[V] == fingerprint_weight(base.half())


def test_base_models_of_one_dtype_are_told_apart_behind_one_of_another():
    base = torch.arange(72.0).view(6, 12) / 7
    other = base * 1.1  # the same signs
    with pytest.raises(WrongBase, match="expert 3 and the experts before it"):
        merge([expert(1, base=base.half()), expert(2, base=base), expert(3, base=other)])


# Surveys


@pytest.fixture
def surveyed(monkeypatch):
    """A method with a survey: what both are called with."""
    calls = {"survey": [], "merge": []}

    def method(deltas, weights, *, scale=2.0, stats=None):
        if any(delta.nnz for delta in deltas):
            calls["merge"].append((list(weights), scale, stats))
        return METHODS["overlap"].function(deltas, weights)

    def survey(targets, parameters):
        calls["survey"].append([[(delta.nnz, weight) for delta, weight in zip(*target, strict=True)] for target in targets()])
        assert [len(deltas) for deltas, _ in targets()] == [2] * 3  # a second time
        return [parameters["scale"] * 10]

    monkeypatch.setitem(METHODS, "surveying", MergeMethod("surveying", method, "", "", global_stats=survey))
    return calls


def test_a_survey_reads_all_targets_once_and_its_findings_reach_the_method(surveyed, tmp_path):
    experts = [expert(1, names=(Q, V, OTHER)), expert(5)]
    counts = [
        [(experts[0][n].nnz, w), (experts[1][n].nnz if n in experts[1] else 0, 1.0)]
        for n, w in ((Q, 3.0), (V, 2.0), (OTHER, 3.0))
    ]
    merge(experts, "surveying", [{"*": 3, "*.v": 2}, 1], {"scale": 4.0})
    merge_to(tmp_path / "out", saved(tmp_path, experts), "surveying", [{"*": 3, "*.v": 2}, 1], {"scale": 4.0})
    assert surveyed["survey"] == [counts] * 2
    assert surveyed["merge"] == [([w, 1.0], 4.0, [40.0]) for w in (3.0, 2.0, 3.0)] * 2


WAYS = [(method, {}) for method in METHODS]
WAYS += [(method, {"trim": trim}) for method in METHODS if "trim" in METHODS[method].defaults for trim in ("target", "global")]


@pytest.mark.parametrize(("method", "parameters"), WAYS)
def test_every_survey_finds_what_its_method_takes(method, parameters):
    assert sorted(merge(mixed_experts(), method, None, parameters)) == [Q, V, OTHER]


def test_how_much_memory_a_target_takes_grows_with_the_experts():
    sparse = MergePlan([expert(1, density=0.1)] * 2, "overlap", None, None)
    dense = MergePlan([expert(1, density=1.0)] * 5, "overlap", None, None)
    crowding = 2 * expert(1, density=0.1).density
    assert sparse.bytes_of(Q) >= 72 * (12 + 16 * crowding) - 1  # at least three sums, and the deltas twice
    assert dense.bytes_of(Q) - sparse.bytes_of(Q) == pytest.approx(72 * 16 * (5 - crowding), abs=2)
