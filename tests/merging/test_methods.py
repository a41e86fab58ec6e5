"""What every merge method promises, over all of `METHODS`; and their parameters."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.dense_merges import distinct, normal
from helpers.strategies import few, random_delta, spelt_out
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseDelta
from sparselet.errors import ArgumentError, UnknownMethod
from sparselet.merging.method import MOMENTS, STATS
from sparselet.merging.methods import METHODS, complete_parameters, per_expert_methods

# What leaves a single expert as it is, where the defaults are meant to change it.
NEUTRAL = {
    "ties": {"density": 1.0},
    "breadcrumbs": {"density": 1.0, "gamma": 0.0},
    "dare": {"density": 1.0},
    "della": {"density": 1.0, "epsilon": 0.0},
    "pcb": {"density": 1.0, "clip": 0.0},
    "consensus": {"k": 1},
    "localize": {"density": 1.0},
    "cpi": {"density": 1.0},
}
LEVELS = {"iso_c", "iso_cts"}  # methods that change a single expert whatever their parameters
ROUNDS = {"actmat", "tsv", "iso_c", "iso_cts"}  # and those whose float64 the number of threads may round otherwise
# Where a delta with weights 1 and −1 does not cancel, and why.
NO_CANCELLING = {
    "uniform": "the weights are divided by their sum, which is refused",
    "multislerp": "the weights are divided by their sum, which is refused",
    "karcher": "the weights are divided by their sum, which is refused",
    "magmax": "of two equal magnitudes one is taken",
}
IN_ORDER = {"cpi"}  # methods whose last expert is the base
NOT_NEGATIVE = {"regmean"}  # methods whose weights must not be negative
# Where an entry selected with value 0 is not the same as one that is not selected, and why.
COUNTS_MASKS = {"overlap": "Eq. 4 divides by how many masks select an entry"}


def defaults(method):
    return METHODS[method].defaults


every_method = pytest.mark.parametrize("method", METHODS)


def neutral(method, deltas, weights):
    return METHODS[method].function(deltas, weights, **NEUTRAL.get(method, {}))


def mixed_deltas(dtype=torch.float32):
    """Entries, tiles of two sizes, a dense expert and an empty one."""
    kinds = ((1, 0.5), (2, 0.5), (3, 0.3), (1, 1.0), (1, 0.0))
    return [normal(random_delta((6, 12), b, density, i), i).to(dtype) for i, (b, density) in enumerate(kinds)]


WEIGHTS = [1.0, 0.5, 2.0, 1.0, 1.0]


def bytes_of(delta):
    return delta.indices.numpy().tobytes() + delta.values.numpy().tobytes()


@every_method
@few
@given(deltas=distinct(1, 1))
def test_one_expert_with_weight_one_is_itself(method, deltas):
    if method in LEVELS:
        pytest.skip("the singular values of one expert are levelled too")
    merged = neutral(method, deltas, [1.0])
    assert torch.equal(merged.to_dense(), deltas[0].to_dense())
    assert not (spelt_out(merged)[1] & ~spelt_out(deltas[0])[1]).any()


@every_method
@few
@given(deltas=distinct(1, 1))
def test_weights_one_and_minus_one_cancel(method, deltas):
    if method == "magmax":
        assert torch.equal(neutral(method, deltas * 2, [1.0, -1.0]).to_dense(), deltas[0].to_dense().abs())
    elif method in IN_ORDER:
        assert torch.equal(neutral(method, deltas * 2, [1.0, -1.0]).to_dense(), deltas[0].to_dense())
    elif method in NOT_NEGATIVE:
        with pytest.raises(ArgumentError, match=f"{method} takes no negative weights"):
            neutral(method, deltas * 2, [1.0, -1.0])
    elif method in NO_CANCELLING:
        with pytest.raises(ArgumentError, match="divides by the sum of the weights, which is 0"):
            neutral(method, deltas * 2, [1.0, -1.0])
    else:
        assert (neutral(method, deltas * 2, [1.0, -1.0]).values.abs() <= (1e-12 if method in ROUNDS else 0)).all()


@every_method
@pytest.mark.parametrize("parameters", [NEUTRAL, {}], ids=["neutral", "default"])
def test_order_matters_only_to_rounding(method, parameters):
    if method in IN_ORDER:
        pytest.skip("the last expert is the base")
    deltas, given = mixed_deltas(), parameters.get(method, {})
    expected = METHODS[method].function(deltas, WEIGHTS, **given)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3], [1, 2, 3, 4, 0]):
        found = METHODS[method].function([deltas[i] for i in order], [WEIGHTS[i] for i in order], **given)
        torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-5, atol=1e-6)
        assert torch.equal(spelt_out(found)[1], spelt_out(expected)[1])


@every_method
@pytest.mark.parametrize("parameters", [NEUTRAL, {}], ids=["neutral", "default"])
def test_tiles_are_merged_as_their_entries(method, parameters):
    deltas, given = [normal(random_delta((6, 12), 3, 0.5, i), i) for i in range(3)], parameters.get(method, {})
    tiles, entries = (
        METHODS[method].function(experts, WEIGHTS[:3], **given) for experts in (deltas, [d.expand() for d in deltas])
    )
    torch.testing.assert_close(tiles.to_dense(), entries.to_dense(), rtol=1e-6, atol=1e-7)
    assert torch.equal(spelt_out(tiles)[1], spelt_out(entries)[1])


@every_method
def test_half_precision_experts_are_merged_in_float32(method):
    low = mixed_deltas(torch.bfloat16)
    found, expected = (
        METHODS[method].function(low, WEIGHTS),
        METHODS[method].function([d.to(torch.float32) for d in low], WEIGHTS),
    )
    assert found.values.dtype == torch.float32
    assert bytes_of(found) == bytes_of(expected)


@every_method
@pytest.mark.parametrize("parameters", [NEUTRAL, {}], ids=["neutral", "default"])
def test_sparse_experts_are_merged_as_dense_ones(method, parameters):
    if method in COUNTS_MASKS:
        pytest.skip(COUNTS_MASKS[method])
    given = parameters.get(method, {})
    dense = [SparseDelta.from_dense(d.to_dense(), torch.ones(d.shape, dtype=torch.bool)) for d in mixed_deltas()]
    expected = METHODS[method].function(dense, WEIGHTS, **given).to_dense()
    torch.testing.assert_close(METHODS[method].function(mixed_deltas(), WEIGHTS, **given).to_dense(), expected)
    some = [*mixed_deltas()[:2], *dense[2:]]
    torch.testing.assert_close(METHODS[method].function(some, WEIGHTS, **given).to_dense(), expected)


@every_method
def test_experts_that_change_nothing_merge_to_nothing(method):
    empty, no_tiles = SparseDelta.empty((6, 12)), random_delta((6, 12), 3, 0.0)
    for experts in ([empty], [empty, empty], [empty, no_tiles, empty]):
        merged = METHODS[method].function(experts, [1.0] * len(experts))
        assert (merged.shape, merged.nnz) == ((6, 12), 0)


@every_method
@few
@given(deltas=distinct(2, 4), weights=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 3.0]), min_size=4, max_size=4))
def test_the_merged_values_are_finite_and_their_mask_is_within_the_union(method, deltas, weights):
    weights = [*weights[: len(deltas) - 1], 5.0 - sum(weights[: len(deltas) - 1])]  # that do not sum to 0
    merged = METHODS[method].function(deltas, [*map(abs, weights)] if method in NOT_NEGATIVE else weights)
    assert merged.values.isfinite().all()
    assert not (spelt_out(merged)[1] & ~torch.stack([spelt_out(d)[1] for d in deltas]).any(0)).any()


@every_method
def test_zeros_that_are_selected_stay_zero(method):
    zeros = [d.scale(0) for d in mixed_deltas()]
    assert not METHODS[method].function(zeros, WEIGHTS).values.any()


@every_method
def test_experts_are_left_as_they_were(method):
    deltas = mixed_deltas()
    METHODS[method].function(deltas, WEIGHTS)
    assert [bytes_of(d) for d in deltas] == [bytes_of(d) for d in mixed_deltas()]


@every_method
def test_equal_input_gives_equal_bytes_with_any_number_of_threads(method):
    deltas, threads, found = [normal(random_delta((192, 576), 1, 0.5, i), i) for i in range(3)], torch.get_num_threads(), set()
    results = []
    for count in (1, 1, 2, 5):
        torch.set_num_threads(count)
        merged = METHODS[method].function(deltas, [1.0, 0.5, 2.0])
        found.add(bytes_of(merged))
        results.append(merged.to_dense())
    torch.set_num_threads(threads)
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)
    assert len(found) == 1 or method in ROUNDS


def digests():
    """A digest of each method's result."""
    return {name: hashlib.sha256(bytes_of(METHODS[name].function(mixed_deltas(), WEIGHTS))).hexdigest() for name in METHODS}


