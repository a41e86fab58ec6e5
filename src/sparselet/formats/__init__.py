"""Every kind of expert as a mapping from target names to deltas, read target by target."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sparselet.adapter import CONFIG_FILE, AdapterFile
from sparselet.errors import ConfigError, MissingFile, UnsupportedExpert
from sparselet.expert import Expert
from sparselet.formats.base_model import BaseModel
from sparselet.formats.checkpoint.model_files import MODEL_CONFIG
from sparselet.formats.checkpoint.read import CheckpointFile
from sparselet.formats.convert import save_expert
from sparselet.formats.expert import ExpertFile, SomeTargets, leave_out
from sparselet.formats.lora.read import LoraFile
from sparselet.formats.single_entries.read import SHIRA, SUPER_TUNING, EntriesFile
from sparselet.hub.sources import local_directory
from sparselet.io.json_files import read_object
from sparselet.io.paths import check_inside
from sparselet.names import unwrapped

__all__ = [
    "BaseModel",
    "CheckpointFile",
    "EntriesFile",
    "ExpertFile",
    "LoraFile",
    "open_expert",
    "save_expert",
]

Reader = Callable[[Path, Mapping[str, Any], BaseModel | None, Sequence[str]], Expert]

READABLE = "sparse adapters (SPARSELET), PEFT's LORA, SHIRA and SUPERTUNING, and full checkpoints (config.json)"


def open_expert(path: str | Path, base: str | Path | BaseModel | None = None, without: Sequence[str] = ()) -> Expert:
    """Open an expert of any kind for reading target by target.

    path: a directory, or a hub name `org/name` or `org/name@revision`. A directory with adapter_config.json is an adapter,
        whose peft_type tells the kind; one with config.json a full checkpoint.
    base: the base model, a directory or hub name, or one that is open already. Full checkpoints need it, SHiRA and
        Super-Tuning adapters that sparselet did not write, and LoRAs whose layers may lie in two ways. Where it is given,
        targets are called as it calls them, and are refused if it has none such.
    without: patterns of targets (`*.lm_head`) that are not read; they stand in the expert's `left_out`.

    Everything that configuration and headers tell is checked at once. Raises ConfigError (the base model is needed),
    ArgumentError (a pattern that matches nothing), UnsupportedExpert (a kind that is not read, a weight that layers share),
    UnknownTarget, WrongBase, ModelError (hub, base model), MissingFile, and what the kind raises.
    """
    directory = _directory(path)
    base = base if base is None or isinstance(base, BaseModel) else BaseModel(base)
    if (directory / CONFIG_FILE).exists():
        return _open_adapter(directory, base, without)
    if not (directory / MODEL_CONFIG).exists():
        raise MissingFile(f"{path} holds neither {CONFIG_FILE} nor {MODEL_CONFIG}. What can be read: {READABLE}.")
    if base is None:
        raise ConfigError(f"{path} is a full checkpoint, which is an expert only against its base model; set `base` to that.")
    checkpoint = CheckpointFile(directory, base)
    left_out = leave_out(checkpoint, without)
    return SomeTargets(checkpoint, {n: n for n in checkpoint if n not in left_out}, left_out) if left_out else checkpoint


def _open_adapter(directory: Path, base: BaseModel | None, without: Sequence[str]) -> Expert:
    file = check_inside(directory, CONFIG_FILE)
    config = read_object(file)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in ADAPTERS:
        raise UnsupportedExpert(f"{file}: peft_type is {kind!r:.60}. What can be read: {READABLE}.")
    return ADAPTERS[kind](directory, config, base, without)


def _open_sparse(directory: Path, config: Mapping[str, Any], base: BaseModel | None, without: Sequence[str]) -> Expert:
    """A sparse adapter under the base model's names. Raises UnknownTarget, UnsupportedExpert, WrongBase, ArgumentError."""
    adapter = AdapterFile(directory)
    left_out = leave_out(adapter, without)
    kept = [name for name in adapter if name not in left_out]
    if base is None:
        names = {name: unwrapped(name) for name in kept}
    else:
        names = base.targets(kept, str(adapter.path))
        base.check_shapes({names[name]: adapter.shapes[name] for name in kept}, str(adapter.path))
    if not left_out and all(name == target for name, target in names.items()):
        return adapter
    return SomeTargets(adapter, {target: name for name, target in names.items()}, left_out)


def _directory(path: str | Path) -> Path:
    """The local directory of a path or hub name. Raises MissingFile, ModelError."""
    directory = local_directory(path)
    if directory is None:
        raise MissingFile(f"{path} is not a directory; an expert is a directory or a hub name. What can be read: {READABLE}.")
    return directory


# By peft_type: opens a directory, of whose adapter_config.json `config` is the content.
ADAPTERS: dict[str, Reader] = {
    "SPARSELET": _open_sparse,
    "LORA": LoraFile,
    "SHIRA": partial(EntriesFile, layout=SHIRA),
    "SUPERTUNING": partial(EntriesFile, layout=SUPER_TUNING),
}
