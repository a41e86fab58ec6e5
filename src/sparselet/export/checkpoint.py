"""A base model with an adapter merged into it, as a plain checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparselet.delta import SparseDelta
from sparselet.files import atomic_directory
from sparselet.resident import applied


def export_checkpoint(
    model: Any, tokenizer: Any, adapter: Mapping[str, SparseDelta], output: str | Path, max_shard_size: str = "5GB"
) -> Path:
    """Write W + ΔW as sharded safetensors that `AutoModelForCausalLM.from_pretrained` loads without sparselet.

    model, tokenizer: a transformers base model and its tokenizer; the model is as before afterwards.
    Raises what `resident.applied` raises, OutputExists, WriteFailed.
    """
    with atomic_directory(output) as directory, applied(model, adapter):
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(directory)
    return Path(output)
