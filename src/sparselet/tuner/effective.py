"""The weight of a pass: a target's base weight plus the changes of its active adapters.

The rules of residence. They hold whatever PEFT, torch or other code does in between (`tests/tuner/test_any_sequence.py`):

1. The base layer's own weight is the base model's, bit for bit, for all code that reads, copies, averages, saves or loads it.
   Only `merge`, and a lease within one `generate`, write into it; displaced values are kept and restored bit for bit.
2. Each pass builds its weight from the current values and mask, whatever changed them: an optimizer's step, `.data`,
   `load_state_dict`. No change has to be announced.
3. A backward pass differentiates at the weight of its forward pass, whatever was written in between: it keeps the values of
   its mask. A change of anything it does not keep (dense values, base weights, the mask of a gradient) raises an error.
4. The values and masks that are saved are those that passes use.

A pass holds the built weight of one target at a time. The weight is not kept for the backward pass, which builds it again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparselet import kernels


@dataclass(frozen=True)
class Change:
    """One adapter's change of a target in one pass.

    blocks: ascending ids [n] of the blocks in the mask, None for all entries. values: [n], [n, h, w] for larger blocks, or
    [rows, columns] for all entries. trained: whether the values get a gradient. off_mask: Ŵ [rows, columns] of the entries
    outside of the mask, while masks are selected; its values at the mask are ignored.
    """

    blocks: Tensor | None
    values: Tensor
    trained: bool = False
    off_mask: Tensor | None = None

    def snapshot(self) -> "Change":
        """The same change with a copy of its values; dense values are not copied."""
        if self.blocks is None:
            return self
        return replace(self, values=self.values.detach().clone())


def effective_weight(base: Tensor, changes: Sequence[Change]) -> Tensor:
    """W + ΣΔW [rows, columns] as a new tensor, summed in the widest dtype of all and rounded once to the base's."""
    if len(changes) == 1 and changes[0].blocks is not None and changes[0].off_mask is None:
        return kernels.add_at(base, changes[0].blocks, changes[0].values)
    total = base.to(_widest(base, changes), copy=True, memory_format=torch.contiguous_format)
    for change in changes:
        if change.blocks is None:
            total += change.values
        elif change.off_mask is None:
            total.view(-1).index_add_(0, entries(change, total.shape), change.values.reshape(-1).to(total.dtype))
        else:
            dense = change.off_mask.to(total.device, copy=True)
            kernels.write(dense, change.blocks, change.values)
            total += dense
    return total.to(base.dtype)


def differentiable_weight(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """`effective_weight` by torch's own operations, for autograd and torch.compile. No change has an `off_mask`."""
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
    """The flat ids of a mask's entries, int [n] or [n·h·w], in the order of its values."""
    assert change.blocks is not None
    if change.values.ndim == 1:
        return change.blocks
    return kernels.block_entries(change.blocks, (shape[0], shape[1]), kernels.block_of(change.values)).reshape(-1)


def _widest(base: Tensor, changes: Sequence[Change]) -> torch.dtype:
    dtype = base.dtype
    for change in changes:
        dtype = torch.promote_types(dtype, change.values.dtype)
    return dtype
