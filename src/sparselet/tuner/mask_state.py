"""What is known of an adapter's mask on one target beside its indices, and how a random one is drawn."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class MaskState:
    """What is known of one adapter's mask on one target, beside its indices.

    dense: no mask yet, all entries are trained; the parameter then has the weight's shape.
    selecting: the selection phase has not ended.
    pending: Ŵ of all entries, float32 [rows, columns], while off-mask values may still return; else None.
    selections: how often the mask was selected.
    """

    block_size: int
    dense: bool
    selecting: bool
    pending: Tensor | None = None
    selections: int = 0

    @property
    def unread(self) -> bool:
        """Whether the adapter was added by a saved configuration whose tensors have not been loaded."""
        return not self.selecting and not self.selections


def random_blocks(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` ascending blocks of `total`, int64, drawn on the CPU, so that the mask is the same on every device."""
    return torch.rand(total, generator=generator).topk(count).indices.sort().values


def seeded(seed: int, *salt: object) -> torch.Generator:
    """A CPU generator that depends on the seed and the salt only, not on process, order or hash seed."""
    digest = hashlib.sha256(repr((seed, *salt)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
