"""What test_triton.py runs: each Triton kernel against the reference and, for gradients, autograd in float64.

With TRITON_INTERPRET=1 the kernels are interpreted on the CPU. Without, they are compiled: all but the last tests then need
a GPU.
"""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import triton.language as tl
from helpers.paper import paper_config
from hypothesis import given, settings
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, interpreter

from sparselet.errors import ArgumentError, BlockSizeError, ShapeMismatch
from sparselet.kernels import reference
from sparselet.kernels import triton as kernels
from sparselet.tuner import SparseletLayer

INTERPRETED = knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"

runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device")
compiles = pytest.mark.skipif(INTERPRETED, reason="an interpreter compiles nothing")
few = settings(max_examples=7, deadline=None, derandomize=True, database=None)

DENSITIES = (0.1, 0.4, 1.0, 0.0)
WEIGHT_AND_VALUES = (  # as the layer has them, and values of 16 bits
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float32),
)


@pytest.fixture(autouse=True, scope="module")
def bfloat16_as_on_a_device():
    """Triton's interpreter multiplies the bits of bfloat16 as integers, and cuts where a device rounds; not so here."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast = builder.create_dot, builder.cast_impl
    dtypes = {tl.bfloat16: torch.bfloat16, tl.float32: torch.float32, tl.float64: torch.float64}

    def cast_impl(self, source, to):
        ends = source.dtype.scalar, to.scalar
        if tl.bfloat16 not in ends or not set(ends) <= set(dtypes):
            return cast(self, source, to)
        numbers = torch.from_numpy(np.ascontiguousarray(source.data))
        numbers = numbers.view(torch.bfloat16) if ends[0] == tl.bfloat16 else numbers
        numbers = numbers.to(dtypes[ends[1]])
        return handle((numbers.view(torch.uint16) if ends[1] == tl.bfloat16 else numbers).numpy(), to.scalar)

    def create_dot(self, a, b, *others):
        a, b = (cast_impl(self, side, tl.float32) if side.dtype.scalar == tl.bfloat16 else side for side in (a, b))
        return dot(self, a, b, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "cast_impl", cast_impl)
        patch.setattr(builder, "create_dot", create_dot)
        yield


def random(*shape, dtype=torch.float32, seed=0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def chosen(count: int, density: float, seed: int, dtype=torch.int32) -> Tensor:
    """About `density` of the ids below `count`, ascending; all of them at 1."""
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < density
    return drawn.nonzero().squeeze(1).to(dtype)


ARRANGEMENTS = ("contiguous", "other order", "every other feature", "one of three", "longer batch", "one for all")


def arranged(leading: tuple[int, ...], features: int, arrangement: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers [*leading, features] that lie in memory in one of the ways of ARRANGEMENTS, NaN around them."""
    numbers = random(*leading, features, dtype=dtype, seed=seed).to(DEVICE)
    if arrangement == "one for all":
        return random(features, dtype=dtype, seed=seed).to(DEVICE).expand(*leading, features)
    if arrangement == "other order":
        order = [*reversed(range(len(leading))), len(leading)]
        return numbers.permute(order).contiguous().permute(order)
    if arrangement == "every other feature":
        room = numbers.new_full((*leading, 2 * features), torch.nan)[..., ::2]
    elif arrangement == "one of three":
        room = numbers.new_full((*leading, 3 * features), torch.nan)[..., features : 2 * features]
    elif arrangement == "longer batch" and leading:
        room = numbers.new_full((*leading[:-1], leading[-1] + 3, features), torch.nan)[..., : leading[-1], :]
    else:
        return numbers
    return room.copy_(numbers)


def autograds(x: Tensor, grad_output: Tensor, transposed: bool) -> Tensor:
    """∂L/∂W in float64."""
    sides = x.shape[-1], grad_output.shape[-1]
    weight = x.new_zeros(sides if transposed else sides[::-1], dtype=torch.float64, requires_grad=True)
    y = x.double() @ (weight if transposed else weight.t())
    y.backward(grad_output.double())
    assert weight.grad is not None
    return weight.grad


