"""From scores to masks, against sorting."""

import pytest
import torch
from helpers.strategies import few
from hypothesis import given
from hypothesis import strategies as st

from sparselet.errors import DensityOutOfRange, NonFiniteScore
from sparselet.masks import (
    blocks_to_keep,
    check_density,
    dropped_layers,
    global_threshold,
    layer_of,
    top_k,
    top_k_global,
)

# Few distinct values make ties common.
scores = st.lists(st.sampled_from([-2.0, -0.5, -0.0, 0.0, 0.25, 1.0]), min_size=1, max_size=30)
NAMES = ("layers.1.q", "layers.0.q", "layers.0.v", "head")
targets = st.lists(scores, min_size=1, max_size=4).map(lambda rows: dict(zip(NAMES, map(torch.tensor, rows), strict=False)))


@few
@given(scores, st.integers(0, 35))
def test_top_k_is_sorting_by_score_then_index(values, k):
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])
    found = top_k(torch.tensor(values), k)
    assert found.tolist() == expected
    assert found.dtype == torch.int32


@few
@given(targets, st.integers(1, 100))
def test_top_k_global_is_one_sort_over_all_targets(values, k):
    flat = [
        (-score, position, i, name) for position, (name, t) in enumerate(values.items()) for i, score in enumerate(t.tolist())
    ]
    chosen = sorted(flat)[:k]
    expected = {name: sorted(i for _, _, i, owner in chosen if owner == name) for name in values}
    found = top_k_global(values, k)
    assert {name: ids.tolist() for name, ids in found.items()} == expected
    assert list(found) == list(values)
    assert all(ids.dtype == torch.int32 for ids in found.values())


@few
@given(targets, st.integers(1, 100))
def test_global_threshold_is_the_kth_highest_score(values, k):
    ordered = sorted((score for target in values.values() for score in target.tolist()), reverse=True)
    assert global_threshold(values, k) == ordered[min(k, len(ordered)) - 1]


@few
@given(targets, st.sampled_from([0.01, 0.1, 0.3, 0.9, 1.0]))
def test_dropped_layers_have_every_score_below_the_threshold(values, density):
    flat = sorted((score for target in values.values() for score in target.tolist()), reverse=True)
    threshold = flat[max(1, round(density * len(flat))) - 1]
    layers = {"layers.1.q": "1", "layers.0.q": "0", "layers.0.v": "0", "head": "head"}
    alive = {layers[name] for name, target in values.items() for score in target.tolist() if score >= threshold}
    assert dropped_layers(values, density) == {name for name in values if layers[name] not in alive}


def test_no_layer_that_holds_a_kept_entry_is_dropped():
    values = {"h.0.q": torch.tensor([5.0, 0.0]), "h.0.k": torch.tensor([-1.0, -1.0]), "h.1.q": torch.tensor([1.0, 2.0])}
    assert dropped_layers(values, 1 / 6) == {"h.1.q"}
    assert dropped_layers(values, 1.0) == set()


@pytest.mark.parametrize(
    ("target", "layer"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0"),
        ("model.layers.10.self_attn.q_proj", "model.layers.10"),
        ("model.layers.1.mlp.experts.7.up", "model.layers.1"),
        ("transformer.h.3", "transformer.h.3"),
        ("3.attention", "3"),
        ("encoder.layer2.q", "encoder.layer2.q"),
        ("lm_head", "lm_head"),
    ],
)
def test_a_layer_is_the_name_up_to_its_first_number(target, layer):
    assert layer_of(target) == layer


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_refused(wrong):
    bad, good = torch.tensor([0.0, wrong]), torch.tensor([1.0])
    for choose in (
        lambda: top_k(bad, 1),
        lambda: top_k(bad, 0),
        lambda: top_k_global({"a": good, "b": bad}, 1),
        lambda: global_threshold({"a": good, "b": bad}, 1),
        lambda: dropped_layers({"a": good, "b": bad}, 0.5),
    ):
        with pytest.raises(NonFiniteScore, match="NaN or infinite"):
            choose()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_top_k_keeps_exactly_k_in_every_dtype(dtype):
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(dtype)
    for k in (1, 50, 199, 200):
        assert len(top_k(values, k)) == k


@few
@given(st.floats(1e-6, 1.0), st.integers(1, 10**7))
def test_blocks_to_keep_is_the_rounded_fraction_and_at_least_one(density, blocks):
    kept = blocks_to_keep(density, blocks)
    assert 1 <= kept <= blocks
    assert kept == 1 or abs(kept - density * blocks) <= 0.5


@pytest.mark.parametrize("density", [0, 2, -1, True, False, float("nan"), float("inf"), 1.0000001, "0.1", None])
def test_a_density_that_is_no_fraction_is_refused(density):
    for refuse in (check_density, lambda d: blocks_to_keep(d, 100), lambda d: dropped_layers({"a": torch.ones(2)}, d)):
        with pytest.raises(DensityOutOfRange, match=r"density must be in \(0, 1\].*not a percentage"):
            refuse(density)


@pytest.mark.parametrize("density", [1, 1.0, 0.5, 1e-9])
def test_a_fraction_is_a_density(density):
    assert check_density(density) == density
    assert isinstance(check_density(density), float)
