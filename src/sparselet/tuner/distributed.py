"""Mask selection over several processes: one mean gradient, one mask, and a `DistributedDataParallel` rebuilt for it.

The wrapper sets its buckets by the parameters' sizes when it is constructed, and a selection changes the sizes. It is then
rebuilt in place, as by unpickling, so that a Trainer, accelerate or a loop that refers to it can continue.
"""

import gc
import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparselet.errors import SelectionError
from sparselet.model_config import optional_field
from sparselet.tuner.layer import SparseletLayer


def ddp_wrappers(module: nn.Module) -> list[DistributedDataParallel]:
    """The DistributedDataParallel objects around a module; a callback receives only the module.

    Searches all objects of the process, which takes a fraction of a second.
    """
    # By type, since `isinstance` may run code of proxies and lazy modules.
    candidates = [item for item in gc.get_objects() if DistributedDataParallel in type(item).__mro__]
    return [wrapper for wrapper in candidates if optional_field(wrapper, "module") is module]


def group_of(wrapper: DistributedDataParallel) -> "dist.ProcessGroup":
    """The process group of a wrapper. Raises SelectionError for a wrapper that cannot be rebuilt."""
    unsupported = {
        "static_graph (ddp_static_graph)": wrapper.static_graph,
        "mixed_precision": wrapper.mixed_precision is not None,
        "a communication hook": bool(wrapper._comm_hooks),
        "a process group of its own": wrapper.process_group is not dist.group.WORLD,
    }
    for option, is_set in unsupported.items():
        if is_set:
            raise SelectionError(
                f"the model's DistributedDataParallel has {option}, which does not support a changing mask. Leave it out, or "
                "select in one process and call freeze_masks before the model is wrapped."
            )
    assert wrapper.process_group is not None
    return wrapper.process_group


def rebuild(wrapper: DistributedDataParallel) -> None:
    """Rebuild a wrapper for the current shapes of the adapters' parameters. Call it between two optimizer steps.

    Parameters without entries, such as those of dropped layers, get no gradient, so the wrapper ignores them. Masks are equal
    on all processes, so they are not broadcast with the other buffers.
    """
    ignored = set(wrapper.parameters_to_ignore)
    for key, layer in wrapper.module.named_modules():
        if isinstance(layer, SparseletLayer):
            for adapter, values in layer.sparse_values.items():
                name = f"{key}.sparse_values.{adapter}"
                ignored = ignored - {name} if values.numel() else ignored | {name}
                ignored.add(f"{key}.sparse_indices.{adapter}")
    wrapper.parameters_to_ignore = ignored
    wrapper.__setstate__(wrapper.__getstate__())


def average(gradient: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The mean of a gradient over the processes, in place."""
    dist.all_reduce(gradient, group=group)
    return gradient.div_(dist.get_world_size(group))


def on_any_process(flags: Mapping[str, bool], device: torch.device, group: "dist.ProcessGroup") -> dict[str, bool]:
    """For each name, whether its flag is set on any process. All processes pass the same names in the same order."""
    combined = torch.tensor([int(flag) for flag in flags.values()], device=device)
    dist.all_reduce(combined, op=dist.ReduceOp.MAX, group=group)
    return dict(zip(flags, (bool(flag) for flag in combined.tolist()), strict=True))


def broadcast_masks(masks: Mapping[str, Tensor], device: torch.device, group: "dist.ProcessGroup") -> dict[str, Tensor]:
    """The masks of the first process, on all processes, whose scores may differ in their last bits."""
    counts = torch.tensor([len(mask) for mask in masks.values()], device=device)
    dist.broadcast(counts, 0, group=group)
    received = {}
    for (name, mask), count in zip(masks.items(), counts.tolist(), strict=True):
        received[name] = mask.to(device) if len(mask) == count else mask.new_empty(count, device=device)
        if count:
            dist.broadcast(received[name], 0, group=group)
    return received


def require_same_start(layers: Mapping[str, SparseletLayer], group: "dist.ProcessGroup") -> None:
    """Raise SelectionError unless all processes have the same base weights, by their fingerprints, and the same masks."""
    digest = hashlib.sha256()
    for name, layer in layers.items():
        digest.update(repr((name, layer.base_fingerprint())).encode())
        for mask in layer.sparse_indices.values():
            digest.update(mask.cpu().numpy().tobytes())
    number = int.from_bytes(digest.digest()[:7], "little")
    device = next(iter(layers.values())).base_weight.device
    bounds = torch.tensor([number, -number], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    if bounds[0] != -bounds[1]:
        raise SelectionError(
            "the processes start from different base weights or masks. Load the same base model and adapter on all of them, "
            "or call transformers.set_seed with one seed before constructing the model."
        )
