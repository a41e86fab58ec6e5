"""What test_triton.py runs: each Triton kernel against the reference and, for gradients, autograd in float64.

With TRITON_INTERPRET=1 the kernels are interpreted on the CPU. Without, they are compiled: all but the last tests then need
a GPU.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from triton import compile as compile_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparselet.errors import ArgumentError, BlockSizeError, ShapeMismatch
from sparselet.kernels import reference
from sparselet.kernels import triton as kernels

INTERPRETED = knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"

runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device")
compiles = pytest.mark.skipif(INTERPRETED, reason="an interpreter compiles nothing")
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)

BITS_16_OR_32 = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT_AND_VALUES = (  # as the layer has them, and values of 16 bits
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float32),
)


def random(*shape, dtype=torch.float32, seed=0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def chosen(count: int, density: float, seed: int, dtype=torch.int32) -> Tensor:
    """About `density` of the ids below `count`, ascending; all of them at 1."""
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < density
    return drawn.nonzero().squeeze(1).to(dtype)


ARRANGEMENTS = ("contiguous", "other order", "every other feature", "one of three", "longer batch", "one for all")


def arranged(leading: tuple[int, ...], features: int, arrangement: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers [*leading, features] that lie in memory in one of the ways of ARRANGEMENTS."""
    if arrangement == "other order":
        drawn = random(*reversed(leading), features, dtype=dtype, seed=seed).to(DEVICE)
        return drawn.permute(*reversed(range(len(leading))), len(leading))
    if arrangement == "every other feature":
        return random(*leading, 2 * features, dtype=dtype, seed=seed).to(DEVICE)[..., ::2]
    if arrangement == "one of three":
        return random(*leading, 3 * features, dtype=dtype, seed=seed).to(DEVICE)[..., features : 2 * features]
    if arrangement == "longer batch" and leading:
        drawn = random(*leading[:-1], leading[-1] + 3, features, dtype=dtype, seed=seed).to(DEVICE)
        return drawn[..., : leading[-1], :]
    if arrangement == "one for all":
        return random(features, dtype=dtype, seed=seed).to(DEVICE).expand(*leading, features)
    return random(*leading, features, dtype=dtype, seed=seed).to(DEVICE)


def autograds(x: Tensor, grad_output: Tensor, transposed: bool) -> Tensor:
    """∂L/∂W in float64."""
    sides = x.shape[-1], grad_output.shape[-1]
    weight = x.new_zeros(sides if transposed else sides[::-1], dtype=torch.float64, requires_grad=True)
    y = x.double() @ (weight if transposed else weight.t())
    y.backward(grad_output.double())
    assert weight.grad is not None
    return weight.grad


def assert_is_gradient(found: Tensor, x: Tensor, grad_output: Tensor, units: Tensor, block_size: int, transposed: bool) -> None:
    """Within the rounding of a sum in float32, and of the result."""
    exact = reference.gather(autograds(x, grad_output, transposed), units, block_size)
    summands = reference.gather(autograds(x.abs(), grad_output.abs(), transposed), units, block_size)
    assert found.shape == exact.shape
    allowed = 1e-6 * summands + torch.finfo(found.dtype).eps / 2 * exact.abs() * 1.01 + torch.finfo(found.dtype).tiny
    excess = ((found.double() - exact).abs() - allowed).max().item() if len(units) else 0.0
    assert excess <= 0, excess
    expected = reference.masked_weight_gradient(x, grad_output, units, block_size, transposed)
    distance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[x.dtype]
    torch.testing.assert_close(found.to(x.dtype), expected, rtol=distance, atol=distance)


LEADING = ((), (0,), (1,), (7,), (65,), (600,), (2, 5), (3, 33), (2, 300), (2, 0), (1, 4), (2, 3, 5), (2, 1, 3))


