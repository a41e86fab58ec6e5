"""The state of an adapter's mask on one target besides its indices, and random masks."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselet.errors import SelectionError
from sparselet.kernels import Block


@dataclass
class MaskState:
    """The state of one adapter's mask on one target, besides its indices.

    block: rows and columns of a block that the mask chooses.
    dense: no mask yet, all entries are trained; the parameter then has the weight's shape.
    selecting: the selection phase has not ended.
    pending: Ŵ of all entries, float32 [rows, columns], while off-mask values may still return; else None.
    selections: the number of selections so far.
    excluded: blocks that no selection may choose, ascending; None for none.
    """

    block: Block
    dense: bool
    selecting: bool
    pending: Tensor | None = None
    selections: int = 0
    excluded: Tensor | None = None

    @property
    def unread(self) -> bool:
        """Whether the adapter was added by a saved configuration whose tensors have not been loaded."""
        return not self.selecting and not self.selections

    def require_read(self, adapter: str, target: str) -> None:
        """Raise SelectionError for an adapter whose tensors have not been loaded."""
        if self.unread:
            raise SelectionError(
                f"{target}: adapter {adapter!r} was added by its configuration alone; its tensors were not loaded. "
                "transformers' load_adapter, from_pretrained and pipeline load tensors without the checks of the format; call "
                "peft.PeftModel.from_pretrained(model, path) on the base model instead, or "
                f"peft.AutoPeftModelForCausalLM.from_pretrained(path). model.delete_adapter({adapter!r}) removes it."
            )


def random_blocks(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` ascending blocks of `total`, int64, drawn on the CPU, so that the mask is the same on every device."""
    return torch.rand(total, generator=generator).topk(count).indices.sort().values


def seeded(seed: int, *salt: object) -> torch.Generator:
    """A CPU generator that depends on the seed and the salt only, not on process, call order or hash seed."""
    digest = hashlib.sha256(repr((seed, *salt)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
