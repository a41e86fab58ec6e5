"""Operations on masked entries as Triton kernels for CUDA; `reference` defines what they compute.

No function waits for the device, and equal inputs give equal bits: if the sum over tokens is split, the split depends on the
shapes alone and the parts are added in order. Block ids are not checked against the weight. Importing this module needs triton.

Where a gradient can be faster, by the bytes it must read: for W 3072×9216 and T = 2048 tokens in 16 bits, an H100 (600 TFLOP/s;
5.5 TB/s from its L2 cache) takes 0.23 ms for the dense product and the gather. G tiles of one row read 2·T·B·(G + 1) bytes
together: at density 0.1 and B = 16, 0.9 GB, 0.16 ms (one by one 0.26 ms); at B = 64, 0.05 ms. Entries read 2·T bytes each,
after 0.04 ms to transpose the inputs: 0.25 ms at density 0.01, 0.06 ms at 0.001, a gain below about 0.005 only.
"""

# pyright: reportInvalidTypeForm=false

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sparselet.errors import ArgumentError, BlockSizeError, MissingExtra, ShapeMismatch
from sparselet.kernels.reference import ENTRY, Block, block_of, values_shape

try:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
except ModuleNotFoundError as error:
    raise MissingExtra("kernels for CUDA need triton, which torch's CUDA builds bring: pip install triton.") from error

GRADIENT_BLOCK_SIZES = (16, 32, 64, 128)
GRADIENT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

ENOUGH_PROGRAMS = 512  # a few for each multiprocessor of the largest devices
FEWEST_TOKENS = 256  # of a part, so that its product outweighs writing it
AT_ONCE = 1024  # values that one program copies
STEP = 128  # tokens that an entry's sum takes at a time


# Gradients