def assert_is_gradient(
    found: Tensor, x: Tensor, grad_output: Tensor, blocks: Tensor, block_size: int, transposed: bool
) -> None:
    """Within the rounding of a sum in float32, and of the result."""
    block = (block_size, block_size)
    exact = reference.gather(autograds(x, grad_output, transposed), blocks, block)
    summands = reference.gather(autograds(x.abs(), grad_output.abs(), transposed), blocks, block)
    assert found.shape == exact.shape
    allowed = 1e-6 * summands + 0.51 * torch.finfo(found.dtype).eps * exact.abs() + torch.finfo(found.dtype).tiny
    assert ((found.double() - exact).abs() <= allowed).all()
    # The reference has a rounding of its own.
    expected = reference.masked_weight_gradient(x, grad_output, blocks, block, transposed)
    assert ((found.double() - expected.double()).abs() <= 2 * allowed + torch.finfo(expected.dtype).eps * exact.abs()).all()


LEADING = ((), (0,), (1,), (7,), (65,), (600,), (2, 5), (3, 33), (2, 300), (2, 0), (1, 4), (2, 3, 5), (2, 1, 3))


@st.composite
def gradients(draw: st.DrawFn, block_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, bool]:
    """x, grad_output, blocks, transposed."""
    most = {1: 9, 16: 6, 32: 4, 64: 3, 128: 2}[block_size]
    leading = draw(st.sampled_from(LEADING))
    tiles = draw(st.integers(1, most)), draw(st.integers(1, most))
    x, grad_output = (
        arranged(leading, side * block_size, draw(st.sampled_from(ARRANGEMENTS)), dtype, seed)
        for seed, side in enumerate(tiles)
    )
    density, id_dtype = draw(st.sampled_from(DENSITIES)), draw(st.sampled_from((torch.int32, torch.int64)))
    blocks = chosen(tiles[0] * tiles[1], density, draw(st.integers(0, 99)), id_dtype).to(DEVICE)
    return x, grad_output, blocks, draw(st.booleans())


@runs
@pytest.mark.parametrize("dtype", kernels.GRADIENT_DTYPES)
@pytest.mark.parametrize("block_size", kernels.GRADIENT_BLOCK_SIZES)
@few
@given(st.data())
def test_tile_gradient_is_autograds_at_the_tiles(block_size, dtype, data):
    x, grad_output, blocks, transposed = data.draw(gradients(block_size, dtype))
    found = kernels.tile_gradient(x, grad_output, blocks, block_size, transposed)
    assert found.dtype == x.dtype
    assert_is_gradient(found, x, grad_output, blocks, block_size, transposed)
    assert torch.equal(kernels.tile_gradient(x, grad_output, blocks, block_size, transposed), found)


@runs
@pytest.mark.parametrize("dtype", kernels.GRADIENT_DTYPES)
@few
@given(st.data())
def test_entry_gradient_is_autograds_at_the_entries(dtype, data):
    x, grad_output, blocks, transposed = data.draw(gradients(1, dtype))
    found = kernels.entry_gradient(x, grad_output, blocks, transposed)
    assert found.dtype == x.dtype
    assert_is_gradient(found, x, grad_output, blocks, 1, transposed)
    assert torch.equal(kernels.entry_gradient(x, grad_output, blocks, transposed), found)


