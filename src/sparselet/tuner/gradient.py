"""Gradients of masked entries, taken where a layer's output passes by."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparselet import kernels

Mask = tuple[Tensor | None, int]  # unit ids and block size; None for all entries


def with_masked_gradient(
    y: Tensor,
    x: Tensor,
    masks: Sequence[Mask],
    values: Sequence[nn.Parameter],
    transposed: bool,
    recorder: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """y itself, whose backward pass also yields ∂L/∂Ŵ for each of `values`.

    y [..., out] is a linear layer's output for x [..., in]; its weight is [out, in], or [in, out] when `transposed`. Each
    gradient is ∂L/∂W under the value's mask, of the value's shape and dtype; one dense ∂L/∂W is alive meanwhile.
    recorder: receives the dense ∂L/∂W instead, and the values get no gradient.
    """
    return _MaskedGradient.apply(y, x, tuple(masks), transposed, recorder, *values)


class _MaskedGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        masks: tuple[Mask, ...],
        transposed: bool,
        recorder: Callable[[Tensor], None] | None,
        *values: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x.to(y.dtype))
        ctx.masks, ctx.transposed, ctx.recorder = masks, transposed, recorder
        ctx.dtypes = [value.dtype for value in values]
        # y itself, not a view of it: models such as OLMo clamp their projections in place.
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if ctx.recorder is not None:
            ctx.recorder(kernels.weight_gradient(x, grad_output, ctx.transposed))
            return grad_output, None, None, None, None, *(None for _ in ctx.masks)
        gradients = [
            kernels.weight_gradient(x, grad_output, ctx.transposed)
            if units is None
            else kernels.masked_weight_gradient(x, grad_output, units, block, ctx.transposed)
            for units, block in ctx.masks
        ]
        typed = (gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
        return grad_output, None, None, None, None, *typed
