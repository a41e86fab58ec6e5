"""Any expert as a sparse adapter on the disk."""

from collections.abc import Callable
from pathlib import Path

import torch

from sparselet.adapter import expert_profile
from sparselet.adapter_stream import adapter_stream
from sparselet.errors import UnsupportedExpert
from sparselet.expert import Expert
from sparselet.io.atomic import atomic_directory
from sparselet.profiles.file import PROFILE_FILE, write_profile


def save_expert(expert: Expert, output: str | Path, progress: Callable[[str], None] | None = None) -> Path:
    """Write an expert of any kind as a sparse adapter directory, one target in memory at a time; values as float32.

    Its profile is copied. progress: called with each target's name when it is written.
    Raises UnsupportedExpert (it trained modules in full), OutputExists, WriteFailed, and what reading the expert raises.
    """
    if expert.trained_modules:
        raise UnsupportedExpert(f"the expert trained {', '.join(expert.trained_modules)} in full, which is not converted.")
    profile = expert_profile(expert)
    with atomic_directory(output) as directory:
        with adapter_stream(directory, expert) as stream:
            for name in sorted(expert):
                stream.add(name, expert[name].to(torch.float32))
                if progress is not None:
                    progress(name)
        stream.describe(expert.metadata, expert.fingerprints)
        if profile is not None:
            write_profile(profile, directory / PROFILE_FILE)
    return Path(output)
