"""Prefill on CUDA by PyTorch's compiled `flex_attention`, where a table keeps or drops whole blocks of keys.

On the CPU it works too, and is no faster than `keys.attend`, which needs no compiling (benchmarks/bench_attention.py).
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparselet.io.printable import reason

logger = logging.getLogger("sparselet")

COMPILED_ON = ("cuda",)
MIN_KEYS = 1024  # shorter prompts are not worth the seconds of compiling
_unable: set[str] = set()  # types of devices on which compiling has failed


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, block: int, mask: Tensor | None, scaling: float | None
) -> tuple[Tensor, int, int] | None:
    """What `keys.attend` gives, from a kernel that visits the kept blocks alone; None where it does not apply.

    It applies to prompts of at least MIN_KEYS tokens without padding and without a cached beginning, on devices that compile,
    where no gradient is needed and each block of queries sees whole blocks of `block` keys. The only mask inside a block is
    causality: masks that read tensors do not compile for the CPU in all lengths at once.
    """
    whole = mask is None and query.shape[2] == key.shape[2] >= MIN_KEYS
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if not whole or needs_gradient or query.device.type in _unable:
        return None
    kept = _whole_blocks(seen, block)
    if kept is None:
        return None
    own = torch.eye(kept.shape[2], dtype=torch.bool, device=kept.device)
    group = query.shape[1] // key.shape[1]
    by_query = kept.repeat_interleave(group, dim=1)
    partial, full = _listed(by_query & own), _listed(by_query & ~own)
    lengths = (query.shape[2], key.shape[2])
    blocks = BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=block, mask_mod=_causal, seq_lengths=lengths)
    try:
        output = _compiled()(query, key, value, block_mask=blocks, scale=scaling, enable_gqa=True)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # no compiler, or blocks that this version of torch has no kernel for
        logger.warning(
            "flex_attention does not compile for %s; keys are gathered instead: %s", query.device.type, reason(error)
        )
        _unable.add(query.device.type)
        return None
    rows = torch.full((kept.shape[2],), block, device=kept.device)
    rows[-1] = query.shape[2] - block * (kept.shape[2] - 1)
    earlier = block * rows * (kept & ~own).sum(dim=(0, 1, 3))
    diagonal = (kept & own).sum(dim=(0, 1, 3))
    used = group * int((earlier + diagonal * rows * (rows + 1) // 2).sum())
    return output, used, group * int((earlier + diagonal * rows * rows).sum())


def _whole_blocks(seen: Tensor, block: int) -> Tensor | None:
    """The kept blocks [batch, key heads, blocks, blocks] up to the diagonal; None for a table that parts a block."""
    blocks = seen.shape[2]
    parts = torch.nn.functional.pad(seen, (0, -seen.shape[3] % block)).unflatten(3, (blocks, block))
    kept = seen[..., ::block].tril()
    last = seen[:, :, -1, (blocks - 1) * block :]
    is_whole = bool((parts[..., : blocks - 1, :] == parts[..., : blocks - 1, :1]).all()) and bool((last == last[..., :1]).all())
    return kept if is_whole else None


def _listed(kept: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row keeps, and which, in the front of a row's indices."""
    order = kept.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    return kept.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