def tile_gradient(
    x: Tensor, grad_output: Tensor, blocks: Tensor, block_size: int, transposed: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """The tiles `blocks` of ∂L/∂W, [n, B, B]: `reference.masked_weight_gradient` without the dense product.

    x [..., in], grad_output [..., out], of one dtype among GRADIENT_DTYPES, with any strides; W is [out, in], or [in, out]
    when `transposed`. blocks: ascending, int32 or int64 [n]. Summed in float32; returned in `dtype`, or the inputs' dtype.
    Raises BlockSizeError, ShapeMismatch, ArgumentError.
    """
    left, right = _as_tokens(x, grad_output, transposed)
    if block_size not in GRADIENT_BLOCK_SIZES:
        raise BlockSizeError(f"block_size is one of {GRADIENT_BLOCK_SIZES} for this kernel, got {block_size}.")
    _check_sides((left.shape[2], right.shape[2]), (block_size, block_size))
    outer, inner, columns = left.shape[0], left.shape[1], right.shape[2]
    settings = tile_settings(block_size, x.dtype)
    groups = triton.cdiv(len(blocks), settings["GROUP"])
    part = tokens_of_a_part(groups, outer * inner)
    parts = max(1, triton.cdiv(outer * inner, part))
    dtype = dtype or x.dtype
    shape = (parts, len(blocks), block_size, block_size)
    result = torch.empty(shape, dtype=dtype if parts == 1 else torch.float32, device=x.device)
    if len(blocks):
        with torch.cuda.device_of(x):
            _tile_gradient[groups, parts](
                *(left, right, blocks.contiguous(), result),
                *(len(blocks), columns // block_size, outer * inner, inner, part, *left.stride(), *right.stride()),
                B=block_size,
                NESTED=outer > 1,
                **settings,
            )
    return result[0] if parts == 1 else result.sum(dim=0).to(dtype)


def entry_gradient(
    x: Tensor, grad_output: Tensor, blocks: Tensor, transposed: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """The entries `blocks` of ∂L/∂W, [n]: `reference.masked_weight_gradient` without the dense product.

    Arguments and errors are those of `tile_gradient`. Both inputs are first transposed in memory.
    """
    left, right = (_by_feature(side) for side in _as_tokens(x, grad_output, transposed))
    result = torch.empty(len(blocks), dtype=dtype or x.dtype, device=x.device)
    if len(blocks):
        with torch.cuda.device_of(x):
            _entry_gradient[triton.cdiv(len(blocks), 16),](
                *(left, right, blocks.contiguous(), result, len(blocks), right.shape[0], left.shape[1]), ENTRIES=16, STEP=STEP
            )
    return result


@triton.jit
def _token_offsets(token, inner, outer_stride, inner_stride, NESTED: tl.constexpr):
    offsets = token.to(tl.int64) * inner_stride
    if NESTED:
        offsets = (token // inner).to(tl.int64) * outer_stride + (token % inner).to(tl.int64) * inner_stride
    return offsets


@triton.jit(do_not_specialize=["count", "tokens", "inner", "part"])
def _tile_gradient(
    left,
    right,
    blocks,
    result,
    count,
    tile_columns,
    tokens,
    inner,
    part,
    left_outer,
    left_inner,
    left_feature,
    right_outer,
    right_inner,
    right_feature,
    B: tl.constexpr,
    NESTED: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
):
    """result[p, u] = Σ left[t, rows of u]ᵀ right[t, columns of u] over the `part` tokens t from p · part on.

    left, right: [outer, inner, features] by their strides. A program takes GROUP blocks; those of one row of tiles, nearly
    always all of them, share what is read of `left`.
    """
    first = tl.program_id(0).to(tl.int64) * GROUP
    p = tl.program_id(1)
    start = p * part
    stop = tl.minimum(start + part, tokens)
    down = tl.arange(0, B)
    across = tl.arange(0, GROUP * B)
    place = first + across // B
    block = tl.load(blocks + place, mask=place < count, other=0)
    row = tl.where(place < count, block // tile_columns, -1)
    right_features = right + ((block % tile_columns).to(tl.int64) * B + across % B) * right_feature
    tiles = result + (p.to(tl.int64) * count + place) * (B * B) + across % B
    for i in range(GROUP):
        this = tl.load(blocks + first + i, mask=first + i < count, other=-tile_columns) // tile_columns
        before = tl.load(blocks + first + i - 1, mask=(i > 0) & (first + i <= count), other=-tile_columns) // tile_columns
        if (this >= 0) & (this != before):
            mine = row == this
            left_features = left + (this.to(tl.int64) * B + down) * left_feature
            total = tl.zeros((B, GROUP * B), dtype=tl.float32)
            for t in range(start, stop, STEP):
                token = t + tl.arange(0, STEP)
                left_tokens = _token_offsets(token, inner, left_outer, left_inner, NESTED)
                right_tokens = _token_offsets(token, inner, right_outer, right_inner, NESTED)
                inside = token < stop
                a = tl.load(left_features[:, None] + left_tokens[None, :], mask=inside[None, :], other=0.0)
                b = tl.load(right_features[None, :] + right_tokens[:, None], mask=inside[:, None] & mine[None, :], other=0.0)
                total = tl.dot(a, b, total, input_precision="ieee")
            tl.store(tiles[None, :] + down[:, None] * B, total.to(result.dtype.element_ty), mask=mine[None, :])


@triton.jit(do_not_specialize=["count"])
def _entry_gradient(left, right, blocks, result, count, columns, tokens, ENTRIES: tl.constexpr, STEP: tl.constexpr):
    """result[u] = Σ left[row of u, t] · right[column of u, t] over all tokens t, a multiple of STEP."""
    place = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = place < count
    block = tl.load(blocks + place, mask=inside, other=0)
    left_rows = left + (block // columns).to(tl.int64)[:, None] * tokens
    right_rows = right + (block % columns).to(tl.int64)[:, None] * tokens
    total = tl.zeros((ENTRIES, STEP), dtype=tl.float32)
    for t in range(0, tokens, STEP):
        token = (t + tl.arange(0, STEP))[None, :]
        a = tl.load(left_rows + token, mask=inside[:, None], other=0.0)
        b = tl.load(right_rows + token, mask=inside[:, None], other=0.0)
        total += a.to(tl.float32) * b.to(tl.float32)
    tl.store(result + place, tl.sum(total, axis=1).to(result.dtype.element_ty), mask=inside)


def tile_settings(block_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Compile-time settings of `_tile_gradient`. The inputs of three steps are in shared memory: at most 96 KiB."""
    return {
        "GROUP": {16: 4, 32: 4, 64: 2, 128: 1}[block_size],
        "STEP": 64 if dtype.itemsize == 2 else 16,
        "num_warps": 8 if block_size == 128 else 4,
        "num_stages": 3,
    }


def tokens_of_a_part(programs: int, tokens: int) -> int:
    """The number of tokens that one program sums, a multiple of 64: fewer if few programs would leave the device idle."""
    parts = max(1, min(ENOUGH_PROGRAMS // max(1, programs), tokens // FEWEST_TOKENS))
    return max(1, triton.cdiv(tokens, 64 * parts)) * 64


def _as_tokens(x: Tensor, grad_output: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """The tensors that give W's rows and columns, as views [outer, inner, features] (copies for some of four dimensions)."""
    if x.shape[:-1] != grad_output.shape[:-1]:
        raise ShapeMismatch(f"x and grad_output are of the same tokens, got {list(x.shape)} and {list(grad_output.shape)}.")
    if x.dtype != grad_output.dtype or x.dtype not in GRADIENT_DTYPES:
        raise ArgumentError(
            f"x and grad_output have one dtype of {GRADIENT_DTYPES} for this kernel, got {x.dtype} and {grad_output.dtype}."
        )
    left, right = (x, grad_output) if transposed else (grad_output, x)
    left, right = (s.flatten(0, -3) if s.ndim > 2 else s.reshape(1, -1, s.shape[-1]) for s in (left, right))
    if all(1 in s.shape[:2] or s.stride(0) == s.shape[1] * s.stride(1) for s in (left, right)):
        left, right = (s.view(1, s.shape[0] * s.shape[1], s.shape[2]) for s in (left, right))
    return left, right


def _by_feature(side: Tensor) -> Tensor:
    """[outer, inner, features] as a contiguous [features, tokens], the tokens filled up with zeros to a multiple of STEP."""
    outer, inner, features = side.shape
    tokens = outer * inner
    filled = side.new_empty(features, triton.cdiv(tokens, STEP) * STEP)
    filled[:, :tokens].view(features, outer, inner).copy_(side.permute(2, 0, 1))
    filled[:, tokens:] = 0
    return filled


# Reading and writing


def gather(weight: Tensor, blocks: Tensor, block: Block = ENTRY) -> Tensor:
    """`reference.gather` of a contiguous weight. Raises BlockSizeError, ShapeMismatch."""
    _check_weight(weight, block)
    values = torch.empty(values_shape(len(blocks), block), dtype=weight.dtype, device=weight.device)
    if len(blocks):
        with torch.cuda.device_of(weight):
            _gather[triton.cdiv(values.numel(), AT_ONCE),](
                *(weight, blocks.contiguous(), values, values.numel(), weight.shape[1]), H=block[0], W=block[1], AT_ONCE=AT_ONCE
            )
    return values


def write(weight: Tensor, blocks: Tensor, values: Tensor) -> None:
    """`reference.write`, in one pass. Raises BlockSizeError, ShapeMismatch."""
    add_and_write(weight, blocks, None, values)


def add_and_write(weight: Tensor, blocks: Tensor, displaced: Tensor | None, values: Tensor) -> None:
    """weight[blocks] = displaced + values, in place and in one pass: added in the wider of both dtypes, rounded once.

    weight: contiguous [rows, columns]. displaced (None for 0), values: [n], or [n, h, w].
    Raises BlockSizeError, ShapeMismatch.
    """
    block = block_of(values)
    _check_weight(weight, block)
    shape = values_shape(len(blocks), block)
    for name, tensor in (("values", values), ("displaced", displaced)):
        if tensor is not None and tensor.shape != shape:
            raise ShapeMismatch(f"{name} of {len(blocks)} blocks have the shape {list(shape)}, got {list(tensor.shape)}.")
    if not len(blocks):
        return
    wide = torch.float64 in (weight.dtype, values.dtype)
    with torch.cuda.device_of(weight):
        _write[triton.cdiv(values.numel(), AT_ONCE),](
            *(weight, blocks.contiguous(), None if displaced is None else displaced.contiguous(), values.contiguous()),
            *(values.numel(), weight.shape[1]),
            H=block[0],
            W=block[1],
            WIDE=tl.float64 if wide else tl.float32,
            AT_ONCE=AT_ONCE,
        )
    increment_version(weight)


@triton.jit
def _entries(blocks, place, inside, columns, H: tl.constexpr, W: tl.constexpr):
    """Where in the weight the values `place` of a mask lie, int64."""
    block = tl.load(blocks + place // (H * W), mask=inside, other=0)
    entries = block.to(tl.int64)
    if H * W > 1:
        per_row = columns // W
        within = place % (H * W)
        row = (block // per_row).to(tl.int64) * H + within // W
        entries = row * columns + (block % per_row).to(tl.int64) * W + within % W
    return entries


@triton.jit
def _gather(weight, blocks, values, size, columns, H: tl.constexpr, W: tl.constexpr, AT_ONCE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
    inside = place < size
    value = tl.load(weight + _entries(blocks, place, inside, columns, H, W), mask=inside)
    tl.store(values + place, value, mask=inside)


@triton.jit
def _write(
    weight,
    blocks,
    displaced,
    values,
    size,
    columns,
    H: tl.constexpr,
    W: tl.constexpr,
    WIDE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
    inside = place < size
    value = tl.load(values + place, mask=inside)
    if displaced is not None:
        value = value.to(WIDE) + tl.load(displaced + place, mask=inside).to(WIDE)
    tl.store(weight + _entries(blocks, place, inside, columns, H, W), value.to(weight.dtype.element_ty), mask=inside)


def _check_weight(weight: Tensor, block: Block) -> None:
    _check_sides((weight.shape[0], weight.shape[1]), block)
    if not weight.is_contiguous():
        raise ShapeMismatch("the weight is contiguous in memory for this kernel: pass weight.contiguous().")


def _check_sides(shape: tuple[int, int], block: Block) -> None:
    if any(b < 1 or side % b for side, b in zip(shape, block, strict=True)):
        raise BlockSizeError(f"a block divides both sides of the weight {list(shape)}, got {list(block)}.")
