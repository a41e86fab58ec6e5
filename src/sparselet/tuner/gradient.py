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
    gradient is ∂L/∂W under the value's mask, of the value's shape and dtype; at most one dense ∂L/∂W is alive meanwhile.
    recorder: receives the dense ∂L/∂W instead, and the values get no gradient.
    """
    if torch.compiler.is_compiling() and recorder is None:
        for (units, block_size), value in zip(masks, values, strict=True):
            y = _TracedGradient.apply(y, x, value, units, block_size, transposed)
        return y
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
        # As it came, and not in y's dtype: the inputs of query, key and value are one tensor, which is then kept once.
        ctx.save_for_backward(x)
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
        x = ctx.saved_tensors[0].to(grad_output.dtype)
        if ctx.recorder is not None:
            ctx.recorder(kernels.weight_gradient(x, grad_output, ctx.transposed))
            return grad_output, None, None, None, None, *(None for _ in ctx.masks)
        gradients = (
            _gradient(x, grad_output, units, block_size, ctx.transposed).to(dtype)
            for (units, block_size), dtype in zip(ctx.masks, ctx.dtypes, strict=True)
        )
        return grad_output, None, None, None, None, *gradients


class _TracedGradient(torch.autograd.Function):
    """The same for one adapter in code that torch.compile traces, which knows no `mark_dirty`."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, y: Tensor, x: Tensor, values: Tensor, units: Tensor | None, block_size: int, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, units)
        ctx.block_size, ctx.transposed, ctx.dtype = block_size, transposed, values.dtype
        return y.view_as(y)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, units = ctx.saved_tensors
        x = x.to(grad_output.dtype)
        gradient = _gradient_as_operation(x, grad_output, units, ctx.block_size, ctx.transposed)
        return grad_output, None, gradient.to(ctx.dtype), None, None, None


def _gradient(x: Tensor, grad_output: Tensor, units: Tensor | None, block_size: int, transposed: bool) -> Tensor:
    """∂L/∂W under a mask, or all of it."""
    if units is None:
        return kernels.weight_gradient(x, grad_output, transposed)
    return kernels.masked_weight_gradient(x, grad_output, units, block_size, transposed)


# One operation to the tracer, so that the choice of a kernel is made when it runs.
_gradient_as_operation = torch.library.custom_op("sparselet::masked_gradient", _gradient, mutates_args=())


@_gradient_as_operation.register_fake
def _(x: Tensor, grad_output: Tensor, units: Tensor | None, block_size: int, transposed: bool) -> Tensor:
    if units is None:
        sides = (x.shape[-1], grad_output.shape[-1])
        return x.new_empty(sides if transposed else sides[::-1])
    return x.new_empty((units.shape[0], *((block_size, block_size) if block_size > 1 else ())))
