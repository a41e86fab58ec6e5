"""PCB-Merging against its dense definition, and against the authors' formula where both agree."""

import pytest
import torch
from helpers.dense_merges import factors, normal
from helpers.strategies import few, random_delta, same_shape, spelt_out
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseDelta
from sparselet.errors import ArgumentError, DensityOutOfRange, ShapeMismatch
from sparselet.merging.methods.pcb import pcb


def dense_pcb(dense, weights, density, density_of, clip, scale):
    """ΔW [N, entries] in float64 to the merged entries, and which of them any expert kept."""
    above, below = torch.zeros_like(dense[0]), torch.zeros_like(dense[0])
    for delta, weight in zip(dense, weights, strict=True):
        nonzeros = int((delta != 0).sum())
        if not nonzeros:
            continue
        bound = delta.abs().sort(descending=True).values[int(clip * nonzeros)]
        tau = delta.clamp(-bound, bound)
        beta = torch.exp(len(dense) * (tau / bound) ** 2) * torch.tanh(delta * dense.sum(0))
        ordered = beta.sort(descending=True).values
        k = max(1, round(density * (len(delta) if density_of == "size" else nonzeros)))
        cutoff = max(0.0, float(ordered[k])) if k < len(delta) else 0.0
        if ordered[0] <= 0:
            continue
        share = (beta == cutoff).double() if ordered[0] == cutoff else ((beta - cutoff) / (ordered[0] - cutoff)).clamp(min=0)
        above += share * weight * tau
        below += share
    return torch.where(below > 0, scale * above / below, 0.0), below > 0


@few
@given(
    same_shape(1, 4),
    factors,
    st.sampled_from([0.05, 0.3, 1.0]),
    st.sampled_from(["nonzeros", "size"]),
    st.sampled_from([0.0, 0.1, 0.9]),
)
def test_pcb_is_its_dense_definition(deltas, weights, density, density_of, clip):
    deltas = [normal(delta, seed) for seed, delta in enumerate(deltas)]
    weights = weights[: len(deltas)]
    dense = torch.stack([spelt_out(delta)[0].reshape(-1) for delta in deltas])
    expected, kept = dense_pcb(dense, weights, density, density_of, clip, 0.7)
    found, mask = spelt_out(pcb(deltas, weights, density=density, density_of=density_of, clip=clip, scale=0.7))
    assert torch.equal(mask.reshape(-1), kept)
    torch.testing.assert_close(found.reshape(-1), expected, rtol=1e-5, atol=1e-6)


def test_pcb_is_the_authors_formula_where_no_entry_pulls_against_the_sum():
    """Min-max normalised magnitudes and balances, all entries of all experts positive, one entry zero in each."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(3, 72, generator=generator, dtype=torch.float64).float().double()
    dense[0, 3] = dense[1, 50] = dense[2, 71] = 0

    def normalized(x):
        low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
        return (x - low) / (high - low)

    balance = torch.exp(3 * normalized(dense.abs()) ** 2) * torch.tanh(dense * dense.sum(0))
    cutoff = balance.sort(1, descending=True).values[:, 18:19]  # of which 18 lie above
    share = normalized(torch.maximum(balance, cutoff))
    expected = (share * dense).sum(0) / share.sum(0).clamp(min=1e-12)
    deltas = [SparseDelta.from_dense(d.view(6, 12).float()) for d in dense]
    found = pcb(deltas, [1.0] * 3, density=0.25, clip=0.0)
    torch.testing.assert_close(found.to_dense().double().view(-1), expected, rtol=1e-5, atol=1e-6)


def line(*values):
    return SparseDelta((1, len(values)), torch.arange(len(values)), torch.tensor(values))


def test_exactly_k_entries_of_each_expert_are_kept():
    delta = normal(random_delta((6, 12), 1, 1.0, 3), 3)
    assert pcb([delta], [1.0], density=0.25).nnz == 18
    half = normal(random_delta((6, 12), 1, 0.5, 3), 3)
    assert pcb([half], [1.0], density=0.25, density_of="nonzeros").nnz == max(1, round(0.25 * half.nnz))
    assert pcb([half], [1.0], density=0.9).nnz == half.nnz


def test_entries_equal_to_the_cutoff_fall_and_equal_best_ones_stay():
    assert pcb([line(3.0, 2.0, 2.0, 1.0)], [1.0], density=0.5).indices.tolist() == [0]
    assert pcb([line(3.0, 3.0, 3.0, 1.0)], [1.0], density=0.5).indices.tolist() == [0, 1, 2]


def test_an_expert_that_pulls_against_the_sum_has_no_say():
    merged = pcb([line(2.0, 1.0), line(-1.0, 0.5)], [1, 1], density=1.0, clip=0.0)
    assert merged.values[0].item() == 2.0
    assert 0.5 < merged.values[1].item() < 1.0


def test_outliers_are_lowered_to_the_next_magnitude():
    merged = pcb([line(-100.0, 2.0, 1.0)], [1.0], density=1.0, clip=0.4)
    assert merged.values.tolist() == [-2.0, 2.0, 1.0]
    assert pcb([line(-100.0, 2.0, 1.0)], [1.0], density=1.0).values.tolist() == [-100.0, 2.0, 1.0]


def test_weights_scale_the_experts_and_have_no_part_in_the_competition():
    deltas = [normal(random_delta((6, 12), 1, 0.5, seed), seed) for seed in (1, 2)]
    one, other = (pcb(deltas, weights).to_dense() for weights in ([1, 0], [0, 1]))
    torch.testing.assert_close(pcb(deltas, [2.0, -3.0]).to_dense(), 2 * one - 3 * other)


def test_many_experts_do_not_overflow():
    deltas = [normal(random_delta((6, 12), 1, 0.5, seed), seed) for seed in range(120)]
    assert pcb(deltas, [1.0] * 120, density=1.0).values.isfinite().all()


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"density": 1.1}, DensityOutOfRange, r"density must be in \(0, 1\], got 1.1"),
        ({"density_of": "rows"}, ArgumentError, "density_of must be one of size, nonzeros, got 'rows'"),
        ({"clip": 1.0}, ArgumentError, r"clip must be in \[0, 1\), got 1.0"),
        ({"clip": -0.1}, ArgumentError, "clip must be in"),
        ({"scale": float("inf")}, ArgumentError, "scale must be a finite number"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, error, message):
    with pytest.raises(error, match=message):
        pcb([SparseDelta.empty((1, 1))] * 2, [1.0, 1.0], **parameters)


def test_other_shapes_are_refused():
    with pytest.raises(ShapeMismatch, match="different shapes"):
        pcb([random_delta((6, 6)), random_delta((6, 12))], [1, 1])
