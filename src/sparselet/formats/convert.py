"""Any expert as a sparse adapter on the disk."""

from collections.abc import Callable
from pathlib import Path

import torch

from sparselet.adapter_stream import adapter_stream
from sparselet.errors import UnsupportedExpert
from sparselet.expert import Expert
from sparselet.io.atomic import atomic_directory


def save_expert(expert: Expert, output: str | Path, progress: Callable[[str], None] | None = None) -> Path:
    """Write an expert of any kind as a sparse adapter directory, one target in memory at a time; values as float32.

    progress: called with each target's name when it is written.
    Raises UnsupportedExpert (it trained modules in full), OutputExists, WriteFailed, and what reading the expert raises.
    """
    if expert.trained_modules:
        raise UnsupportedExpert(f"the expert trained {', '.join(expert.trained_modules)} in full, which is not converted.")
    with atomic_directory(output) as directory:
        with adapter_stream(directory, expert) as stream:
            for name in sorted(expert):
                stream.add(name, expert[name].to(torch.float32))
                if progress is not None:
                    progress(name)
        stream.describe(expert.metadata, expert.fingerprints)
    return Path(output)
