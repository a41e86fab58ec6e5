"""The files that an adapter or a checkpoint consists of, and the check that a directory holds them whole."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from sparselet.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, expert_profile, require_finite
from sparselet.errors import BadConfig, ModelError
from sparselet.io.json_files import read_object
from sparselet.io.paths import check_inside
from sparselet.io.tensor_files import TensorFile
from sparselet.profiles.file import PROFILE_FILE, read_profile
from sparselet.profiles.profile import Profile

CARD_FILE = "README.md"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, "run.json", "merge_counts.safetensors", PROFILE_FILE, CARD_FILE)
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "run.json",
    CARD_FILE,
)


def check_directory(path: str | Path) -> str:
    """Check that a directory is complete, and return what it holds.

    "sparse adapter": read in full. "LORA adapter", or another PEFT method: configuration and all tensors are read.
    "checkpoint": configuration, headers and sizes of all weights are read. Raises FormatError.
    """
    path = Path(path)
    if (path / CONFIG_FILE).exists() or not (path / "config.json").is_file():
        method = _peft_type(path)
        if method != "SPARSELET":
            file = TensorFile(check_inside(path, WEIGHTS_FILE))
            for name in file.shapes:
                require_finite(file.read(name), f"{file.path}: {name}")
            if (path / PROFILE_FILE).exists():
                _read_all(read_profile(check_inside(path, PROFILE_FILE)))
            return f"{method} adapter"
        adapter = AdapterFile(path)
        for name in adapter:
            adapter[name]
        for name, tensor in adapter.read_modules().items():
            require_finite(tensor, f"{path / WEIGHTS_FILE}: {name}")
        profile = expert_profile(adapter)
        if profile is not None:
            _read_all(profile)
        return "sparse adapter"
    read_object(check_inside(path, "config.json"))
    parts = {file.name for file in path.glob("*.safetensors")} - {PROFILE_FILE}
    for index in sorted(path.glob("*.safetensors.index.json")):
        listed = read_object(check_inside(path, index.name)).get("weight_map")
        if not isinstance(listed, dict):
            raise BadConfig(f"{index}: weight_map is {type(listed).__name__}; expected an object.")
        parts |= {str(part) for part in listed.values()}
    for part in sorted(parts) or ["model.safetensors"]:
        TensorFile(check_inside(path, part))
    if (path / PROFILE_FILE).exists():
        _read_all(read_profile(check_inside(path, PROFILE_FILE)))
    return "checkpoint"


def choose_files(name: str, present: Sequence[str]) -> list[str]:
    """The files of a repository that its adapter, or else its checkpoint, consists of. Raises ModelError."""
    patterns = ADAPTER_FILES if CONFIG_FILE in present else CHECKPOINT_FILES
    needed = (CONFIG_FILE, WEIGHTS_FILE) if CONFIG_FILE in present else ("config.json", "*.safetensors")
    chosen = sorted(f for f in present if "/" not in f and any(fnmatch.fnmatchcase(f, pattern) for pattern in patterns))
    absent = [pattern for pattern in needed if not fnmatch.filter(chosen, pattern)]
    if absent:
        raise ModelError(
            f"{name} has no {absent[0]}, so it is neither an adapter ({CONFIG_FILE}, {WEIGHTS_FILE}) nor a checkpoint in "
            "safetensors; no other kind of file is read."
        )
    return chosen


def _read_all(profile: Profile) -> None:
    """Read every moment of a profile once. Raises BadProfile, NonFiniteValue."""
    for name in profile.moments:
        profile.moments[name]


def _peft_type(path: Path) -> str:
    """The peft_type of an adapter directory; SPARSELET if it has no valid one, so that `AdapterFile` reports the error."""
    file = check_inside(path, CONFIG_FILE)
    method = read_object(file).get("peft_type") if file.is_file() else None
    return method if isinstance(method, str) and method.isidentifier() else "SPARSELET"
