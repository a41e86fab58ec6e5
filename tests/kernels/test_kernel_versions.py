"""Every version of an operation against the reference, and which is taken when."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselet import kernels
from sparselet.errors import ArgumentError
from sparselet.kernels import bands, choice, reference
from sparselet.kernels.choice import choose, costs

CPU = torch.device("cpu")
SIZES = st.sampled_from([(6, 12), (12, 6), (48, 12), (40, 72), (1, 6), (6, 1), (18, 36)])
TOKENS = st.sampled_from([(0,), (1,), (7,), (2, 5), (3, 0)])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 6e-2}


@st.composite
def cases(draw, lines=False):
    """Inputs of a masked weight gradient, with masks that leave whole rows out, and that leave nothing out.

    lines: whole rows and columns too.
    """
    rows, columns = draw(SIZES)
    tiles = [(b, b) for b in (1, 2, 3, 6) if rows % b == 0 and columns % b == 0]
    block = draw(st.sampled_from([*tiles, *(((1, columns), (rows, 1)) if lines else ())]))
    count = rows * columns // math.prod(block)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    kept = round(draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0])) * count)
    blocks = torch.randperm(count, generator=generator)[:kept]
    if draw(st.booleans()):
        blocks = blocks[blocks // (columns // block[1]) % 2 == 1]  # every other row is empty
    leading, dtype, transposed = draw(TOKENS), draw(st.sampled_from(list(TOLERANCE))), draw(st.booleans())
    inside, outside = (rows, columns) if transposed else (columns, rows)
    x, grad_output = (torch.randn(*leading, side, generator=generator, dtype=torch.float64) for side in (inside, outside))
    x, grad_output = x.to(dtype), grad_output.to(dtype)
    if draw(st.booleans()):  # slices of a fused projection, and a view that is transposed in memory
        x = torch.cat([x, x], dim=-1)[..., :inside]
        grad_output = grad_output.transpose(0, -1).contiguous().transpose(0, -1)
    blocks = blocks.sort().values.to(draw(st.sampled_from([torch.int32, torch.int64])))
    return x, grad_output, blocks, block, transposed


@settings(deadline=None, max_examples=150)
@given(case=cases(), height=st.sampled_from([1, 2, 5, 16, 100]))
def test_bands_give_the_reference(case, height):
    x, grad_output, blocks, block, transposed = case
    expected = reference.masked_weight_gradient(x.double(), grad_output.double(), blocks, block, transposed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "HEIGHT", height)
        found = bands.banded_weight_gradient(*case)
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[x.dtype], rtol=TOLERANCE[x.dtype])


@settings(deadline=None, max_examples=50)
@given(case=cases(lines=True), forced=st.sampled_from([None, "dense", "bands"]))
def test_whichever_is_chosen_gives_the_reference(case, forced):
    x, grad_output, blocks, block, transposed = case
    expected = reference.masked_weight_gradient(x.double(), grad_output.double(), blocks, block, transposed)
    with pytest.MonkeyPatch.context() as patch:
        if forced:
            patch.setenv(choice.FORCE, forced)
        found = kernels.masked_weight_gradient(*case)
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[x.dtype], rtol=TOLERANCE[x.dtype])


@pytest.mark.parametrize("name", ["dense", "bands"])
def test_the_version_that_is_named_is_used(monkeypatch, name):
    used = []
    for variant, module, function in (
        ("bands", kernels, "banded_weight_gradient"),
        ("dense", reference, "masked_weight_gradient"),
    ):
        own = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, own=own, variant=variant: (used.append(variant), own(*a))[1])
    monkeypatch.setenv("SPARSELET_KERNEL", name)
    kernels.masked_weight_gradient(torch.ones(2, 4), torch.ones(2, 4), torch.tensor([1]))
    assert used == [name]


def test_a_name_that_is_none_of_them_is_refused(monkeypatch):
    monkeypatch.setenv("SPARSELET_KERNEL", "fast")
    with pytest.raises(ArgumentError, match="SPARSELET_KERNEL must be one of dense, bands, triton, got 'fast'"):
        kernels.masked_weight_gradient(torch.ones(2, 4), torch.ones(2, 4), torch.tensor([1]))


SQUARE, TALL = (2048, 2048), (192, 576)


@pytest.mark.parametrize(
    ("shape", "tokens", "density", "side", "expected"),
    [
        (SQUARE, 1024, 0.1, 1, "dense"),
        (SQUARE, 1024, 0.05, 1, "dense"),
        (SQUARE, 1024, 0.01, 1, "bands"),
        (SQUARE, 1024, 0.1, 16, "bands"),
        (SQUARE, 1024, 1.0, 16, "dense"),
        (SQUARE, 1024, 1.0, 64, "dense"),
        (SQUARE, 1024, 0.5, 64, "bands"),
        (TALL, 1024, 0.1, 1, "dense"),
        (TALL, 1024, 0.003, 1, "bands"),
        (TALL, 1024, 0.1, 16, "bands"),
        (TALL, 1, 0.1, 16, "dense"),
        (TALL, 0, 0.1, 16, "dense"),
    ],
)
def test_the_choice_is_what_was_measured_to_be_faster(shape, tokens, density, side, expected):
    blocks = round(density * shape[0] * shape[1] / side**2)
    assert choose(shape, tokens, blocks, (side, side), CPU) == expected


def test_small_products_are_not_shared_by_many_threads():
    blocks = round(0.1 * TALL[0] * TALL[1] / 16**2)
    chosen = {threads: min((found := costs(TALL, 1024, blocks, (16, 16), threads)), key=found.get) for threads in (1, 2, 16)}
    assert chosen == {1: "bands", 2: "bands", 16: "dense"}


def test_the_number_of_threads_is_left_as_it_was():
    before = torch.get_num_threads()
    for density, side in ((0.1, 16), (0.01, 1)):
        blocks = torch.arange(0, 192 * 576 // side**2, round(1 / density))
        bands.banded_weight_gradient(torch.randn(64, 576), torch.randn(64, 192), blocks, (side, side))
        assert torch.get_num_threads() == before


@pytest.mark.parametrize("forced", [None, "dense", "bands", "triton"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("block", [(1, 576), (192, 1)])
def test_whole_rows_and_columns_are_one_product_unless_the_dense_one_is_named(monkeypatch, forced, device, block):
    if forced:
        monkeypatch.setenv(choice.FORCE, forced)
    assert choose(TALL, 1024, 10, block, torch.device(device)) == ("dense" if forced == "dense" else "lines")


@given(
    shape=SIZES,
    tokens=st.integers(0, 4096),
    share=st.floats(0, 1),
    side=st.sampled_from([1, 6]),
    threads=st.integers(1, 64),
)
def test_costs_grow_with_the_work(shape, tokens, share, side, threads):
    blocks = round(share * (shape[0] // side) * (shape[1] // side))
    here = costs(shape, tokens, blocks, (side, side), threads)
    more = costs(shape, tokens + 1, blocks, (side, side), threads)
    assert all(0 <= here[name] <= more[name] for name in here)
    assert here.keys() == {"dense", "bands"}


def test_on_other_devices_the_dense_product_is_made():
    assert choose(SQUARE, 1024, 10, (1, 1), torch.device("cuda")) == "dense"


# Selection

NUMBERS = st.one_of(
    st.floats(width=32, allow_nan=False), st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, float("inf")])
)


@settings(deadline=None, max_examples=100)
@given(
    parts=st.lists(st.lists(NUMBERS, max_size=20), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    chunk=st.sampled_from([1, 3, 2**22]),
)
def test_the_kth_largest_is_that_of_a_sort(parts, dtype, chunk):
    tensors = [torch.tensor(part, dtype=torch.float64).to(dtype) for part in parts]
    ordered = torch.cat(tensors).double().sort(descending=True).values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparselet.kernels.select._CHUNK", chunk)
        for k in range(1, len(ordered) + 1):
            found = kernels.kth_largest(tensors, k)
            assert found.dtype == dtype
            assert found.double() == ordered[k - 1]


def test_the_kth_largest_of_many_is_that_of_a_sort():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, generator=generator) for n in (1000, 1, 50_000)]
    ordered = torch.cat(parts).sort(descending=True).values
    for k in (1, 2, 5000, 25_000, 51_001):
        assert kernels.kth_largest(parts, k) == ordered[k - 1]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_selected_are_the_places_of_what_is_not_zero(dtype):
    marks = torch.tensor([0, 1, 0, 2, -3, 0]).to(dtype)
    assert kernels.selected(marks).tolist() == [1, 3, 4]
    assert kernels.selected(torch.zeros(0, dtype=dtype)).tolist() == []
