"""DARE against its formula, mergekit and PEFT; and draws that depend on content alone."""

import hashlib
import json
import struct
import subprocess
import sys

import pytest
import torch
from helpers.dense_merges import assert_close, distinct, elected_mean, full_deltas, normal, stacked
from helpers.strategies import few, random_delta, same_shape, spelt_out
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseDelta
from sparselet.errors import ArgumentError, DensityOutOfRange, ShapeMismatch
from sparselet.merging.algebra.sampling import content_generator, drop_randomly
from sparselet.merging.methods import complete_parameters
from sparselet.merging.methods.dare import dare

merges = st.sampled_from(["linear", "ties"])


def drawn(delta, density, seed=0):
    """Which entries DARE keeps of one delta, dense bool."""
    return dare([delta], [1.0], density=density, seed=seed).mask()


@few
@given(same_shape(1, 4), st.sampled_from([0.1, 0.5, 0.9, 1.0]), st.integers(0, 5), merges)
def test_dare_merges_what_was_drawn_and_divides_it_by_the_density(deltas, density, seed, merge):
    weights = [1.0, -0.5, 2.0, 0.25][: len(deltas)]
    kept = torch.stack([x * drawn(d, density, seed) / density for x, d in zip(stacked(deltas), deltas, strict=True)])
    weighted = kept * torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    expected = elected_mean(kept, weights, scale=0.5) if merge == "ties" else 0.5 * weighted.sum(0)
    found = dare(deltas, weights, density=density, seed=seed, merge=merge, scale=0.5)
    assert_close(found, expected, (kept != 0).any(0))


@pytest.mark.parametrize("density", [0.02, 0.3, 0.8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_rate_is_the_density_within_five_deviations_in_all_parts(density, seed):
    (delta,) = full_deltas(1, (400, 400))
    mask = drawn(delta, density, seed).double()
    for part in (mask, mask[:100], mask[:, ::4], mask[delta.to_dense() > 1]):
        n = part.numel()
        assert abs(float(part.sum()) - density * n) < 5 * (density * (1 - density) * n) ** 0.5


def test_draws_of_different_seeds_and_of_different_deltas_are_independent():
    first, second = full_deltas(2, (400, 400))
    masks = [drawn(first, 0.3, 0), drawn(first, 0.3, 1), drawn(second, 0.3, 0)]
    n, p = 400 * 400, 0.09
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(float((masks[i] & masks[j]).sum()) - p * n) < 5 * (p * (1 - p) * n) ** 0.5


@pytest.mark.parametrize("density", [0.1, 0.3, 0.7])
def test_kept_entries_are_exactly_the_value_over_the_density_and_the_rest_is_exactly_zero(density):
    (delta,) = full_deltas(1)
    merged = dare([delta], [1.0], density=density)
    assert 0 < merged.nnz < delta.nnz
    assert torch.equal(merged.values, delta.values[merged.indices.long()] / torch.tensor(density))
    assert not merged.to_dense()[~merged.mask()].any()


@pytest.mark.parametrize("merge", ["linear", "ties"])
@few
@given(distinct(1, 1))
def test_dropping_nothing_a_single_expert_is_itself_and_any_draw_cancels_with_itself(merge, deltas):
    alone = dare(deltas, [1.0], density=1.0, merge=merge)
    assert torch.equal(alone.to_dense(), deltas[0].to_dense())
    assert not dare([deltas[0]] * 2, [1.0, -1.0], density=0.5, merge=merge).values.any()


@few
@given(distinct(2, 4), merges, st.randoms(use_true_random=False))
def test_order_does_not_matter(deltas, merge, random):
    shuffled = random.sample(deltas, len(deltas))
    ones = [1.0] * len(deltas)
    first, again = (dare(d, ones, density=0.5, merge=merge).to_dense() for d in (deltas, shuffled))
    torch.testing.assert_close(first, again)


def replaying(monkeypatch, masks):
    """Let a peer's Bernoulli draws be those given, one after the other; returns the probabilities that it asked for."""
    asked, left = [], list(masks)

    def bernoulli(probabilities):
        asked.append(probabilities)
        return left.pop(0).to(probabilities.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return asked


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 0.25]])
def test_dare_is_mergekits_that_rescales_to_the_norm(monkeypatch, weights):
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    deltas = full_deltas(3)
    replaying(monkeypatch, [drawn(d, 0.4) for d in deltas])
    tensors = [torch.zeros(10, 20), *(d.to_dense() for d in deltas)]
    parameters = {"weight": weights, "density": 0.4, "lambda": 0.7}
    expected = mergekit.merge_tensors(tensors, "dare_linear", parameters=parameters, base_index=0)
    found = dare(deltas, weights, density=0.4, scale=0.7, rescale="norm")
    torch.testing.assert_close(found.to_dense(), expected)


def test_dare_with_signs_is_mergekits_normalized(monkeypatch):
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    deltas = full_deltas(3)
    replaying(monkeypatch, [drawn(d, 0.4) for d in deltas])
    tensors = [torch.zeros(10, 20), *(d.to_dense() for d in deltas)]
    parameters = {"weight": 1.0, "density": 0.4, "normalize": True, "rescale": False}
    expected = mergekit.merge_tensors(tensors, "dare_ties", parameters=parameters, base_index=0)
    found = dare(deltas, [1.0] * 3, density=0.4, rescale="none", merge="ties")
    torch.testing.assert_close(found.to_dense(), expected)