@st.composite
def gradients(draw: st.DrawFn, block_sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, int, bool]:
    """x, grad_output, units, block_size, transposed."""
    block_size = draw(st.sampled_from(block_sizes))
    most = {1: 40, 16: 6, 32: 4, 64: 3, 128: 2}[block_size]
    leading, dtype = draw(st.sampled_from(LEADING)), draw(st.sampled_from(BITS_16_OR_32))
    tiles = draw(st.integers(1, most)), draw(st.integers(1, most))
    x, grad_output = (
        arranged(leading, side * block_size, draw(st.sampled_from(ARRANGEMENTS)), dtype, seed)
        for seed, side in enumerate(tiles)
    )
    density, id_dtype = draw(st.sampled_from((0.0, 0.1, 0.4, 1.0))), draw(st.sampled_from((torch.int32, torch.int64)))
    units = chosen(tiles[0] * tiles[1], density, draw(st.integers(0, 99)), id_dtype).to(DEVICE)
    return x, grad_output, units, block_size, draw(st.booleans())


@runs
@few
@given(gradients(kernels.GRADIENT_BLOCK_SIZES))
def test_tile_gradient_is_autograds_at_the_tiles(case):
    x, grad_output, units, block_size, transposed = case
    found = kernels.tile_gradient(x, grad_output, units, block_size, transposed)
    assert found.dtype == x.dtype
    assert_is_gradient(found, x, grad_output, units, block_size, transposed)
    assert torch.equal(kernels.tile_gradient(x, grad_output, units, block_size, transposed), found)


@runs
@few
@given(gradients((1,)))
def test_entry_gradient_is_autograds_at_the_entries(case):
    x, grad_output, units, _, transposed = case
    found = kernels.entry_gradient(x, grad_output, units, transposed)
    assert found.dtype == x.dtype
    assert_is_gradient(found, x, grad_output, units, 1, transposed)
    assert torch.equal(kernels.entry_gradient(x, grad_output, units, transposed), found)


