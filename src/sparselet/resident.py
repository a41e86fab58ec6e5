"""Writing an adapter into a plain model's weights for a while, and taking it out bit for bit."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from sparselet import kernels
from sparselet.delta import SparseDelta
from sparselet.errors import ShapeMismatch, UnknownTarget
from sparselet.fingerprint import fingerprint_weight, require_same_base


@contextlib.contextmanager
def applied(model: nn.Module, adapter: Mapping[str, SparseDelta]) -> Iterator[nn.Module]:
    """Within the block the model's weights are W + ΔW of `adapter`; afterwards they are W again, bit for bit.

    W + ΔW is summed in float32 (or wider) and rounded once to the weight's dtype, as in a merged checkpoint.
    model: a base model without adapters. Raises UnknownTarget, ShapeMismatch, WrongBase before anything is changed.
    """
    weights = target_weights(model, adapter)
    displaced: list[tuple[Tensor, SparseDelta, Tensor]] = []
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                delta = adapter[name]
                delta = delta.to(weight.device)
                before = kernels.gather(weight, delta.indices, delta.block_size)
                displaced.append((weight, delta, before))
                kernels.write(weight, delta.indices, add(before, delta.values), delta.block_size)
        yield model
    finally:
        with torch.no_grad():
            for weight, delta, before in displaced:
                kernels.write(weight, delta.indices, before, delta.block_size)


def target_weights(model: nn.Module, adapter: Mapping[str, SparseDelta]) -> dict[str, Tensor]:
    """The model's weight of each of the adapter's targets, once all fit.

    Raises UnknownTarget, ShapeMismatch, WrongBase.
    """
    weights: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name in adapter:
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            raise UnknownTarget(f"the model has no target {name}, which the adapter changes.")
        shape = tuple(weight.shape)
        if shape != adapter[name].shape:
            raise ShapeMismatch(f"{name}: the adapter has shape {list(adapter[name].shape)}, the model {list(shape)}.")
        weights[name] = weight.detach()
    fingerprints = getattr(adapter, "fingerprints", {})
    require_same_base(fingerprints, {name: fingerprint_weight(w) for name, w in weights.items()}, "adapter and model")
    return weights


def add(base: Tensor, change: Tensor) -> Tensor:
    """base + change, summed in float32 or wider, rounded once to the base's dtype."""
    wide = torch.promote_types(torch.promote_types(base.dtype, change.dtype), torch.float32)
    return (base.to(wide) + change.to(wide)).to(base.dtype)
