"""Adapters for stock PEFT: SHiRA (Bhardwaj et al. 2024) and Super-Tuning (arXiv 2607.09287), which hold single entries.

Both fix how many entries each target has by one number for the whole adapter: SHiRA K = r(m + n) for a target of m × n,
Super-Tuning K = ⌊mn(1 − s)⌋. The smallest K that fits all targets is taken, and zeros at further positions fill the rest:
adding 0 changes nothing. Larger blocks are spelt out. The entries come first and ascend, then the zeros; the header notes how
many entries there are and the shape of each target, so that sparselet reads back the same masks.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparselet.adapter import CONFIG_FILE, PREFIX, WEIGHTS_FILE, as_expert
from sparselet.delta import SparseDelta, check_dense_shape
from sparselet.errors import ExportError
from sparselet.expert import Expert, ExpertOrDeltas
from sparselet.formats.linear_targets import Target, linear_targets
from sparselet.formats.single_entries.read import NOTE, SHIRA, SUPER_TUNING, Layout
from sparselet.io.atomic import atomic_directory, atomic_write
from sparselet.io.json_files import write_json
from sparselet.io.tensor_files import TensorStream

_LARGEST = 2**31 - 1  # PEFT numbers the entries with int32


def export_shira(adapter: ExpertOrDeltas, output: str | Path, base: nn.Module | None = None) -> Path:
    """Write a SHiRA adapter that `PeftModel.from_pretrained` loads without sparselet.

    base: the base model, to check that the targets are linear layers (see `linear_targets`).
    Raises ExportError (r(m + n) entries with one r do not fit every target), UnknownTarget, NonFiniteValue, OutputExists,
    WriteFailed.
    """
    adapter = as_expert(adapter)
    targets = _entries(adapter, base)
    needed = {name: -(-target.nnz // sum(target.shape)) for name, target in targets.items()}
    r = max(needed.values())
    for name, target in targets.items():
        if r * sum(target.shape) > math.prod(target.shape):
            most = max(needed, key=lambda name: needed[name])
            raise ExportError(
                f"SHiRA has one r for all targets. {most} {list(targets[most].shape)} has {targets[most].nnz} entries and "
                f"needs r = {r}, with which {name} {list(target.shape)} would have {r * sum(target.shape)} of "
                f"{math.prod(target.shape)}. Export to Super-Tuning, which fits any density."
            )
    config = {"peft_type": "SHIRA", "r": r, "mask_type": "stored", "random_seed": None, "fan_in_fan_out": False}
    return _write(adapter, targets, output, SHIRA, config, lambda shape: r * sum(shape))


def export_super_tuning(adapter: ExpertOrDeltas, output: str | Path, base: nn.Module | None = None) -> Path:
    """Write a Super-Tuning adapter that `PeftModel.from_pretrained` (PEFT 0.21 and later) loads without sparselet.

    base: the base model, to check that the targets are linear layers (see `linear_targets`).
    Raises ExportError, UnknownTarget, NonFiniteValue, OutputExists, WriteFailed.
    """
    adapter = as_expert(adapter)
    targets = _entries(adapter, base)
    sparsity = smallest_fit([(math.prod(target.shape), target.nnz) for target in targets.values()])
    config = {
        "peft_type": "SUPERTUNING",
        "sparsity": sparsity,
        "select_top": True,
        "r": None,
        "lora_alpha": None,
        "lora_dropout": 0.0,
        "save_precomputed_indices": True,
    }
    return _write(adapter, targets, output, SUPER_TUNING, config, lambda shape: kept_entries(math.prod(shape), sparsity))


def kept_entries(size: int, sparsity: float) -> int:
    """How many entries Super-Tuning keeps of a target, in its own floating-point arithmetic."""
    return int(size * (1 - sparsity))


def smallest_fit(targets: list[tuple[int, int]]) -> float:
    """The largest sparsity with which every target of (size, entries) keeps at least its entries."""
    sparsity = 1 - max(nnz / size for size, nnz in targets)
    while any(kept_entries(size, sparsity) < nnz for size, nnz in targets):
        sparsity = max(0.0, sparsity - 2**-53)  # rounding lost an entry
    return sparsity


def write_peft(
    output: str | Path,
    config: Mapping[str, Any],
    adapter: Expert,
    names: list[str],
    fill: Callable[[TensorStream], Mapping[str, Any]],
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write a PEFT adapter directory: the tensors that `fill` adds, and a configuration with what it returns added.

    names: of the tensors. Raises OutputExists, WriteFailed, and what `fill` raises; nothing is left then.
    """
    metadata = adapter.metadata
    described = {"base_model_name_or_path": metadata.base_model_name_or_path, "task_type": metadata.task_type}
    with atomic_directory(output) as directory:
        with atomic_write(directory / WEIGHTS_FILE) as file, TensorStream(file, names, notes) as stream:
            content = {**config, **fill(stream)}
        write_json(directory / CONFIG_FILE, {**described, "inference_mode": True, "modules_to_save": None, **content})
    return Path(output)


def _entries(adapter: Expert, base: nn.Module | None) -> dict[str, Target]:
    """The targets that the adapter changes, once PEFT can hold every one as single entries."""
    targets = linear_targets(adapter, base)
    for name, target in targets.items():
        if target.transposed:
            raise ExportError(f"{name} is a Conv1D; PEFT has SHiRA and Super-Tuning for nn.Linear only. Export to LoRA.")
        check_dense_shape(target.shape, name)  # PEFT spells them out
        if math.prod(target.shape) > _LARGEST:
            raise ExportError(f"{name} {list(target.shape)} has more entries than int32 can number, as PEFT does.")
    return targets


def _write(
    adapter: Expert,
    targets: Mapping[str, Target],
    output: str | Path,
    layout: Layout,
    config: Mapping[str, Any],
    count: Callable[[tuple[int, int]], int],
) -> Path:
    note = {
        name: {"shape": list(t.shape), "nnz": t.nnz, "fingerprint": dict(adapter.fingerprints.get(name) or {}) or None}
        for name, t in targets.items()
    }

    def fill(stream: TensorStream) -> dict[str, Any]:
        for name, target in targets.items():
            indices, values = padded(adapter[name].expand(), count(target.shape))
            columns = target.shape[1]
            stored = torch.stack([indices // columns, indices % columns]) if layout is SHIRA else indices
            stream.add(PREFIX + name + layout.indices, stored)
            stream.add(PREFIX + name + layout.values, values)
        return {"target_modules": list(targets), "init_weights": True}

    names = [PREFIX + name + suffix for name in targets for suffix in (layout.indices, layout.values)]
    return write_peft(output, config, adapter, names, fill, {NOTE: json.dumps(note)})


def padded(delta: SparseDelta, count: int) -> tuple[Tensor, Tensor]:
    """The entries of an element-sparse delta, and zeros at the first positions outside its mask: int32 and float32 [count]."""
    missing = count - delta.nnz
    free = torch.ones(count, dtype=torch.bool)  # of `count` positions the entries take no more than leaves enough
    free[delta.indices[delta.indices < count].long()] = False
    further = free.nonzero().squeeze(1)[:missing].to(torch.int32)
    return torch.cat([delta.indices, further]), torch.cat([delta.values.float(), torch.zeros(missing)])
