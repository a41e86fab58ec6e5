"""A linear layer at its effective weight, which is built for each pass and not kept."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

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

    weight: the base layer's, [out, in], or [in, out] when `transposed`. The values of `trained` changes get a gradient: ∂L/∂W
    at their mask, of their shape and dtype; at most one dense ∂L/∂W is alive at a time. Weight and bias get gradients where
    they require them.
    build: returns the effective weight of changes, in the forward pass and again in the backward pass. check: raises in the
    backward pass if anything else that the forward pass used has changed.
    recorder: receives the dense ∂L/∂W, and the values get no gradient.
    """
    if not torch.is_grad_enabled():
        return linear(x, build(changes), bias, transposed)
    values = [change.values for change in changes if change.trained]
    return _ChangedLinear.apply(x, weight, bias, tuple(changes), build, check, transposed, recorder, *values)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """The forward pass of `nn.Linear`, or of `Conv1D` when `transposed`, by the same operation."""
    if not transposed:
        return F.linear(x, weight, bias)
    assert bias is not None
    return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.shape[1])


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer's forward pass is `linear` alone: it has no hooks and no forward function of its own."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return not any(hooks) and "forward" not in layer.__dict__ and type(layer).forward in (nn.Linear.forward, Conv1D.forward)


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
        # In x's dtype, not y's: query, key and value have one input tensor, which autograd then keeps once.
        ctx.save_for_backward(x if ctx.learns else None)
        ctx.masks = [(change.blocks, kernels.block_of(change.values), change.values.dtype) for change in trained]
        # Copied here, since other code may write to the values before the backward pass.
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
                    _at_mask(x, grad_output, dense, blocks, block, dtype, ctx.transposed) for blocks, block, dtype in ctx.masks
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
    block: kernels.Block,
    dtype: torch.dtype,
    transposed: bool,
) -> Tensor:
    """∂L/∂W at a mask, or of all entries (blocks None); gathered from `dense`, the full ∂L/∂W, where it is not None."""
    if dense is None and blocks is not None:
        return kernels.masked_weight_gradient(x, grad_output, blocks, block, transposed).to(dtype)
    gradient = kernels.weight_gradient(x, grad_output, transposed) if dense is None else dense
    return (gradient if blocks is None else kernels.gather(gradient, blocks, block)).to(dtype)
