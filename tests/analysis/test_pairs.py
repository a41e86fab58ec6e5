"""Overlap of two changes, by dense sets; ranks and directions by torch's own decompositions."""

import pytest
import torch
from helpers.strategies import random_delta

from sparselet.analysis.pairs import overlap_of, subspace_overlap
from sparselet.analysis.spectrum import random_ranks, spectrum
from sparselet.delta import SparseDelta
from sparselet.errors import ShapeMismatch


@pytest.mark.parametrize("block_sizes", [(1, 1), (3, 1), (3, 3)], ids=str)
def test_overlap_of_masks_is_that_of_dense_sets(block_sizes):
    a, b = (random_delta((12, 18), size, 0.4, seed) for seed, size in enumerate(block_sizes))
    found = overlap_of(a, b)
    x, y, m, n = a.to_dense().double(), b.to_dense().double(), a.mask(), b.mask()
    assert found.jaccard == pytest.approx(int((m & n).sum()) / int((m | n).sum()))
    assert found.sign_agreement == pytest.approx(int((x.sign() * y.sign() > 0)[m & n].sum()) / max(1, int((x * y != 0).sum())))
    assert found.cosine == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())))


def test_the_largest_entries_are_compared_at_a_density():
    a, b = (torch.randn(20, 30, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    found = overlap_of(SparseDelta.from_dense(a), SparseDelta.from_dense(b), density=0.1)
    tops = [set(matrix.abs().reshape(-1).topk(60).indices.tolist()) for matrix in (a, b)]
    assert found.jaccard == pytest.approx(len(tops[0] & tops[1]) / len(tops[0] | tops[1]))
    assert found.chance == pytest.approx(0.1 / 1.9)


def test_independent_masks_overlap_by_chance():
    a, b = (random_delta((400, 400), 1, 0.05, seed) for seed in (1, 2))
    total = overlap_of(a, b) + overlap_of(b, a)
    assert total.jaccard == pytest.approx(total.chance, rel=0.1)
    assert total.chance == pytest.approx(0.05 / 1.95, rel=0.01)
    assert total.sign_agreement == pytest.approx(0.5, abs=0.05)


def test_changes_of_different_shapes_are_refused():
    with pytest.raises(ShapeMismatch, match=r"\[2, 3\], the other \[3, 2\]"):
        overlap_of(SparseDelta.empty((2, 3)), SparseDelta.empty((3, 2)))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)], ids=str)
def test_ranks_are_those_of_the_singular_values(shape):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    sigma = torch.linalg.svdvals(change.double())
    result = spectrum(change)
    torch.testing.assert_close(result.energies.double(), sigma**2, rtol=1e-4, atol=1e-4)
    assert result.stable_rank == pytest.approx(float((sigma**2).sum() / sigma[0] ** 2), rel=1e-5)
    p = sigma**2 / (sigma**2).sum()
    assert result.effective_rank == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-5)
    assert spectrum(torch.zeros(shape)).stable_rank == 0


def test_ranks_of_random_entries_are_those_of_the_closed_forms():
    change = torch.randn(300, 500, generator=torch.Generator().manual_seed(1))
    stable, effective = random_ranks(300, 500)
    assert spectrum(change).stable_rank == pytest.approx(stable, rel=0.05)
    assert spectrum(change.T).effective_rank == pytest.approx(effective, rel=0.02)
    sparse = change * (torch.rand(300, 500, generator=torch.Generator().manual_seed(2)) < 0.2)
    assert spectrum(sparse).effective_rank == pytest.approx(effective, rel=0.03)


def test_subspaces_of_one_change_are_equal_and_random_ones_meet_by_chance():
    first, second = (torch.randn(80, 100, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    for change in (first, first.T):
        assert subspace_overlap(change, change, 8)[0] == pytest.approx(1.0, abs=1e-5)
    bases = [torch.linalg.svd(matrix.T.double()).U[:, :8] for matrix in (first, second)]
    cosines = torch.linalg.svdvals(bases[0].T @ bases[1])
    assert subspace_overlap(first.T, second.T, 8)[0] == pytest.approx(float(cosines.square().mean()), abs=1e-4)
    measured, chance = subspace_overlap(first, second, 8)
    assert measured == pytest.approx(chance, abs=0.05)