@pytest.mark.parametrize(("merge", "theirs"), [("linear", "dare_linear"), ("ties", "dare_ties")])
def test_dare_is_pefts(monkeypatch, merge, theirs):
    peft = pytest.importorskip("peft.utils.merge_utils")
    deltas, weights = full_deltas(3), [0.5, 2.0, 0.25]
    replaying(monkeypatch, [drawn(d, 0.4) for d in deltas])
    expected = getattr(peft, theirs)([d.to_dense() for d in deltas], torch.tensor(weights), 0.4)
    torch.testing.assert_close(dare(deltas, weights, density=0.4, merge=merge).to_dense(), expected)


def test_rescaling_to_the_norm_keeps_the_norm_and_no_rescaling_keeps_the_values():
    (delta,) = full_deltas(1)
    norm, none = (dare([delta], [1.0], density=0.3, rescale=r) for r in ("norm", "none"))
    assert float(norm.values.abs().sum()) == pytest.approx(float(delta.values.abs().sum()))
    assert torch.equal(none.values, delta.values[none.indices.long()])
    assert torch.equal(norm.indices, none.indices)


@pytest.mark.parametrize("rescale", ["density", "norm", "none"])
def test_a_draw_that_keeps_nothing_is_empty(rescale):
    delta = SparseDelta((1, 1), torch.tensor([0]), torch.tensor([1.0]))
    assert drop_randomly(delta, 0.0, seed=0, rescale=rescale).nnz == 0
    assert dare([SparseDelta.empty((2, 3))] * 2, [1.0, 1.0], rescale=rescale).nnz == 0


def test_the_seed_of_a_draw_is_the_digest_of_the_content():
    delta = SparseDelta((2, 3), torch.tensor([1, 4]), torch.tensor([0.5, -2.0]))
    content = struct.pack("<qqq", 7, 2, 3) + struct.pack("<ii", 1, 4) + struct.pack("<ff", 0.5, -2.0)
    expected = int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
    assert content_generator(7, delta).initial_seed() == expected


def test_every_part_of_the_content_and_the_seed_change_the_draw():
    at, values = torch.tensor([1, 4]), torch.tensor([0.5, -2.0])
    contents = [
        (0, SparseDelta((2, 3), at, values)),
        (1, SparseDelta((2, 3), at, values)),
        (0, SparseDelta((3, 2), at, values)),
        (0, SparseDelta((2, 3), at + 1, values)),
        (0, SparseDelta((2, 3), at, -values)),
    ]
    assert len({content_generator(seed, delta).initial_seed() for seed, delta in contents}) == len(contents)


def test_layout_and_dtype_and_selected_zeros_do_not_change_the_draw():
    tiles = random_delta((6, 12), 3, 0.5)  # of multiples of 1/4, some of them 0
    forms = [tiles, tiles.expand(), tiles.to(torch.bfloat16), tiles.to(torch.float64), SparseDelta.from_dense(tiles.to_dense())]
    merged = [dare([form], [1.0], density=0.5) for form in forms]
    assert 0 < merged[0].nnz < int((tiles.values != 0).sum())
    assert content_generator(0, tiles).initial_seed() == content_generator(0, tiles.expand()).initial_seed()
    for other in merged[1:]:
        assert torch.equal(other.to_dense(), merged[0].to_dense())
        assert torch.equal(other.mask(), merged[0].mask())


def test_neither_the_process_nor_the_global_generator_matters():
    torch.manual_seed(0)
    here = drawn(normal(random_delta((6, 12), 1, 1.0)), 0.5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = drawn(normal(random_delta((6, 12), 1, 1.0)), 0.5)
    assert torch.equal(here, again)
    assert torch.equal(torch.get_rng_state(), state)
    code = (
        "import torch; from sparselet import SparseDelta; from sparselet.merging.methods.dare import dare;"
        "v = torch.randn(72, generator=torch.Generator().manual_seed(0));"
        "print(dare([SparseDelta((6, 12), torch.arange(72), v)], [1.0], density=0.5).indices.tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == here.flatten().nonzero().squeeze(1).tolist()


def test_shapes_must_agree():
    with pytest.raises(ShapeMismatch, match="different shapes"):
        dare([random_delta((6, 12)), random_delta((12, 6))], [1.0, 1.0])


def test_the_mask_of_what_was_drawn_is_a_part_of_the_experts():
    tiles = random_delta((6, 12), 3, 0.5)
    assert not (drawn(tiles, 0.5) & ~spelt_out(tiles)[1]).any()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 1.5}, "seed must be an integer of at least 0, got 1.5"),
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"rescale": "l1"}, "rescale must be one of density, norm, none"),
        ({"merge": "mean"}, "merge must be one of linear, ties"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(parameters, message):
    error = DensityOutOfRange if "density" in parameters else ArgumentError
    with pytest.raises(error, match=message):
        complete_parameters("dare", parameters)
