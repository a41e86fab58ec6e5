"""Selecting masks over several processes: one mean gradient, one mask, and a `DistributedDataParallel` that follows it.

The wrapper fixes its buckets to the parameters' sizes when it is made, and a selection changes the sizes. It is then made
anew in place, as when it is unpickled, so that whoever holds it goes on with it: a Trainer, accelerate, a loop.
"""

import gc
import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparselet.errors import SelectionError
from sparselet.tuner.layer import SparseletLayer


def wrappers(module: nn.Module) -> list[DistributedDataParallel]:
    """The DistributedDataParallel objects around a module, whoever holds them; a callback is given the module alone.

    Goes through all objects of the process, which takes a fraction of a second.
    """
    # By type, since proxies and lazy modules may answer `isinstance` by doing things.
    found = [o for o in gc.get_objects() if DistributedDataParallel in type(o).__mro__]
    return [wrapper for wrapper in found if getattr(wrapper, "module", None) is module]


def group_of(wrapper: DistributedDataParallel) -> "dist.ProcessGroup":
    """The processes that a wrapper trains over. Raises SelectionError for a wrapper that cannot be made anew."""
    kept = {
        "static_graph (ddp_static_graph)": wrapper.static_graph,
        "mixed_precision": wrapper.mixed_precision is not None,
        "a communication hook": bool(wrapper._comm_hooks),
        "a process group of its own": wrapper.process_group is not dist.group.WORLD,
    }
    for what, has in kept.items():
        if has:
            raise SelectionError(
                f"the model's DistributedDataParallel has {what}, which a moving mask cannot go with. Leave it out, or select "
                "in one process and call freeze_masks before the model is wrapped."
            )
    assert wrapper.process_group is not None
    return wrapper.process_group


def rebuild(wrapper: DistributedDataParallel) -> None:
    """Let a wrapper take over the present shapes of the adapters' parameters. Call it between two optimizer steps.

    Parameters without entries, such as those of dropped layers, get no gradient and are not waited for. Masks are equal on
    all processes, so they are not sent round with the other buffers.
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
    """The mean of a gradient over the processes, in its place."""
    dist.all_reduce(gradient, group=group)
    return gradient.div_(dist.get_world_size(group))


def anywhere(flags: Mapping[str, bool], device: torch.device, group: "dist.ProcessGroup") -> dict[str, bool]:
    """For each name whether its flag is set on any process. All processes give the same names in the same order."""
    together = torch.tensor([int(flag) for flag in flags.values()], device=device)
    dist.all_reduce(together, op=dist.ReduceOp.MAX, group=group)
    return dict(zip(flags, (bool(flag) for flag in together.tolist()), strict=True))


def first_masks(masks: Mapping[str, Tensor], device: torch.device, group: "dist.ProcessGroup") -> dict[str, Tensor]:
    """The masks of the first process, on all of them. Scores may differ in their last bits, and masks must not."""
    counts = torch.tensor([len(mask) for mask in masks.values()], device=device)
    dist.broadcast(counts, 0, group=group)
    agreed = {}
    for (name, mask), count in zip(masks.items(), counts.tolist(), strict=True):
        agreed[name] = mask.to(device) if len(mask) == count else mask.new_empty(count, device=device)
        if count:
            dist.broadcast(agreed[name], 0, group=group)
    return agreed


def require_same_start(layers: Mapping[str, SparseletLayer], group: "dist.ProcessGroup") -> None:
    """Raise SelectionError unless all processes have the same base weights, by their fingerprints, and the same masks."""
    digest = hashlib.sha256()
    for name, layer in layers.items():
        digest.update(repr((name, layer.base_fingerprint())).encode())
        for mask in layer.sparse_indices.values():
            digest.update(mask.cpu().numpy().tobytes())
    own = int.from_bytes(digest.digest()[:7], "little")
    device = next(iter(layers.values())).base_weight.device
    bounds = torch.tensor([own, -own], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    if bounds[0] != -bounds[1]:
        raise SelectionError(
            "the processes start from different base weights or masks. Load the same base model and adapter on all of them, "
            "or call transformers.set_seed with one seed before making the model."
        )
