"""Gram matrices and cosines against dense products; sums that do not depend on threads or order."""

import pytest
import torch
from helpers.strategies import few, random_delta, same_shape, spelt_out
from hypothesis import given

from sparselet import SparseDelta
from sparselet.errors import ShapeMismatch
from sparselet.merging.algebra.gram import cosines, gram
from sparselet.merging.algebra.sums import fixed_order_sum, sum_in_double


@few
@given(same_shape(1, 4))
def test_gram_holds_the_dense_products(deltas):
    flat = torch.stack([spelt_out(delta)[0].reshape(-1) for delta in deltas])
    assert torch.equal(gram(deltas), flat @ flat.T)


@few
@given(same_shape(1, 4))
def test_cosines_are_those_of_the_dense_vectors_and_0_for_zero(deltas):
    flat = torch.stack([spelt_out(delta)[0].reshape(-1) for delta in deltas])
    expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None, :], dim=2, eps=1e-30)
    torch.testing.assert_close(cosines(gram(deltas)), expected)


def test_small_and_large_deltas_keep_their_angle():
    """Beyond float32: 1e-30 squared would be 0, 1e30 squared infinite."""
    small, large = (SparseDelta((1, 2), torch.tensor([0, 1]), torch.tensor([3.0, 4.0]) * s) for s in (1e-30, 1e30))
    torch.testing.assert_close(cosines(gram([small, large])), torch.ones(2, 2, dtype=torch.float64))


def test_other_shapes_are_refused():
    with pytest.raises(ShapeMismatch, match="different shapes"):
        gram([random_delta((6, 6)), random_delta((6, 12))])


def test_total_is_the_same_with_any_number_of_threads():
    numbers = torch.rand(300_001, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        found.append(fixed_order_sum(numbers))
    torch.set_num_threads(threads)
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(numbers.sum().item(), rel=1e-12)
    assert fixed_order_sum(torch.empty(0, dtype=torch.float64)) == 0


def test_sums_that_cancel_are_zero_in_any_order():
    one, other = (SparseDelta((1, 1), torch.tensor([0]), torch.tensor([value])) for value in (0.1, 0.003))
    deltas = [one, other, one.scale(-1), other.scale(-1)]  # in float32 0.1 + 0.003 - 0.1 - 0.003 is not 0
    for order in ([0, 1, 2, 3], [0, 2, 1, 3], [1, 0, 3, 2]):
        assert sum_in_double([deltas[i] for i in order], [1.0] * 4).item() == 0


@few
@given(same_shape(1, 4))
def test_sum_in_double_is_the_dense_sum(deltas):
    dense = sum(spelt_out(delta)[0] for delta in deltas)
    alike = [delta.expand() for delta in deltas]
    assert torch.equal(sum_in_double(alike, [1.0] * len(alike)).view(dense.shape), dense)
