"""Every kind of expert as a mapping from target names to deltas, read target by target."""

import re
from pathlib import Path

from sparselet import hub
from sparselet.adapter import CONFIG_FILE, AdapterFile
from sparselet.errors import ConfigError, MissingFile, UnsupportedExpert
from sparselet.experts.checkpoint import CheckpointFile
from sparselet.experts.convert import save_expert
from sparselet.experts.entries import SHIRA, SUPER_TUNING, EntriesFile
from sparselet.experts.expert import ExpertFile
from sparselet.experts.lora import LoraFile
from sparselet.experts.model_files import MODEL_CONFIG, ModelFiles
from sparselet.files import check_inside, read_object

__all__ = ["CheckpointFile", "EntriesFile", "Expert", "ExpertFile", "LoraFile", "open_expert", "save_expert"]

Expert = AdapterFile | ExpertFile

KINDS = "sparse adapters (SPARSELET), PEFT's LORA, SHIRA and SUPERTUNING, and full checkpoints (config.json)"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@.+)?", re.ASCII)


def open_expert(path: str | Path, base: str | Path | None = None) -> Expert:
    """Open an expert of any kind for reading target by target.

    path: a directory, or a hub name `org/name` or `org/name@revision`. A directory with adapter_config.json is an adapter,
        whose peft_type tells the kind; one with config.json a full checkpoint.
    base: the base model, a directory or hub name. Full checkpoints need it, and SHiRA and Super-Tuning adapters that
        sparselet did not write.

    Everything that configuration and headers tell is checked at once. Raises ConfigError (the base model is needed),
    UnsupportedExpert (a kind that is not read), ModelError (hub), MissingFile, and what the kind raises.
    """
    directory = _directory(path)
    if (directory / CONFIG_FILE).exists():
        return _open_adapter(directory, base)
    if not (directory / MODEL_CONFIG).exists():
        raise MissingFile(f"{path} holds neither {CONFIG_FILE} nor {MODEL_CONFIG}. What can be read: {KINDS}.")
    if base is None:
        raise ConfigError(
            f"{path} is a full checkpoint, which is an expert only against its base model; give that with --model (in Python: "
            "base)."
        )
    return CheckpointFile(directory, ModelFiles(_directory(base)), str(base))


def _open_adapter(directory: Path, base: str | Path | None) -> Expert:
    file = check_inside(directory, CONFIG_FILE)
    config = read_object(file)
    match config.get("peft_type"):
        case "SPARSELET":
            return AdapterFile(directory)
        case "LORA":
            expert = LoraFile(directory, config)
            if base is not None and expert.on_output_layer:
                expert.refuse_tied(ModelFiles(_directory(base)))
            return expert
        case ("SHIRA" | "SUPERTUNING") as kind:
            model = None if base is None else ModelFiles(_directory(base))
            return EntriesFile(directory, config, SHIRA if kind == "SHIRA" else SUPER_TUNING, model)
        case other:
            raise UnsupportedExpert(f"{file}: peft_type is {other!r:.60}. What can be read: {KINDS}.")


def _directory(path: str | Path) -> Path:
    """The local directory of a path or hub name. Raises MissingFile, ModelError."""
    if Path(path).is_dir():
        return Path(path)
    if not Path(path).exists() and _HUB_NAME.fullmatch(str(path)) and not str(path).startswith("."):
        return hub.fetch(str(path))
    raise MissingFile(f"{path} is not a directory; an expert is a directory or a hub name. What can be read: {KINDS}.")