@runs
@pytest.mark.parametrize("block_size", kernels.GRADIENT_BLOCK_SIZES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_of_tiles_without_any_and_groups_across_rows(block_size, transposed):
    # Three tiles of row 0, none of row 1, one of row 2, the last two of row 3: no group is of one row.
    x, grad_output = random(20, (6, 4)[transposed] * block_size), random(20, (4, 6)[transposed] * block_size)
    blocks = torch.tensor([1, 2, 5, 14, 22, 23]).to(DEVICE)
    found = kernels.tile_gradient(x.to(DEVICE), grad_output.to(DEVICE), blocks, block_size, transposed)
    assert_is_gradient(found, x.to(DEVICE), grad_output.to(DEVICE), blocks, block_size, transposed)


@runs
def test_tile_gradient_writes_nothing_but_its_tiles(monkeypatch):
    spare = torch.full((4096,), 7.0, device=DEVICE)

    def empty(shape, dtype, device):
        assert device.type == DEVICE
        return spare.to(dtype)[: torch.Size(shape).numel()].view(shape)

    monkeypatch.setattr(kernels.torch, "empty", empty)
    x = random(3, 32).to(DEVICE)
    for count in range(1, 5):
        spare.fill_(7.0)
        kernels.tile_gradient(x, x, torch.arange(count, device=DEVICE), 16)
        assert not (spare[: 256 * count] == 7.0).any()
        assert (spare[256 * count :] == 7.0).all()


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_may_keep_the_precision_it_was_summed_in(dtype):
    x, grad_output = random(700, 32, dtype=dtype).to(DEVICE), random(700, 16, dtype=dtype, seed=1).to(DEVICE)
    for blocks, block_size in ((torch.tensor([1]), 16), (torch.tensor([3, 500]), 1)):
        blocks = blocks.to(DEVICE)
        kernel = kernels.tile_gradient if block_size > 1 else kernels.entry_gradient
        arguments = (x, grad_output, blocks, block_size) if block_size > 1 else (x, grad_output, blocks)
        found = kernel(*arguments, dtype=torch.float32)
        assert found.dtype == torch.float32
        assert_is_gradient(found, x, grad_output, blocks, block_size, transposed=False)
        assert torch.equal(found.to(dtype), kernel(*arguments))


@runs
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("leading", [(), (7,), (2, 5)])
def test_inputs_of_up_to_three_dimensions_are_not_copied(leading, arrangement):
    x, grad_output = (arranged(leading, 16, arrangement, torch.float32, seed) for seed in (0, 1))
    for side, view in zip((grad_output, x), kernels._as_tokens(x, grad_output, transposed=False), strict=True):
        assert view.data_ptr() == side.data_ptr()
        assert torch.equal(view.reshape(side.shape), side)


@pytest.mark.parametrize("programs", [0, 1, 3, 400, 10**6])
@pytest.mark.parametrize("tokens", [0, 1, 64, 511, 512, 2048, 10**6 + 1])
def test_the_parts_of_a_sum_cover_all_tokens_and_fill_the_device(programs, tokens):
    part = kernels.tokens_of_a_part(programs, tokens)
    parts = max(1, -(-tokens // part))
    assert part % 64 == 0
    assert part * parts >= tokens
    assert parts == 1 or (part >= kernels.FEWEST_TOKENS and programs * parts <= kernels.ENOUGH_PROGRAMS)
    assert parts <= 2**16 - 1  # of a grid's second dimension


def test_a_sum_is_split_where_one_tile_has_many_tokens():
    assert [kernels.tokens_of_a_part(1, tokens) for tokens in (256, 512, 2048)] == [256, 256, 256]
    assert kernels.tokens_of_a_part(1000, 2048) == 2048


@runs
@pytest.mark.parametrize("kernel", ["tile", "entry"])
def test_a_gradient_refuses_what_it_cannot_compute(kernel):
    x, grad_output, blocks = (
        torch.zeros(3, 32, device=DEVICE),
        torch.zeros(3, 16, device=DEVICE),
        torch.arange(1, device=DEVICE),
    )

    def call(x, grad_output, block_size=16):
        return (
            kernels.tile_gradient(x, grad_output, blocks, block_size)
            if kernel == "tile"
            else kernels.entry_gradient(x, grad_output, blocks)
        )

    with pytest.raises(ShapeMismatch, match=r"same tokens, got \[3, 32\] and \[2, 16\]"):
        call(x, grad_output[:2])
    with pytest.raises(ArgumentError, match=r"got torch.float64 and torch.float64"):
        call(x.double(), grad_output.double())
    with pytest.raises(ArgumentError, match=r"one dtype .* got torch.bfloat16 and torch.float32"):
        call(grad_output.bfloat16(), x)
    if kernel == "tile":
        with pytest.raises(BlockSizeError, match=r"block_size is one of \(16, 32, 64, 128\) .* got 8"):
            call(x, grad_output, 8)
        with pytest.raises(BlockSizeError, match=r"divides both sides of the weight \[16, 32\], got \[32, 32\]"):
            call(x, grad_output, 32)


# Reading and writing


@st.composite
def masked_weights(draw: st.DrawFn, dtype: torch.dtype, values_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """weight, blocks, values. Half of the sums lie midway between two numbers of the weight's dtype."""
    side = draw(st.sampled_from((1, 2, 3, 16)))
    rows, columns = (draw(st.integers(1, 5)) * side for _ in range(2))
    block = draw(st.sampled_from(((side, side), (1, columns), (rows, 1))))
    seed, midway = draw(st.integers(0, 99)), draw(st.booleans())
    density, id_dtype = draw(st.sampled_from(DENSITIES)), draw(st.sampled_from((torch.int32, torch.int64)))
    blocks = chosen(rows * columns // (block[0] * block[1]), density, seed, id_dtype)
    shape = reference.values_shape(len(blocks), block)
    if midway:
        generator = torch.Generator().manual_seed(seed)
        step = torch.finfo(dtype).eps
        weight = 1 + step * torch.randint(0, 40, (rows, columns), generator=generator)
        values = step / 2 * torch.randint(0, 80, shape, generator=generator)
    else:
        weight = random(rows, columns, dtype=torch.float64, seed=seed)
        values = random(*shape, dtype=torch.float64, seed=seed) * 2.0 ** draw(st.integers(-20, 8))
    return weight.to(DEVICE, dtype), blocks.to(DEVICE), values.to(DEVICE, values_dtype)


@runs
@pytest.mark.parametrize(("dtype", "values_dtype"), WEIGHT_AND_VALUES)
@few
@given(st.data())
def test_add_and_write_is_the_sum_rounded_once(dtype, values_dtype, data):
    weight, blocks, values = data.draw(masked_weights(dtype, values_dtype))
    displaced = reference.gather(weight, blocks, reference.block_of(values))
    total = displaced.to(torch.promote_types(weight.dtype, values.dtype), copy=True) + values
    expected = weight.clone()
    reference.write(expected, blocks, total)
    kept = displaced.clone(), values.clone()
    reference.write(weight, blocks, torch.full_like(values, torch.nan))
    version = weight._version
    kernels.add_and_write(weight, blocks, displaced, values)
    assert torch.equal(weight, expected)
    assert torch.equal(displaced, kept[0])
    assert torch.equal(values, kept[1])
    assert weight._version > version or not len(blocks)


@runs
@pytest.mark.parametrize(("dtype", "values_dtype"), WEIGHT_AND_VALUES)
@few
@given(st.data())
def test_gather_and_write_are_the_references(dtype, values_dtype, data):
    weight, blocks, values = data.draw(masked_weights(dtype, values_dtype))
    before = weight.clone()
    displaced = kernels.gather(weight, blocks, reference.block_of(values))
    assert displaced.dtype == weight.dtype
    assert torch.equal(displaced, reference.gather(weight, blocks, reference.block_of(values)))
    expected = weight.clone()
    reference.write(expected, blocks, values)
    kernels.write(weight, blocks, values)
    assert torch.equal(weight, expected)
    kernels.write(weight, blocks, displaced)
    assert torch.equal(weight, before)


@runs
@pytest.mark.parametrize("block_size", [1, 4, "row", "column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_writes_by_the_kernel_what_it_writes_by_the_reference(dtype, block_size, monkeypatch):
    written, called = {}, []
    add_and_write = kernels.add_and_write
    monkeypatch.setattr(kernels, "add_and_write", lambda *given: (called.append(len(given)), add_and_write(*given)))
    for kernel in ("dense", "triton"):
        monkeypatch.setenv("SPARSELET_KERNEL", kernel)
        torch.manual_seed(0)
        linear = torch.nn.Linear(24, 16, bias=False).to(DEVICE, dtype)
        base = linear.weight.detach().clone()
        layer = SparseletLayer(linear, "target")
        layer.add_adapter("one", paper_config(density=0.3, block_size=block_size, initial_mask="random", reselect_every=0))
        layer.set_adapter("one")
        with torch.no_grad():
            layer.sparse_values["one"].normal_(std=0.01)
        layer.merge()
        written[kernel] = layer.base_weight.detach().clone()
        assert not torch.equal(written[kernel], base)
        layer.unmerge()
        assert torch.equal(layer.base_weight, base)
    assert torch.equal(written["dense"], written["triton"])
    assert called


@runs
def test_views_are_read_and_written_in_place():
    whole = torch.zeros(3, 32, 32, device=DEVICE)
    blocks = torch.arange(0, 4, device=DEVICE)[::2]
    values = torch.arange(512.0, device=DEVICE).view(16, 16, 2).permute(2, 1, 0)
    kernels.write(whole[1], blocks, values)
    assert torch.equal(reference.gather(whole[1], blocks, (16, 16)), values)
    assert not whole[::2].any()


@runs
def test_parameters_and_inference_tensors_are_written():
    weight = torch.nn.Parameter(torch.zeros(4, 4, device=DEVICE))
    blocks, ones = torch.tensor([5], device=DEVICE), torch.ones(1, device=DEVICE)
    kernels.add_and_write(weight, blocks, ones, ones)
    with torch.inference_mode():
        inferred = torch.zeros(4, 4, device=DEVICE)
        kernels.add_and_write(inferred, blocks, ones, ones)
    kernels.add_and_write(inferred, blocks, ones, ones)
    for written in (weight, inferred):
        assert written[1, 1] == 2
        assert written.sum() == 2


@runs
def test_a_write_between_forward_and_backward_is_noticed():
    weight = torch.zeros(2, 2, device=DEVICE)
    x = torch.ones(2, 2, device=DEVICE, requires_grad=True)
    y = (x @ weight).sum()
    kernels.write(weight, torch.tensor([0], device=DEVICE), torch.ones(1, device=DEVICE))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@runs
def test_offsets_do_not_wrap_beyond_int32():
    columns = 2**15
    big = torch.empty(2**16 + 32, columns, dtype=torch.float16, device=DEVICE)  # touched at a few places only
    entries = torch.tensor([5, 2**31 - 1, 2**31 + 7, big.numel() - 1], device=DEVICE)
    kernels.write(big, entries, torch.arange(4.0, device=DEVICE))
    assert big[0, 5] == 0
    assert big[2**16 - 1, -1] == 1
    assert big[2**16, 7] == 2
    assert big[-1, -1] == 3
    assert kernels.gather(big, entries).tolist() == [0, 1, 2, 3]
    tiles = torch.tensor([2**31 // 256 + 1], dtype=torch.int32, device=DEVICE)
    kernels.add_and_write(big, tiles, torch.ones(1, 16, 16, device=DEVICE), torch.ones(1, 16, 16, device=DEVICE))
    assert (big[2**16 : 2**16 + 16, 16:32] == 2).all()
    x = big.view(-1)[2**4 :].as_strided((3, 16), (2**30, 1))
    x.fill_(1)
    grad_output = torch.ones(3, 16, dtype=torch.float16, device=DEVICE)
    assert (kernels.tile_gradient(x, grad_output, torch.zeros(1, dtype=torch.int32, device=DEVICE), 16) == 3).all()


@runs
def test_writing_refuses_what_would_reach_beyond_the_weight():
    weight, blocks = torch.zeros(4, 8, device=DEVICE), torch.arange(2, device=DEVICE)
    with pytest.raises(ShapeMismatch, match=r"values of 2 blocks have the shape \[2, 2, 2\], got \[3, 2, 2\]"):
        kernels.write(weight, blocks, torch.zeros(3, 2, 2, device=DEVICE))
    with pytest.raises(ShapeMismatch, match=r"displaced of 2 blocks have the shape \[2\], got \[1\]"):
        kernels.add_and_write(weight, blocks, torch.zeros(1, device=DEVICE), torch.zeros(2, device=DEVICE))
    for call in (kernels.gather, lambda *a: kernels.write(a[0], a[1], torch.zeros(2, 3, 3, device=DEVICE))):
        with pytest.raises(BlockSizeError, match=r"divides both sides of the weight \[4, 8\], got \[3, 3\]"):
            call(weight, blocks, (3, 3))
    with pytest.raises(ShapeMismatch, match="contiguous"):
        kernels.gather(weight.t(), blocks)
    with pytest.raises(ShapeMismatch, match="contiguous"):
        kernels.write(weight[:, ::2], blocks, torch.zeros(2, device=DEVICE))


# Compiled


@pytest.fixture(params=[80, 90])
def launched(request, monkeypatch):
    """Compiles what is launched, for a device of compute capability 8.0 or 9.0 that is not there; nothing is run.

    Calls a function and returns the PTX of the kernel that it launches, and the bytes of shared memory it takes.
    """
    capability = request.param
    built = []

    class NoDevice:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: -capability)
        get_current_stream = staticmethod(lambda device: 0)

    def only_compile(run):
        return lambda *args, warmup, **options: built.append(run(*args, warmup=True, **options))

    for kernel in (kernels._tile_gradient, kernels._entry_gradient, kernels._gather, kernels._write):
        monkeypatch.setattr(kernel, "run", only_compile(kernel.run))

    def call(function, *args, **options) -> tuple[str, int]:
        function(*args, **options)
        return built[-1].asm["ptx"], built[-1].metadata.shared

    call.capability = capability
    monkeypatch.setattr(driver, "_active", NoDevice())
    return call


@compiles
@pytest.mark.parametrize("block_size", kernels.GRADIENT_BLOCK_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_tile_gradient_compiles_to_what_the_device_is_good_at(launched, block_size, dtype):
    x, grad_output = torch.zeros(2, 40, 256, dtype=dtype), torch.zeros(2, 40, 128, dtype=dtype)
    if launched.capability == 80:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    ptx, shared = launched(kernels.tile_gradient, x, grad_output, torch.arange(2), block_size)
    assert shared <= 96 * 1024
    assert "cp.async.cg.shared.global" in ptx  # 16 bytes at a time, while those before are multiplied
    assert ("mma" in ptx) == (dtype == torch.bfloat16)
    assert ("wgmma" in ptx) == (dtype == torch.bfloat16 and block_size >= 64 and launched.capability == 90)
    assert "tf32" not in ptx


@compiles
def test_the_other_kernels_compile_and_read_16_bytes_at_a_time(launched):
    weight, blocks, values = torch.zeros(64, 64, dtype=torch.bfloat16), torch.arange(16, dtype=torch.int32), torch.zeros(16)
    tiles = torch.zeros(16, 16, 16)
    for function, *args in (
        (kernels.gather, weight, blocks),
        (kernels.write, weight, blocks, values),
        (kernels.add_and_write, weight, blocks, values.bfloat16(), values),
        (kernels.add_and_write, weight, blocks, tiles.bfloat16(), tiles),
        (kernels.entry_gradient, weight, weight, blocks),
    ):
        ptx, _ = launched(function, *args)
        assert "ld.global.v4" in ptx, function
        assert ("cvt.rn.bf16" in ptx or launched.capability < 90) or function is kernels.gather, function
