"""A linear layer at its effective weight, which no pass keeps."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparselet import kernels
from sparselet.tuner.effective import Change

Build = Callable[[Sequence[Change]], Tensor]


def changed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    changes: Sequence[Change],
    build: Build,
    check: Callable[[], None],
    transposed: bool,
    recorder: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """y [..., out] = x [..., in] at W + ΣΔW, plus the bias.

    weight: the base layer's, [out, in], or [in, out] when `transposed`. The values of the changes that are `trained` get a
    gradient: ∂L/∂W at their mask, of their shape and dtype; at most one dense ∂L/∂W is alive meanwhile. Weight and bias get
    theirs where they require one.
    build: makes the effective weight of changes, in the forward pass and again in the backward pass. check: raises in the
    backward pass where something else that the forward pass used is not there any more.
    recorder: receives the dense ∂L/∂W instead, and the values get none.
    """
    if not torch.is_grad_enabled():
        return linear(x, build(changes), bias, transposed)
    values = [change.values for change in changes if change.trained]
    return _ChangedLinear.apply(x, weight, bias, tuple(changes), build, check, transposed, recorder, *values)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """What `nn.Linear`, or `Conv1D` when `transposed`, computes, by the same operation."""
    if not transposed:
        return F.linear(x, weight, bias)
    assert bias is not None
    return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.shape[1])


class _ChangedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        changes: tuple[Change, ...],
        build: Build,
        check: Callable[[], None],
        transposed: bool,
        recorder: Callable[[Tensor], None] | None,
        *values: Tensor,
    ) -> Tensor:
        y = linear(x, build(changes), bias, transposed)
        trained = [change for change in changes if change.trained]
        ctx.learns = ctx.needs_input_grad[1] or bool(values)
        # In x's own dtype, and not in y's: the inputs of query, key and value are one tensor, which is then kept once.
        ctx.save_for_backward(x if ctx.learns else None)
        ctx.masks = [(change.blocks, change.block_size, change.values.dtype) for change in trained]
        # Taken now: until the backward pass the values may be written to.
        ctx.changes = tuple(change.snapshot() for change in changes) if ctx.needs_input_grad[0] else ()
        ctx.build, ctx.check, ctx.transposed, ctx.recorder = build, check, transposed, recorder
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.check()
        (x,) = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        dense = grad_x = grad_bias = None
        gradients: list[Tensor | None] = [None] * len(ctx.masks)
        if ctx.learns:
            x = x.to(grad_output.dtype)
            if needs_weight or ctx.recorder is not None:
                dense = kernels.weight_gradient(x, grad_output, ctx.transposed)
            if ctx.recorder is None:
                gradients = [
                    _at_mask(x, grad_output, dense, blocks, block_size, dtype, ctx.transposed)
                    for blocks, block_size, dtype in ctx.masks
                ]
            elif dense is not None:
                ctx.recorder(dense)
            dense = dense.to(ctx.dtypes[1]) if needs_weight and dense is not None else None
        if needs_x:
            weight = ctx.build(ctx.changes).to(grad_output.dtype)
            grad_x = (rows @ (weight.t() if ctx.transposed else weight)).view(ctx.shape).to(ctx.dtypes[0])
        if needs_bias:
            grad_bias = rows.sum(0).to(ctx.dtypes[1])
        return grad_x, dense, grad_bias, None, None, None, None, None, *gradients


def _at_mask(
    x: Tensor,
    grad_output: Tensor,
    dense: Tensor | None,
    blocks: Tensor | None,
    block_size: int,
    dtype: torch.dtype,
    transposed: bool,
) -> Tensor:
    """∂L/∂W at a mask, or of all entries; read from the dense one where that is there already."""
    if dense is None and blocks is not None:
        return kernels.masked_weight_gradient(x, grad_output, blocks, block_size, transposed).to(dtype)
    whole = kernels.weight_gradient(x, grad_output, transposed) if dense is None else dense
    return (whole if blocks is None else kernels.gather(whole, blocks, block_size)).to(dtype)
