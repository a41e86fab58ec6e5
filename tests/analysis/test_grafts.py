"""Parts of a change, against dense masks."""

import pytest
import torch

from sparselet.analysis.grafts import PARTS, graft
from sparselet.delta import SparseDelta
from sparselet.errors import DensityOutOfRange


@pytest.fixture
def dense():
    return torch.randn(40, 50, generator=torch.Generator().manual_seed(1))


def part_of(dense, part, fraction, seed=0):
    return graft(SparseDelta.from_dense(dense), part, fraction, torch.Generator().manual_seed(seed))


def test_top_and_complement_divide_the_change(dense):
    top, rest = part_of(dense, "top", 0.1), part_of(dense, "complement", 0.1)
    order = dense.abs().reshape(-1).argsort(descending=True)
    assert set(top.indices.tolist()) == set(order[:200].tolist())
    torch.testing.assert_close(top.to_dense() + rest.to_dense(), dense)
    assert not top.overlap(rest)


def test_bottom_and_the_next_largest(dense):
    order = dense.abs().reshape(-1).argsort(descending=True)
    assert set(part_of(dense, "bottom", 0.1).indices.tolist()) == set(order[-200:].tolist())
    assert set(part_of(dense, "top_without_largest", 0.1).indices.tolist()) == set(order[2:202].tolist())


def test_a_random_part_is_rescaled_to_the_whole_in_expectation(dense):
    mean = sum(part_of(dense, "random_rescaled", 0.5, seed).to_dense() for seed in range(400)) / 400
    assert float((mean - dense).norm() / dense.norm()) < 0.1
    plain, scaled = part_of(dense, "random", 0.25), part_of(dense, "random_rescaled", 0.25)
    torch.testing.assert_close(plain.to_dense() * 4, scaled.to_dense())
    assert plain.nnz == 500


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_no_more_than_the_change(part):
    delta = SparseDelta.from_dense(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    generator = torch.Generator().manual_seed(0)
    assert graft(delta, part, 1.0, generator).nnz <= 2
    assert graft(SparseDelta.empty((2, 2)), part, 0.5, generator).nnz == 0
    with pytest.raises(DensityOutOfRange):
        graft(delta, part, 0.0, generator)
