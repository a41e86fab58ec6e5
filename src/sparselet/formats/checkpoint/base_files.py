"""What belongs to a base model beside its weights: its tokenizer, chat template, generation settings, licence, as they are."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from sparselet.errors import UnsafePath

# Weights in any form, which a merged checkpoint has of its own.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".npz")
_INDEX = ".index.json"
# What is written anew for the checkpoint, or records how the base came about.
_OWN = ("config.json", "adapter_config.json", "recipe.toml", "search.json", "run.json")


def copy_base_files(base: Path, directory: Path) -> None:
    """Copy a base model's files into `directory`, byte for byte, but for weights, config.json and hidden ones.

    Files already there are replaced. Raises UnsafePath for a link that leaves the base model's directory; those into the blobs
    of the hub's cache, of which its directories consist, do not.
    """
    for file in _files(base):
        if file.parent == base and file.name in _OWN:
            continue
        target = directory / file.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_inside(file, base), target)


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "checkpoint-")):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        elif path.is_file() and not path.name.endswith((*_WEIGHTS, _INDEX)):
            yield path


def _inside(file: Path, base: Path) -> Path:
    """What is read for a file. Raises UnsafePath."""
    home, place = base.resolve(), file.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not place.is_relative_to(home) and not place.is_relative_to(blobs):
        raise UnsafePath(f"{file} is a symbolic link that leaves the base model's directory. Copy the file itself there.")
    return place
