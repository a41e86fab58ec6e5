"""The weight that a pass uses: a target's base weight plus the changes of its active adapters.

The rules of residence. They hold whatever PEFT, torch or other code does in between (`tests/tuner/test_any_sequence.py`):

1. The base layer's own weight is the base model's, bit for bit, for whoever reads, copies, averages, saves or loads it. Only
   `merge`, and a lease within one `generate`, write into it; what they displace is kept and put back bit for bit.
2. Each pass builds its weight from the values and the mask as they are at that moment, however they came there: an optimizer's
   step, `.data`, `load_state_dict`. Nothing has to be told of a change.
3. A backward pass differentiates at the weight its forward pass used, whatever was written in between: it keeps the values of
   its mask. What it does not keep (dense values, base weights, the mask that a gradient belongs to) raises if it has changed.
4. What is saved is the values and the mask that answer.

A pass holds the built weight of one target at a time; nothing of it is kept for the backward pass, which builds it again.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparselet import kernels
from sparselet.delta import index_dtype

WRITING = threading.Lock()  # held while a base weight is written or copied, so that threads can share a model


@dataclass(frozen=True)
class Change:
    """One adapter's change of a target as a pass uses it.

    blocks: ascending ids [n] of the entries or tiles in the mask, None for all entries. values: [n], [n, B, B] for tiles, or
    [rows, columns] for all entries. trained: whether they get a gradient. off_mask: Ŵ [rows, columns] of the entries outside
    of the mask, while masks are selected; what it holds at the mask does not count.
    """

    blocks: Tensor | None
    block_size: int
    values: Tensor
    trained: bool = False
    off_mask: Tensor | None = None

    def snapshot(self) -> "Change":
        """The same with values of its own, which nobody can write to; dense values are not copied."""
        if self.blocks is None:
            return self
        return replace(self, values=self.values.detach().clone())


def effective_weight(base: Tensor, changes: Sequence[Change]) -> Tensor:
    """W + ΣΔW [rows, columns] as a new tensor, summed in the widest dtype of all and rounded once to the base's."""
    if len(changes) == 1 and changes[0].blocks is not None and changes[0].off_mask is None:
        return kernels.add_at(base, changes[0].blocks, changes[0].values, changes[0].block_size)
    total = base.to(_widest(base, changes), copy=True, memory_format=torch.contiguous_format)
    for change in changes:
        if change.blocks is None:
            total += change.values
        elif change.off_mask is None:
            total.view(-1).index_add_(0, entries(change, total.shape), change.values.reshape(-1).to(total.dtype))
        else:
            dense = change.off_mask.to(total.device, copy=True)
            kernels.write(dense, change.blocks, change.values, change.block_size)
            total += dense
    return total.to(base.dtype)


def differentiable_weight(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """The same by torch's own operations, which autograd and torch.compile follow. No change has an `off_mask`."""
    total = weight.to(_widest(weight, changes))
    for change in changes:
        if change.blocks is None:
            total = total + change.values
        else:
            ids = entries(change, total.shape)
            flat = total.reshape(-1).index_add(0, ids, change.values.reshape(-1).to(total.dtype))
            total = flat.view(weight.shape)
    return total.to(weight.dtype)


def entries(change: Change, shape: Sequence[int]) -> Tensor:
    """The flat ids of a mask's entries, int [n] or [n·B·B], in the order of its values."""
    assert change.blocks is not None
    if change.block_size == 1:
        return change.blocks
    return kernels.tile_entries(change.blocks, (shape[0], shape[1]), change.block_size).reshape(-1)


@dataclass(frozen=True)
class Resident:
    """Adapters that stand in the base layer's own weight, and what they displaced there.

    blocks: the blocks that were written, None for all. displaced: the base's values of these, in the weight's dtype.
    versions: the version counters of the adapters' values when they were written. lease: of `generate`, or None for `merge`.
    """

    names: tuple[str, ...]
    versions: tuple[int, ...]
    blocks: Tensor | None
    block_size: int
    displaced: Tensor
    lease: "Lease | None" = None


def displace(base: Tensor, changes: Sequence[Change]) -> tuple[Tensor | None, int, Tensor]:
    """What writing `changes` into `base` will overwrite: blocks, their block size, and the base's values there."""
    masks = [change.blocks for change in changes]
    if any(blocks is None for blocks in masks):
        return None, 1, base.clone()
    if len(changes) == 1:
        blocks, block_size = changes[0].blocks, changes[0].block_size
        assert blocks is not None
        return blocks.clone(), block_size, kernels.gather(base, blocks, block_size)
    union = torch.unique(torch.cat([entries(change, base.shape).long() for change in changes]))
    return union.to(index_dtype(base.numel())), 1, kernels.gather(base, union)


def without(weight: Tensor, resident: Resident | None) -> Tensor:
    """The base weight: `weight` itself, or a copy with what is resident taken out."""
    if resident is None:
        return weight
    if resident.blocks is None:
        return resident.displaced
    base = weight.clone(memory_format=torch.contiguous_format)
    kernels.write(base, resident.blocks, resident.displaced, resident.block_size)
    return base


class Lease:
    """One call of `generate`: its passes without gradients write the adapters into the weights once, and out at the end.

    A pass through a layer that came by before makes its adapters resident, so that a single forward pass writes nothing.
    """

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.returns: list[Callable[[], None]] = []

    def end(self) -> None:
        """Take out whatever was written."""
        for give_back in self.returns:
            give_back()


LEASE: ContextVar[Lease | None] = ContextVar("sparselet_lease", default=None)


@contextlib.contextmanager
def leased() -> Iterator[None]:
    """One call of a model: if it passes through its layers again and again without gradients, they need one write for all."""
    lease = Lease()
    token = LEASE.set(lease)
    try:
        yield
    finally:
        LEASE.reset(token)
        lease.end()


def _widest(base: Tensor, changes: Sequence[Change]) -> torch.dtype:
    dtype = base.dtype
    for change in changes:
        dtype = torch.promote_types(dtype, change.values.dtype)
    return dtype
