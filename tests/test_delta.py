"""SparseDelta against dense tensors."""

import math

import pytest
import torch
from helpers.strategies import BLOCKS, SHAPES, assert_is, block_sums, deltas, few, random_delta, same_shape, spelt_out
from hypothesis import given
from hypothesis import strategies as st

from sparselet import SparseDelta
from sparselet.delta import MAX_SIDE, block_for, check_indices, index_dtype
from sparselet.errors import (
    AbsurdShape,
    BadDtype,
    BadShape,
    BlockSizeError,
    DuplicateIndex,
    FormatError,
    IndexOutOfBounds,
    ShapeMismatch,
    UnsortedIndices,
)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def size_of(delta):
    """The `block_size` of its blocks."""
    return next(size for size in BLOCKS if block_for(size, delta.shape) == delta.block)


@few
@given(deltas())
def test_to_dense_and_mask_are_the_blocks_spelt_out(delta):
    dense, mask = spelt_out(delta)
    assert torch.equal(delta.to_dense().double(), dense)
    assert torch.equal(delta.mask(), mask)


@few
@given(deltas())
def test_from_dense_with_its_mask_is_the_same_delta(delta):
    again = SparseDelta.from_dense(delta.to_dense(), delta.mask(), size_of(delta))
    assert torch.equal(again.indices, delta.indices)
    assert torch.equal(again.values, delta.values)


@few
@given(deltas())
def test_from_dense_without_a_mask_keeps_what_is_not_zero(delta):
    dense, _ = spelt_out(delta)
    assert_is(SparseDelta.from_dense(dense), dense, dense != 0)


