"""Iso-C, Iso-CTS, TSV-M, ACTMat and Localize against their published formulas, in numpy."""

import numpy as np
import pytest
import torch
from helpers.dense_merges import full_deltas, stacked
from helpers.strategies import spelt_out

from sparselet import SparseDelta
from sparselet.errors import ArgumentError
from sparselet.merging.algebra.spectral import nearest_orthonormal, svd
from sparselet.merging.methods.actmat import actmat
from sparselet.merging.methods.average import overlap
from sparselet.merging.methods.iso import iso_c, iso_cts
from sparselet.merging.methods.localize import localize
from sparselet.merging.methods.tsv import tsv

WEIGHTS = [1.0, 0.5, 2.0]
R = 10  # singular values of a 10×20 target


def dense(deltas, weights=WEIGHTS):
    return [w * x for w, x in zip(weights, stacked(deltas).numpy(), strict=True)]


def polar(a):
    p, _, q = np.linalg.svd(a, full_matrices=False)
    return p @ q


def assert_equals(delta, expected):
    torch.testing.assert_close(spelt_out(delta)[0], torch.from_numpy(np.asarray(expected)), rtol=1e-5, atol=1e-6)


def test_iso_c_levels_the_spectrum_of_the_sum():
    deltas = full_deltas(3)
    total = sum(dense(deltas))
    u, s, v = np.linalg.svd(total, full_matrices=False)
    merged = iso_c(deltas, WEIGHTS, scale=0.7)
    assert_equals(merged, 0.7 * s.mean() * u @ v)
    spectrum = np.linalg.svd(spelt_out(merged)[0].numpy(), compute_uv=False)
    np.testing.assert_allclose(spectrum, 0.7 * s.mean(), rtol=1e-5)


@pytest.mark.parametrize("common", [0.2, 0.5, 0.8, 1.0])
def test_iso_cts_adds_directions_of_each_expert(common):
    deltas, count = full_deltas(3), 3
    taus = dense(deltas)
    s = round((R - int(common * R)) / count)
    k = R - count * s
    u, sigma, v = np.linalg.svd(sum(taus), full_matrices=False)
    us, ss, vs = [u[:, :k]], [sigma[:k]], [v[:k].T]
    for tau in taus if s else ():
        a, b, c = np.linalg.svd(tau - u[:, :k] @ u[:, :k].T @ tau, full_matrices=False)
        us, ss, vs = [*us, a[:, :s]], [*ss, b[:s]], [*vs, c[:s].T]
    level = np.concatenate(ss).mean()
    expected = level * polar(np.concatenate(us, 1)) @ polar(np.concatenate(vs, 1)).T
    assert_equals(iso_cts(deltas, WEIGHTS, common=common), expected)
    if common == 1.0:
        assert_equals(iso_c(deltas, WEIGHTS), expected)


def test_tsv_keeps_the_largest_directions_of_each():
    deltas, k = full_deltas(3), R // 3
    us, ss, vs = zip(*(np.linalg.svd(tau, full_matrices=False) for tau in dense(deltas)), strict=True)
    u, v = np.concatenate([u[:, :k] for u in us], 1), np.concatenate([v[:k].T for v in vs], 1)
    assert_equals(tsv(deltas, WEIGHTS, scale=2.0), 2 * polar(u) @ np.diag(np.concatenate([s[:k] for s in ss])) @ polar(v).T)


def test_actmat_weighs_each_change_by_its_own_rows():
    deltas = full_deltas(3)
    changes = stacked(deltas).numpy()
    left = sum(w * d @ d.T @ d for w, d in zip(WEIGHTS, changes, strict=True))
    expected = left @ np.linalg.pinv(sum(d.T @ d for d in changes))
    assert_equals(actmat(deltas, WEIGHTS, scale=0.5), 0.5 * expected)
    turned = [SparseDelta.from_dense(delta.to_dense().T.contiguous()) for delta in deltas]
    assert_equals(actmat(turned, WEIGHTS, scale=0.5, transposed=True), 0.5 * expected.T)


def test_experts_at_right_angles_keep_their_outputs_with_tsv_and_actmat():
    first, second = torch.zeros(6, 12), torch.zeros(6, 12)
    first[:3, :6], second[3:, 6:] = torch.randn(3, 6), torch.randn(3, 6)
    deltas = [SparseDelta.from_dense(first), SparseDelta.from_dense(second)]
    for method in (tsv, actmat):
        assert_equals(method(deltas, [1.0, 1.0]), (first + second).double())


def test_localize_is_overlap_of_the_largest_entries():
    deltas = full_deltas(3)
    kept = []
    for delta in deltas:
        x = delta.to_dense()
        cutoff = x.abs().flatten().sort(descending=True).values[round(0.1 * x.numel()) - 1]
        kept.append(SparseDelta.from_dense(x, x.abs() >= cutoff))
    merged, expected = localize(deltas, WEIGHTS, density=0.1), overlap(kept, WEIGHTS)
    assert torch.equal(merged.indices, expected.indices)
    assert torch.equal(merged.values, expected.values)


def test_what_lies_outside_the_union_is_dropped():
    deltas = full_deltas(3, density=0.2)
    union = torch.stack([delta.mask() & (delta.to_dense() != 0) for delta in deltas]).any(0)
    sparse = [SparseDelta.from_dense(delta.to_dense()) for delta in deltas]
    for method in (iso_c, iso_cts, tsv, actmat):
        merged = method(sparse, WEIGHTS)
        assert torch.equal(merged.mask(), union)
        every = [SparseDelta.from_dense(d.to_dense(), torch.ones(d.shape, dtype=torch.bool)) for d in deltas]
        torch.testing.assert_close(merged.to_dense(), method(every, WEIGHTS).to_dense() * union)


def test_vectors_of_singular_values_that_are_zero_are_left_out():
    matrix = torch.randn(5, 2, dtype=torch.float64) @ torch.randn(2, 7, dtype=torch.float64)
    left, values, right = svd(matrix)
    assert len(values) == 2
    torch.testing.assert_close(left @ values.diag() @ right.T, matrix)
    twice = nearest_orthonormal(torch.cat([left, left], dim=1))
    torch.testing.assert_close(twice, torch.cat([left, left], dim=1) / 2**0.5)


@pytest.mark.parametrize("shape", [(260, 300), (300, 260)])
@pytest.mark.parametrize("rank", [0, 3, 64, 100])
def test_a_matrix_of_low_rank_has_the_singular_vectors_of_numpy(shape, rank):
    matrix = (torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])).double()  # rounded to float32, as a LoRA's change is
    left, values, right = svd(matrix)
    assert len(values) == rank
    np.testing.assert_allclose(values, np.linalg.svd(matrix.numpy(), compute_uv=False)[:rank], rtol=1e-6)
    torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close((left * values) @ right.T, matrix, rtol=1e-5, atol=1e-4)


def test_bad_parameters_are_refused_by_name():
    with pytest.raises(ArgumentError, match=r"common must be in \(0, 1\], got 2"):
        iso_cts(full_deltas(2), [1.0, 1.0], common=2)
    with pytest.raises(ArgumentError, match="transposed must be true or false, got 1"):
        actmat(full_deltas(2), [1.0, 1.0], transposed=1)
