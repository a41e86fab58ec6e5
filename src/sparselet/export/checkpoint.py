"""A base model with an adapter merged into it, as a plain checkpoint."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparselet.delta import SparseDelta
from sparselet.export.targets import refuse_modules
from sparselet.files import atomic_directory
from sparselet.resident import absorb, applied


def export_checkpoint(
    model: Any,
    tokenizer: Any,
    adapter: Mapping[str, SparseDelta],
    output: str | Path,
    max_shard_size: str = "5GB",
    keep_base: bool = True,
) -> Path:
    """Write W + ΔW as sharded safetensors that `AutoModelForCausalLM.from_pretrained` loads without sparselet.

    model, tokenizer: a transformers base model and its tokenizer. keep_base: leave the model as it was; otherwise it is
    W + ΔW afterwards, and nothing of W is kept beside it.
    Raises what `resident.applied` raises, ExportError (modules trained in full), OutputExists, WriteFailed.
    """
    refuse_modules(adapter)
    with atomic_directory(output) as directory:
        write_checkpoint(model, tokenizer, adapter, directory, max_shard_size, keep_base)
    return Path(output)


def write_checkpoint(
    model: Any,
    tokenizer: Any,
    adapter: Mapping[str, SparseDelta],
    directory: Path,
    max_shard_size: str = "5GB",
    keep_base: bool = True,
) -> None:
    """Write the checkpoint's files into a directory that is there already."""
    with contextlib.ExitStack() as stack:
        if keep_base:
            stack.enter_context(applied(model, adapter))
        else:
            absorb(model, adapter)
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(directory)
