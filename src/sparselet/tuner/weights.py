"""Weights and parameters that PEFT, torch or accelerate may shard, offload or replace."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparselet.errors import SelectionError


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is a DTensor, of which each process holds a part."""
    return isinstance(weight, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a DTensor, which every process has to gather at the same time."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def version_of(tensor: Tensor) -> int:
    """A tensor's version counter; -1 for an inference tensor, which has none."""
    return -1 if tensor.is_inference() else tensor._version


def require_usable(weight: Tensor, target: str) -> None:
    """Raise SelectionError for a base weight that this process does not hold completely."""
    if is_sharded(weight):
        raise SelectionError(
            f"{target}: the weight is a DTensor, of which each process holds a part. Train with DistributedDataParallel "
            "instead of FSDP2 or tensor parallelism."
        )
    if weight.is_meta:
        raise SelectionError(
            f"{target}: the weight is not in memory (offloaded, or on the meta device), so the adapter cannot be added to it. "
            "Load the model onto a device that holds it."
        )


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter new data, of any shape, and drop its gradient."""
    # Autograd keeps a parameter's gradient accumulator, with the previous shape, while any previous loss is alive; a change
    # of dtype makes autograd drop it.
    if parameter.shape != data.shape:
        temporary = torch.float64 if parameter.dtype != torch.float64 else torch.float32
        parameter.data = torch.empty(0, dtype=temporary, device=data.device)
    parameter.data = data
    parameter.grad = None
