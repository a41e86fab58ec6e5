"""Writing an adapter into a plain model's weights, for a while or for good, and taking it out bit for bit."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from sparselet import kernels
from sparselet.delta import SparseDelta
from sparselet.errors import ShapeMismatch, UnsupportedExpert
from sparselet.fingerprint import fingerprint_weight, require_same_base
from sparselet.names import Names, as_rows, refuse_shared


@contextlib.contextmanager
def applied(model: nn.Module, adapter: Mapping[str, SparseDelta]) -> Iterator[nn.Module]:
    """Within the block the model's weights are W + ΔW of `adapter`; afterwards they are W again, bit for bit.

    W + ΔW is summed in float32 (or wider) and rounded once to the weight's dtype, as in a merged checkpoint.
    model: a base model without adapters. Raises UnknownTarget, ShapeMismatch, WrongBase before anything is changed.
    """
    weights = target_weights(model, adapter)
    displaced: list[tuple[Tensor, Tensor, Tensor, int]] = []
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                delta = adapter[name].to(weight.device)
                before = kernels.gather(weight, delta.indices, delta.block_size)
                displaced.append((weight, delta.indices, before, delta.block_size))
                kernels.write(weight, delta.indices, add(before, delta.values), delta.block_size)
        yield model
    finally:
        with torch.no_grad():
            for weight, units, before, block_size in displaced:
                kernels.write(weight, units, before, block_size)


def absorb(model: nn.Module, adapter: Mapping[str, SparseDelta]) -> None:
    """Make the model's weights W + ΔW for good, keeping nothing of W: one target's delta is in memory at a time.

    Sums and rounds as `applied`. Raises UnknownTarget, ShapeMismatch, WrongBase before anything is changed.
    """
    with torch.no_grad():
        for name, weight in target_weights(model, adapter).items():
            delta = adapter[name].to(weight.device)
            before = kernels.gather(weight, delta.indices, delta.block_size)
            kernels.write(weight, delta.indices, add(before, delta.values), delta.block_size)


def target_weights(model: nn.Module, adapter: Mapping[str, SparseDelta]) -> dict[str, Tensor]:
    """The model's weight of each of the adapter's targets, once all fit, as the target's two sides (`names.as_rows`).

    Raises UnknownTarget, UnsupportedExpert (modules trained in full, which only PEFT puts in place; a weight that is shared,
    see `names.refuse_shared`, or quantised), ShapeMismatch, WrongBase.
    """
    trained = getattr(adapter, "metadata", {}).get("modules_to_save") or sorted(getattr(adapter, "modules", {}))
    if trained:
        raise UnsupportedExpert(
            f"the adapter also trained {', '.join(trained)} in full (modules_to_save), which only PEFT loads; use "
            "PeftModel.from_pretrained."
        )
    shapes = getattr(adapter, "shapes", None) or {name: delta.shape for name, delta in adapter.items()}
    names = Names(model)
    targets = names.find(adapter)
    refuse_shared(names, targets.values())
    weights: dict[str, Tensor] = {}
    for name, target in targets.items():
        weight = names.layers[target].parameter.detach()
        if not weight.is_floating_point():
            raise UnsupportedExpert(
                f"{target} is {weight.dtype} in the model, which is quantised; load it in a floating dtype."
            )
        rows = as_rows(weight)
        if tuple(rows.shape) != shapes[name]:
            raise ShapeMismatch(f"{name}: the adapter has shape {list(shapes[name])}, the model {list(rows.shape)}.")
        if not weight.is_contiguous():
            raise UnsupportedExpert(f"{target} does not lie in one piece in memory, so it cannot be changed in place.")
        weights[name] = rows
    fingerprints = getattr(adapter, "fingerprints", {})
    require_same_base(fingerprints, {name: fingerprint_weight(w) for name, w in weights.items()}, "adapter and model")
    return weights


def add(base: Tensor, change: Tensor) -> Tensor:
    """base + change, summed in float32 or wider, rounded once to the base's dtype."""
    wide = torch.promote_types(torch.promote_types(base.dtype, change.dtype), torch.float32)
    return (base.to(wide) + change.to(wide)).to(base.dtype)