@runs
@pytest.mark.parametrize("block_size", kernels.GRADIENT_BLOCK_SIZES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_of_tiles_without_any_and_groups_across_rows(block_size, transposed):
    # Three tiles of row 0, none of row 1, one of row 2, the last two of row 3: no group is of one row.
    x, grad_output = random(20, (6, 4)[transposed] * block_size), random(20, (4, 6)[transposed] * block_size)
    units = torch.tensor([1, 2, 5, 14, 22, 23]).to(DEVICE)
    found = kernels.tile_gradient(x.to(DEVICE), grad_output.to(DEVICE), units, block_size, transposed)
    assert_is_gradient(found, x.to(DEVICE), grad_output.to(DEVICE), units, block_size, transposed)


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
    for units, block_size in ((torch.tensor([1]), 16), (torch.tensor([3, 500]), 1)):
        units = units.to(DEVICE)
        kernel = kernels.tile_gradient if block_size > 1 else kernels.entry_gradient
        arguments = (x, grad_output, units, block_size) if block_size > 1 else (x, grad_output, units)
        found = kernel(*arguments, dtype=torch.float32)
        assert found.dtype == torch.float32
        assert_is_gradient(found, x, grad_output, units, block_size, transposed=False)
        assert torch.equal(found.to(dtype), kernel(*arguments))


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
    x, grad_output, units = torch.zeros(3, 32, device=DEVICE), torch.zeros(3, 16, device=DEVICE), torch.arange(1, device=DEVICE)

    def call(x, grad_output, block_size=16):
        return (
            kernels.tile_gradient(x, grad_output, units, block_size)
            if kernel == "tile"
            else kernels.entry_gradient(x, grad_output, units)
        )

    with pytest.raises(ShapeMismatch, match=r"same tokens, got \[3, 32\] and \[2, 16\]"):
        call(x, grad_output[:2])
    with pytest.raises(ArgumentError, match=r"got torch.float64 and torch.float64"):
        call(x.double(), grad_output.double())
    with pytest.raises(ArgumentError, match=r"one dtype .* got torch.float32 and torch.bfloat16"):
        call(grad_output.bfloat16(), x)
    if kernel == "tile":
        with pytest.raises(BlockSizeError, match=r"block_size is one of \(16, 32, 64, 128\) .* got 8"):
            call(x, grad_output, 8)
        with pytest.raises(BlockSizeError, match=r"divides both sides of the weight \[16, 32\], got 32"):
            call(x, grad_output, 32)


# Reading and writing


@st.composite
def masked_weights(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """weight, units, values, block_size. Half of the sums lie midway between two numbers of the weight's dtype."""
    block_size = draw(st.sampled_from((1, 2, 3, 16)))
    rows, columns = (draw(st.integers(1, 5)) * block_size for _ in range(2))
    dtype, values_dtype = draw(st.sampled_from(WEIGHT_AND_VALUES))
    seed, midway = draw(st.integers(0, 99)), draw(st.booleans())
    density, id_dtype = draw(st.sampled_from((0.0, 0.2, 1.0))), draw(st.sampled_from((torch.int32, torch.int64)))
    units = chosen(rows * columns // block_size**2, density, seed, id_dtype)
    shape = (len(units), *((block_size, block_size) if block_size > 1 else ()))
    if midway:
        generator = torch.Generator().manual_seed(seed)
        step = torch.finfo(dtype).eps
        weight = 1 + step * torch.randint(0, 40, (rows, columns), generator=generator)
        values = step / 2 * torch.randint(0, 80, shape, generator=generator)
    else:
        weight = random(rows, columns, dtype=torch.float64, seed=seed)
        values = random(*shape, dtype=torch.float64, seed=seed) * 2.0 ** draw(st.integers(-20, 8))
    return weight.to(DEVICE, dtype), units.to(DEVICE), values.to(DEVICE, values_dtype), block_size


@runs
@few
@given(masked_weights())
def test_add_and_write_is_the_sum_rounded_once(case):
    weight, units, values, block_size = case
    displaced = reference.gather(weight, units, block_size)
    total = displaced.to(torch.promote_types(weight.dtype, values.dtype), copy=True) + values
    expected = weight.clone()
    reference.write(expected, units, total, block_size)
    kept = displaced.clone(), values.clone()
    reference.write(weight, units, torch.full_like(values, torch.nan), block_size)
    version = weight._version
    kernels.add_and_write(weight, units, displaced, values, block_size)
    assert torch.equal(weight, expected)
    assert torch.equal(displaced, kept[0])
    assert torch.equal(values, kept[1])
    assert weight._version > version or not len(units)


@runs
@few
@given(masked_weights())
def test_gather_and_write_are_the_references(case):
    weight, units, values, block_size = case
    before = weight.clone()
    displaced = kernels.gather(weight, units, block_size)
    assert displaced.dtype == weight.dtype
    assert torch.equal(displaced, reference.gather(weight, units, block_size))
    expected = weight.clone()
    reference.write(expected, units, values, block_size)
    kernels.write(weight, units, values, block_size)
    assert torch.equal(weight, expected)
    kernels.write(weight, units, displaced, block_size)
    assert torch.equal(weight, before)


@runs
def test_views_are_read_and_written_in_place():
    whole = torch.zeros(3, 32, 32, device=DEVICE)
    units = torch.arange(0, 4, device=DEVICE)[::2]
    values = torch.arange(512.0, device=DEVICE).view(16, 16, 2).permute(2, 1, 0)
    kernels.write(whole[1], units, values, 16)
    assert torch.equal(reference.gather(whole[1], units, 16), values)
    assert not whole[::2].any()


@runs
def test_parameters_and_inference_tensors_are_written():
    weight = torch.nn.Parameter(torch.zeros(4, 4, device=DEVICE))
    units, ones = torch.tensor([5], device=DEVICE), torch.ones(1, device=DEVICE)
    kernels.add_and_write(weight, units, ones, ones)
    with torch.inference_mode():
        inferred = torch.zeros(4, 4, device=DEVICE)
        kernels.add_and_write(inferred, units, ones, ones)
    kernels.add_and_write(inferred, units, ones, ones)
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
    kernels.add_and_write(big, tiles, torch.ones(1, 16, 16, device=DEVICE), torch.ones(1, 16, 16, device=DEVICE), 16)
    assert (big[2**16 : 2**16 + 16, 16:32] == 2).all()
    x = big.view(-1)[2**4 :].as_strided((3, 16), (2**30, 1))
    x.fill_(1)
    grad_output = torch.ones(3, 16, dtype=torch.float16, device=DEVICE)
    assert (kernels.tile_gradient(x, grad_output, torch.zeros(1, dtype=torch.int32, device=DEVICE), 16) == 3).all()


@runs
def test_writing_refuses_what_would_reach_beyond_the_weight():
    weight, units = torch.zeros(4, 8, device=DEVICE), torch.arange(2, device=DEVICE)
    with pytest.raises(ShapeMismatch, match=r"values of 2 units have the shape \[2, 2, 2\], got \[2\]"):
        kernels.write(weight, units, torch.zeros(2, device=DEVICE), 2)
    with pytest.raises(ShapeMismatch, match=r"displaced of 2 units have the shape \[2\], got \[1\]"):
        kernels.add_and_write(weight, units, torch.zeros(1, device=DEVICE), torch.zeros(2, device=DEVICE))
    for call in (kernels.gather, lambda *a: kernels.write(a[0], a[1], torch.zeros(2, 3, 3, device=DEVICE), a[2])):
        with pytest.raises(BlockSizeError, match=r"divides both sides of the weight \[4, 8\], got 3"):
            call(weight, units, 3)
    with pytest.raises(ShapeMismatch, match="contiguous"):
        kernels.gather(weight.t(), units)
    with pytest.raises(ShapeMismatch, match="contiguous"):
        kernels.write(weight[:, ::2], units, torch.zeros(2, device=DEVICE))


# Compiled


def compiled(kernel, signature: dict[str, str], constants: dict, capability: int, **options: int):
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("block_size", kernels.GRADIENT_BLOCK_SIZES)
def test_tile_gradient_compiles_and_fits_shared_memory(block_size, dtype, capability):
    number = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    constants = kernels.tile_settings(block_size, dtype)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    sizes = ("count", "tile_columns", "tokens", "inner", "part")
    strides = tuple(f"{side}_{axis}" for side in ("left", "right") for axis in ("outer", "inner"))
    signature = {
        **dict.fromkeys(("left", "right"), f"*{number}"),
        **{"units": "*i32", "result": "*fp32"},
        **dict.fromkeys((*sizes, *strides), "i32"),
    }
    constants |= {"B": block_size, "NESTED": capability == 80, "left_feature": 1, "right_feature": 1}
    built = compiled(kernels._tile_gradient, signature, constants, capability, **options)
    assert built.metadata.shared <= 96 * 1024
    assert ("mma" in built.asm["ptx"]) == (dtype == torch.bfloat16)
    assert "tf32" not in built.asm["ptx"]


@compiles
@pytest.mark.parametrize("block_size", [1, 16])
def test_reading_and_writing_compile(block_size):
    constants = {"B": block_size, "AT_ONCE": kernels.AT_ONCE}
    sizes = {"size": "i32", "columns": "i32"}
    compiled(kernels._gather, {"weight": "*bf16", "units": "*i64", "values": "*bf16", **sizes}, constants, 90)
    pointers = {"weight": "*bf16", "units": "*i32", "displaced": "*bf16", "values": "*fp32"}
    built = compiled(kernels._write, {**pointers, **sizes}, {**constants, "WIDE": kernels.tl.float32}, 90)
    assert "cvt.rn.bf16" in built.asm["ptx"]


@compiles
def test_entry_gradient_compiles():
    pointers = {"left": "*bf16", "right": "*bf16", "units": "*i32", "result": "*fp32"}
    sizes = dict.fromkeys(("count", "columns", "tokens"), "i32")
    compiled(kernels._entry_gradient, {**pointers, **sizes}, {"ENTRIES": 16, "STEP": 128}, 90)
