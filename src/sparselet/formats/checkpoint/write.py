"""A base model with an adapter merged into it, as a plain checkpoint."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparselet.apply import apply_in_place, apply_temporarily
from sparselet.expert import Expert, ExpertOrDeltas
from sparselet.formats.checkpoint.base_files import copy_base_files
from sparselet.formats.linear_targets import refuse_modules
from sparselet.io.atomic import atomic_directory
from sparselet.model_config import optional_field

_GENERATION = "generation_config.json"


def export_checkpoint(
    model: Any,
    tokenizer: Any,
    adapter: ExpertOrDeltas,
    output: str | Path,
    max_shard_size: str = "5GB",
    keep_base: bool = True,
    *,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
) -> Path:
    """Write W + ΔW as sharded safetensors that `AutoModelForCausalLM.from_pretrained` loads without sparselet.

    model: a transformers base model. tokenizer: saved beside the weights; None where `base` brings it. keep_base: leave the
    model as it was; otherwise it is W + ΔW afterwards, and nothing of W is kept beside it.
    dtype: what the weights are rounded to, once, from the sum in float32; by default the model's own dtype. Load the model in
    the dtype of its files or a wider one, or the base is rounded before the sum.
    base: the base model's directory, of which all other files are copied as they are.
    Raises what `apply_temporarily` raises (NonFiniteValue where the dtype cannot hold W + ΔW), ExportError (modules trained in
    full), UnsafePath, OutputExists, WriteFailed.
    """
    expert = refuse_modules(adapter)
    with atomic_directory(output) as directory:
        write_checkpoint(model, tokenizer, expert, directory, max_shard_size, keep_base, dtype=dtype, base=base)
    return Path(output)


def write_checkpoint(
    model: Any,
    tokenizer: Any,
    adapter: Expert,
    directory: Path,
    max_shard_size: str = "5GB",
    keep_base: bool = True,
    *,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
) -> None:
    """Write the checkpoint's files into a directory that is there already."""
    with contextlib.ExitStack() as stack:
        if not keep_base:
            apply_in_place(model, adapter, dtype)
        elif dtype is None:
            stack.enter_context(apply_temporarily(model, adapter))
        else:
            stack.enter_context(_given_back(model))
            apply_in_place(model, adapter, dtype)
        own = model.config.dtype, optional_field(model, "generation_config")
        if base is not None and (Path(base) / _GENERATION).is_file() and own[1] is not None:
            model.generation_config = type(own[1])()  # the base's own is copied, even if transformers would refuse to save it
        try:
            model.save_pretrained(directory, max_shard_size=max_shard_size)
        finally:
            if keep_base:
                model.config.dtype = own[0]
            model.generation_config = own[1]
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        if base is not None:
            copy_base_files(Path(base), directory)


@contextlib.contextmanager
def _given_back(model: Any) -> Iterator[None]:
    """Afterwards the parameters hold the tensors that they held before, which the block replaces and does not change."""
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, tensor in before:
            parameter.data = tensor
