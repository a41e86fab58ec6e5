"""Any expert as a sparse adapter on the disk."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sparselet.adapter_stream import adapter_stream
from sparselet.delta import SparseDelta
from sparselet.errors import UnsupportedExpert
from sparselet.io.files import atomic_directory


def save_expert(expert: Mapping[str, SparseDelta], output: str | Path, progress: Callable[[str], None] | None = None) -> Path:
    """Write an expert of any kind as a sparse adapter directory, one target in memory at a time; values as float32.

    progress: called with each target's name when it is written.
    Raises UnsupportedExpert (it trained modules in full), OutputExists, WriteFailed, and what reading the expert raises.
    """
    metadata = getattr(expert, "metadata", {})
    if metadata.get("modules_to_save"):
        raise UnsupportedExpert(f"the expert trained {', '.join(metadata['modules_to_save'])} in full, which is not converted.")
    with atomic_directory(output) as directory:
        with adapter_stream(directory, expert) as stream:
            for name in sorted(expert):
                stream.add(name, expert[name].to(torch.float32))
                if progress is not None:
                    progress(name)
        stream.describe(metadata, getattr(expert, "fingerprints", {}))
    return Path(output)
