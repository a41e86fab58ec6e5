"""Adapters written into a base layer's own weight, by `merge` or by a lease within one `generate`, and the way back."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselet import kernels
from sparselet.delta import index_dtype
from sparselet.tuner.effective import Change, effective_weight, entries
from sparselet.tuner.weights import version_of

WRITING = threading.Lock()  # held while a base weight is written or copied, so that threads can share a model


class Lease:
    """One call of `generate`: its passes without gradients write the adapters into the weights once; its end restores these.

    A layer writes on its second pass of a lease, so that a single forward pass writes nothing.
    """

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.restores: list[Callable[[], None]] = []

    def end(self) -> None:
        """Restore all weights that were written."""
        for restore in self.restores:
            restore()


LEASE: ContextVar[Lease | None] = ContextVar("sparselet_lease", default=None)


@contextlib.contextmanager
def leased() -> Iterator[None]:
    """One call of a model: repeated passes through a layer without gradients write its weight once for all of them."""
    lease = Lease()
    token = LEASE.set(lease)
    try:
        yield
    finally:
        LEASE.reset(token)
        lease.end()


@dataclass(frozen=True)
class Resident:
    """Adapters that are written into a weight, and the values they displaced.

    versions: the version counters of the adapters' values when they were written. blocks: the blocks that were written, None
    for all. displaced: the base's values of these, in the weight's dtype. lease: of `generate`, or None for `merge`.
    """

    names: tuple[str, ...]
    versions: tuple[int, ...]
    blocks: Tensor | None
    displaced: Tensor
    lease: Lease | None


class Residence:
    """What is written into one base weight. Its methods take that weight, whose owner may replace it by another tensor."""

    def __init__(self) -> None:
        self.resident: Resident | None = None
        self.own_writes = 0  # of the weight's version counter

    def base(self, weight: Tensor) -> Tensor:
        """The base model's weight: `weight` itself, or a copy without the resident adapters."""
        if self.resident is None:
            return weight
        if self.resident.blocks is None:
            return self.resident.displaced
        base = weight.clone(memory_format=torch.contiguous_format)
        kernels.write(base, self.resident.blocks, self.resident.displaced)
        return base

    def build(self, weight: Tensor, changes: Sequence[Change]) -> Tensor:
        """The base model's weight plus `changes`, as a new tensor."""
        with WRITING, torch.no_grad():
            return effective_weight(self.base(weight.detach()), changes)

    def base_version(self, weight: Tensor) -> int:
        """A version counter of the base model's weight: it moves when other code writes to `weight`."""
        return version_of(weight) - self.own_writes

    def holds(self, names: tuple[str, ...], values: Sequence[Tensor]) -> bool:
        """Whether the weight holds these adapters with their current values, by their version counters."""
        resident = self.resident
        return resident is not None and resident.names == names and resident.versions == tuple(map(version_of, values))

    def write(self, weight: Tensor, names: tuple[str, ...], changes: Sequence[Change], lease: Lease | None = None) -> None:
        """Write these adapters' changes into the weight, instead of what is resident."""
        with WRITING, self._own_write(weight) as data:
            self._take_out(data)
            versions = tuple(version_of(change.values) for change in changes)
            blocks, displaced = displaced_by(changes, data)
            self.resident = Resident(names, versions, blocks, displaced, lease)
            if len(changes) == 1 and blocks is not None and data.is_contiguous():
                kernels.add_and_write(data, blocks, displaced, changes[0].values)
            else:
                data.copy_(effective_weight(data, changes))

    def restore(self, weight: Tensor) -> None:
        """Restore the base model's weight, bit for bit."""
        with WRITING, self._own_write(weight) as data:
            self._take_out(data)

    def may_write(self, lease: Lease) -> bool:
        """Whether a pass of this lease may write: nothing of another lease is resident, and the layer had a pass before."""
        if self.resident is not None:
            return self.resident.lease is lease
        had_pass = id(self) in lease.seen
        lease.seen.add(id(self))
        return had_pass

    def end_lease(self, weight: Tensor, lease: Lease) -> None:
        """Restore the weight if this lease has written it."""
        if self.resident is not None and self.resident.lease is lease:
            self.restore(weight)

    def _take_out(self, data: Tensor) -> None:
        if self.resident is None:
            return
        if self.resident.blocks is not None and data.is_contiguous():
            kernels.write(data, self.resident.blocks, self.resident.displaced)
        else:
            data.copy_(self.base(data))
        self.resident = None  # last: an interrupt during the write must leave it to be restored

    @contextlib.contextmanager
    def _own_write(self, weight: Tensor) -> Iterator[Tensor]:
        """The weight's data, to be written to; writes to it do not move `base_version`."""
        before = version_of(weight)
        with torch.no_grad():
            yield weight.detach()
        self.own_writes += version_of(weight) - before


def displaced_by(changes: Sequence[Change], base: Tensor) -> tuple[Tensor | None, Tensor]:
    """What writing `changes` into `base` overwrites: blocks (None: all), and the base's values there."""
    masks = [change.blocks for change in changes]
    if any(blocks is None for blocks in masks):
        return None, base.clone()
    if len(changes) == 1:
        blocks = changes[0].blocks
        assert blocks is not None
        return blocks.clone(), kernels.gather(base, blocks, kernels.block_of(changes[0].values))
    union = torch.unique(torch.cat([entries(change, base.shape).long() for change in changes]))
    return union.to(index_dtype(base.numel())), kernels.gather(base, union)
