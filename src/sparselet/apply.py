"""Adding an adapter to a plain model's weights: temporarily, restoring the base weights bit for bit, or in place."""

import contextlib
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from sparselet import kernels
from sparselet.adapter import as_expert
from sparselet.delta import SparseDelta
from sparselet.errors import NonFiniteValue, ShapeMismatch, UnsupportedExpert
from sparselet.expert import ExpertOrDeltas
from sparselet.fingerprint import Fingerprint, fingerprint_weight, require_same_base
from sparselet.model_config import optional_field
from sparselet.names import Names, as_rows, refuse_shared


@contextlib.contextmanager
def apply_temporarily(
    model: nn.Module, adapter: ExpertOrDeltas, base: Mapping[str, Fingerprint] | None = None
) -> Iterator[nn.Module]:
    """Within the block the model's weights are W + ΔW of `adapter`; afterwards they are W again, bit for bit.

    W + ΔW is summed in float32 (or wider) and rounded once to the weight's dtype, as in a merged checkpoint.
    model: a base model without adapters. base: its fingerprints by target, where they are known; by default they are computed.
    Raises UnknownTarget, UnsupportedExpert, ShapeMismatch, WrongBase before any weight is changed, and NonFiniteValue, after
    restoring W, where the weight's dtype cannot hold W + ΔW.
    """
    weights = target_weights(model, adapter, base)
    displaced: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                delta = adapter[name].to(weight.device)
                before = kernels.gather(weight, delta.indices, delta.block)
                displaced.append((weight, delta.indices, before))
                _add_to(weight, weight, delta, name)
        yield model
    finally:
        with torch.no_grad():
            for weight, blocks, before in displaced:
                kernels.write(weight, blocks, before)


def apply_in_place(model: nn.Module, adapter: ExpertOrDeltas, dtype: torch.dtype | None = None) -> None:
    """Change the model's weights to W + ΔW and keep nothing of W. One target's delta is in memory at a time.

    Sums and rounds as `apply_temporarily`. dtype: every parameter gets a new tensor of this dtype, and W + ΔW is rounded to it
    directly; parameters that transformers always keeps in float32 stay as they are. Raises NonFiniteValue where a dtype cannot
    hold a value; UnknownTarget, UnsupportedExpert, ShapeMismatch, WrongBase before any weight is changed.
    """
    weights = target_weights(model, adapter)
    with torch.no_grad():
        if dtype is None:
            for name, weight in weights.items():
                _add_to(weight, weight, adapter[name], name)
            return
        names = {weight.data_ptr(): name for name, weight in weights.items()}
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or _stays_wide(model, name, dtype):
                narrow = parameter.data.clone()
            else:
                narrow = parameter.data.to(dtype, copy=True)
            target = names.get(parameter.data_ptr()) if parameter.numel() else None
            if target is not None:
                _add_to(as_rows(narrow), weights[target], adapter[target], target)
            if narrow.dtype != parameter.dtype and not kernels.all_finite(narrow) and kernels.all_finite(parameter.data):
                _refuse_overflow(narrow, name)
            parameter.data = narrow


def _add_to(weight: Tensor, base: Tensor, delta: SparseDelta, name: str) -> None:
    """Write base + delta into `weight` at the delta's mask. Raises NonFiniteValue."""
    delta = delta.to(weight.device)
    total = add(kernels.gather(base, delta.indices, delta.block), delta.values, weight.dtype)
    if not kernels.all_finite(total):
        _refuse_overflow(total, name)
    kernels.write(weight, delta.indices, total)


def _refuse_overflow(values: Tensor, name: str) -> None:
    dtype = str(values.dtype).removeprefix("torch.")
    count = int((~values.isfinite()).sum())
    raise NonFiniteValue(
        f"{name}: {count} of {values.numel()} values of W + ΔW are NaN or beyond {dtype}, which ends at "
        f"{torch.finfo(values.dtype).max:g}. Write a wider dtype, such as bfloat16 or float32."
    )


def _stays_wide(model: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers always loads a parameter in float32."""
    fields = ["_keep_in_fp32_modules_strict", *(["_keep_in_fp32_modules"] if dtype is torch.float16 else [])]
    parts = [part for field in fields for part in optional_field(model, field) or ()]
    return any(re.search(rf"(^|\.){part}($|\.)", name) for part in parts)


def target_weights(
    model: nn.Module, adapter: ExpertOrDeltas, base: Mapping[str, Fingerprint] | None = None
) -> dict[str, Tensor]:
    """The model's weight of each of the adapter's targets, as the target's two sides (`names.as_rows`), if all of them fit.

    base: the fingerprints of the model's own weights by target; by default those of the weights that are in it now.
    Raises UnknownTarget, UnsupportedExpert (modules trained in full, which only PEFT loads; a weight that is shared, see
    `names.refuse_shared`, or quantised), ShapeMismatch, WrongBase.
    """
    expert = as_expert(adapter)
    if expert.trained_modules:
        raise UnsupportedExpert(
            f"the adapter also trained {', '.join(expert.trained_modules)} in full (modules_to_save), which only PEFT loads; "
            "use PeftModel.from_pretrained."
        )
    names, shapes = Names(model), expert.shapes
    targets = names.find(expert)
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
    own = {name: fingerprint_weight(w) if base is None else base[targets[name]] for name, w in weights.items()}
    require_same_base(expert.fingerprints, own, "adapter and model")
    return weights


def add(base: Tensor, change: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """base + change, summed in float32 or wider, rounded once to `dtype`, by default the base's."""
    wide = torch.promote_types(torch.promote_types(base.dtype, change.dtype), torch.float32)
    return (base.to(wide) + change.to(wide)).to(dtype or base.dtype)