@few
@given(deltas(), st.sampled_from(BLOCKS))
def test_from_dense_in_blocks_keeps_each_block_with_a_selected_entry(delta, block_size):
    dense, mask = spelt_out(delta)
    h, w = block_for(block_size, delta.shape)
    tiles = (block_sums(mask.int(), block_size) > 0).view(delta.shape[0] // h, -1)
    whole = tiles.repeat_interleave(h, 0).repeat_interleave(w, 1)
    made = SparseDelta.from_dense(dense, mask, block_size)
    assert made.block == (h, w)
    assert_is(made, dense, whole)
    assert_is(SparseDelta.from_dense(dense, tiles, block_size), dense, whole)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block_size", [1, 3, "row", "column"])
def test_values_keep_their_dtype(dtype, block_size):
    delta = random_delta((6, 12), block_size, dtype=dtype)
    assert delta.to_dense().dtype == dtype
    assert SparseDelta.from_dense(delta.to_dense(), delta.mask(), block_size).values.dtype == dtype
    assert delta.expand().values.dtype == delta.scale(0.5).values.dtype == (delta + delta).values.dtype == dtype
    assert delta.to_dense(torch.float64).dtype == torch.float64


@pytest.mark.parametrize("block_size", [1, 2, "row", "column"])
def test_a_selected_zero_stays_selected(block_size):
    delta = SparseDelta.from_dense(torch.zeros(4, 6), torch.ones(4, 6, dtype=torch.bool), block_size)
    assert delta.nnz == 24
    for kept in (delta.expand(), delta.scale(0.0), delta + delta, delta.restrict(delta)):
        assert kept.nnz == 24
        assert bool(kept.mask().all())


def test_from_dense_reads_a_transposed_tensor_in_its_own_order():
    dense = torch.arange(24.0).view(4, 6).t()
    for block_size in (1, 2, "row", "column"):
        delta = SparseDelta.from_dense(dense, torch.ones(6, 4, dtype=torch.bool), block_size)
        assert torch.equal(delta.to_dense(), dense)


@few
@given(deltas())
def test_sizes_count_selected_entries(delta):
    _, mask = spelt_out(delta)
    assert delta.nnz == int(mask.sum())
    assert delta.size == mask.numel()
    assert delta.blocks * math.prod(delta.block) == delta.size
    assert delta.density == int(mask.sum()) / mask.numel()


@few
@given(deltas())
def test_expand_has_the_same_entries_under_an_element_mask(delta):
    expanded = delta.expand()
    assert expanded.block == (1, 1)
    assert_is(expanded, *spelt_out(delta))


@few
@given(same_shape())
def test_restrict_keeps_the_entries_of_both_masks(pair):
    (dense, mask), (_, other) = map(spelt_out, pair)
    expected = torch.where(mask & other, dense, 0.0), mask & other
    assert_is(pair[0].restrict(pair[1]), *expected)
    assert_is(pair[0].restrict(other), *expected)


@few
@given(same_shape())
def test_overlap_counts_the_entries_of_both_masks(pair):
    masks = [spelt_out(delta)[1] for delta in pair]
    assert pair[0].overlap(pair[1]) == pair[1].overlap(pair[0]) == int((masks[0] & masks[1]).sum())


@few
@given(deltas(), st.integers(-4, 4).map(lambda n: n / 2))
def test_scale_multiplies_the_values_and_keeps_the_mask(delta, factor):
    dense, mask = spelt_out(delta)
    for scaled in (delta.scale(factor), delta * factor, factor * delta):
        assert_is(scaled, factor * dense, mask)


@few
@given(same_shape())
def test_sum_is_dense_on_the_union_of_the_masks(pair):
    (dense, mask), (other_dense, other) = map(spelt_out, pair)
    assert_is(pair[0] + pair[1], dense + other_dense, mask | other)


@pytest.mark.parametrize("block_size", [3, "row", "column"])
def test_blocks_stay_blocks_between_deltas_of_the_same_blocks(block_size):
    first, second = (random_delta((6, 12), block_size, 0.5, seed) for seed in (1, 2))
    assert (first + second).block == first.restrict(second).block == block_for(block_size, (6, 12))


def test_sum_takes_the_wider_dtype():
    low, high = random_delta((6, 6), dtype=torch.bfloat16), random_delta((6, 6), seed=1)
    assert (low + high).values.dtype == (high + low).values.dtype == torch.float32


def test_to_casts_the_values_only():
    delta = random_delta((6, 6))
    assert delta.to(torch.bfloat16).values.dtype == torch.bfloat16
    assert torch.equal(delta.to(torch.bfloat16).indices, delta.indices)


def test_empty_changes_nothing():
    empty = SparseDelta.empty((6, 12))
    delta = random_delta((6, 12), 3)
    assert empty.nnz == 0
    assert torch.equal(empty.to_dense(), torch.zeros(6, 12))
    assert_is(delta + empty, *spelt_out(delta))


def test_indices_are_int32_until_they_cannot_number_the_blocks():
    assert random_delta((6, 6)).indices.dtype == torch.int32
    assert index_dtype(2**31 - 1) == torch.int32
    assert index_dtype(2**31) == torch.int64
    wide = SparseDelta((2**20, 2**12), torch.tensor([2**32 - 1]), torch.ones(1))
    assert wide.indices.dtype == torch.int64


def test_repr_says_shape_mask_and_size():
    assert repr(random_delta((6, 12), 3, density=1.0)) == "SparseDelta(6×12, block 3×3, nnz 72, density 1)"
    assert repr(random_delta((6, 12), "row", density=1.0)) == "SparseDelta(6×12, block 1×12, nnz 72, density 1)"


def element(indices, values=None, shape=(4, 6)):
    indices = torch.tensor(indices)
    return SparseDelta(shape, indices, torch.ones(len(indices)) if values is None else values)


@pytest.mark.parametrize("index", [-1, 24, 2**31 - 1, -(2**31)])
def test_an_index_outside_the_target_is_refused(index):
    with pytest.raises(IndexOutOfBounds, match=f"index {index} lies outside the target, which has 24 blocks"):
        element(sorted([3, index]))


@pytest.mark.parametrize(("block", "blocks"), [((2, 2), 6), ((1, 6), 4), ((4, 1), 6)])
def test_a_block_outside_the_target_is_refused(block, blocks):
    with pytest.raises(IndexOutOfBounds, match=f"which has {blocks} blocks"):
        SparseDelta((4, 6), torch.tensor([blocks]), torch.ones(1, *block))


def test_unsorted_indices_are_refused():
    with pytest.raises(UnsortedIndices, match="position 1 holds 7 and position 2 5"):
        element([3, 7, 5])


def test_a_duplicate_index_is_refused():
    with pytest.raises(DuplicateIndex, match=r"index 7 occurs twice \(positions 1 and 2\)"):
        element([3, 7, 7])


def test_indices_at_the_end_of_int32_are_compared_without_wrapping():
    check_indices(torch.tensor([0, 2**31 - 2], dtype=torch.int32), 2**31 - 1)
    with pytest.raises(UnsortedIndices):
        check_indices(torch.tensor([2**31 - 2, 0], dtype=torch.int32), 2**31 - 1)


@pytest.mark.parametrize(
    ("indices", "values"),
    [
        ([1, 2], torch.ones(3)),
        ([1, 2], torch.ones(2, 1)),
        ([1, 2], torch.ones(2, 1, 1)),
        ([[1, 2]], torch.ones(2)),
        ([1, 2], torch.ones(3, 2, 2)),
        ([1, 2], torch.ones(2, 2, 2, 2)),
        ([1, 2], torch.tensor(1.0)),
    ],
)
def test_values_and_indices_that_do_not_belong_together_are_refused(indices, values):
    with pytest.raises(BadShape, match="do not belong together"):
        SparseDelta((4, 6), torch.tensor(indices), values)


@pytest.mark.parametrize("block", [(3, 3), (1, 4), (3, 1), (0, 2), (2, 0), (8, 8), (1, 12)])
def test_blocks_that_do_not_divide_the_target_are_refused(block):
    with pytest.raises(BlockSizeError, match=f"blocks of {block[0]}×{block[1]} do not divide the sides of a target of 4×6"):
        SparseDelta((4, 6), torch.tensor([0]), torch.ones(1, *block))


def test_rows_and_columns_are_of_outputs_and_inputs():
    assert block_for("row", (4, 6)) == block_for("column", (4, 6), transposed=True) == (1, 6)
    assert block_for("column", (4, 6)) == block_for("row", (4, 6), transposed=True) == (4, 1)


@pytest.mark.parametrize("shape", [(4,), (4, 6, 2), (0, 6), (-4, 6), (4.0, 6), (True, 6), ("4", 6)])
def test_a_shape_without_two_positive_sides_is_refused(shape):
    with pytest.raises(BadShape, match="two positive sides"):
        SparseDelta.empty(shape)


@pytest.mark.parametrize("shape", [(2**40, 2), (2, MAX_SIDE + 1), (2**20, 2**20)])
def test_a_shape_beyond_any_model_is_refused(shape):
    with pytest.raises(AbsurdShape, match="larger than any target"):
        SparseDelta.empty(shape)


@pytest.mark.parametrize(("values", "indices"), [(torch.int32, torch.int32), (torch.bool, torch.int64)])
def test_values_that_are_not_floating_are_refused(values, indices):
    with pytest.raises(BadDtype, match="values must be floating"):
        SparseDelta((4, 6), torch.zeros(1, dtype=indices), torch.ones(1, dtype=values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8])
def test_indices_of_another_dtype_are_refused(dtype):
    with pytest.raises(BadDtype, match="indices must be int32 or int64"):
        SparseDelta((4, 6), torch.zeros(1, dtype=dtype), torch.ones(1))


@pytest.mark.parametrize("block_size", [4, 5, 16])
def test_a_block_size_that_does_not_divide_names_those_that_fit(block_size):
    with pytest.raises(
        BlockSizeError, match=rf"block_size {block_size} does not divide .* Sizes that fit: 1, 2, 3, 6, row, column\."
    ):
        SparseDelta.from_dense(torch.ones(6, 18), block_size=block_size)


@pytest.mark.parametrize("block_size", [0, -2, 2.0, True, None, "tile", (1, 6)])
def test_a_block_size_that_is_no_positive_integer_is_refused(block_size):
    with pytest.raises(BlockSizeError, match="positive integer"):
        SparseDelta.from_dense(torch.ones(6, 18), block_size=block_size)


@pytest.mark.parametrize("mask", [torch.ones(6, 4, dtype=torch.bool), torch.ones(4, 6), torch.ones(1, 1, dtype=torch.bool)])
def test_a_mask_of_another_shape_or_dtype_is_refused(mask):
    with pytest.raises(ShapeMismatch, match="mask must be bool"):
        SparseDelta.from_dense(torch.ones(4, 6), mask)


def test_deltas_of_different_shapes_do_not_combine():
    wide, tall = (random_delta(shape) for shape in SHAPES[1:])
    for combine in (lambda: wide + tall, lambda: wide.overlap(tall), lambda: wide.restrict(tall)):
        with pytest.raises(ShapeMismatch, match=r"\[6, 12\], the other \[12, 6\]"):
            combine()
    with pytest.raises(ShapeMismatch):
        wide.restrict(tall.mask())


def test_index_errors_are_format_errors_and_argument_errors_are_value_errors():
    assert issubclass(IndexOutOfBounds, FormatError)
    assert issubclass(BlockSizeError, ValueError)
    assert issubclass(ShapeMismatch, ValueError)