def test_equal_input_gives_equal_bytes_in_another_process():
    here = Path(__file__).parent
    code = f"import sys; sys.path[:0] = {[str(here), str(here.parent)]!r}\n"
    code += "import json, torch, test_methods; torch.rand(7); print(json.dumps(test_methods.digests()))"
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == digests()


@pytest.mark.parametrize("method", per_expert_methods())
def test_methods_that_compress_give_each_expert_a_delta_on_its_own_mask(method):
    deltas = mixed_deltas()
    experts = METHODS[method].per_expert(deltas, WEIGHTS)
    assert len(experts) == len(deltas)
    for expert, delta in zip(experts, deltas, strict=True):
        assert torch.equal(spelt_out(expert)[1], spelt_out(delta)[1])
        assert expert.values.isfinite().all()


@every_method
def test_parameters_are_completed_with_their_defaults(method):
    assert complete_parameters(method, {}) == defaults(method)
    assert complete_parameters(method, NEUTRAL.get(method, {})) == {**defaults(method), **NEUTRAL.get(method, {})}
    assert not {STATS, MOMENTS} & defaults(method).keys()


@every_method
def test_a_parameter_the_method_does_not_take_is_refused(method):
    takes = f"it takes {', '.join(defaults(method))}" if defaults(method) else "it takes none"
    with pytest.raises(UnknownMethod, match=f"{method} has no parameter 'sparsity'; {takes}"):
        complete_parameters(method, {"sparsity": 0.2})
    with pytest.raises(UnknownMethod, match=f"no parameter '{STATS}'"):
        complete_parameters(method, {STATS: [1.0]})


@pytest.mark.parametrize(("method", "parameter"), [(m, p) for m in METHODS for p in defaults(m)])
@pytest.mark.parametrize("value", ["nonsense", float("nan"), object()], ids=["word", "nan", "object"])
def test_a_value_out_of_range_is_refused_by_name_before_any_work(method, parameter, value):
    with pytest.raises(ArgumentError, match=f"{parameter} must be"):
        complete_parameters(method, {parameter: value})


def as_documented(value):
    return f"{value:g}" if type(value) is float else str(value).lower()


@every_method
def test_the_documentation_lists_the_method_with_its_parameters_and_defaults(method):
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{method}` |")]
    parameters = ", ".join(f"`{name}` {as_documented(value)}" for name, value in defaults(method).items())
    formula = METHODS[method].formula.replace("|", "\\|")
    assert row == f"| `{method}` | {formula} | {f'{parameters} ' if parameters else ''}| {METHODS[method].source} |"


def test_an_unknown_method_lists_those_there_are():
    with pytest.raises(UnknownMethod, match=f"'mean'; there are {', '.join(METHODS)}"):
        complete_parameters("mean", {})


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
