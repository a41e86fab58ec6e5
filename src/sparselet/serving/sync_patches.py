"""`SyncPatches`: a weight patch after every few steps of a `Trainer`, for an engine that generates meanwhile."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparselet.errors import ConfigError
from sparselet.fingerprint import fingerprint_weight
from sparselet.formats.weight_patch import PatchedTarget, write_patch
from sparselet.io.json_files import read_object, write_json
from sparselet.names import WEIGHT
from sparselet.tuner.adapted import active_adapters, require_layers, unadapted_weight

logger = logging.getLogger("sparselet")

LATEST_FILE = "latest.json"


class SyncPatches(TrainerCallback):
    """Writes the active sparse adapter as a weight patch, `DIRECTORY/patch-STEP`, after every `interval` optimizer steps.

        GRPOTrainer(model=peft_model, callbacks=[SyncPatches("patches", interval=1)], ...)

    Nothing is compared with an earlier copy of the weights: the adapter knows what changed. A patch also sets entries that left
    the mask since the patch before back to their base values, so an engine takes each patch in turn: `previous` in patch.json
    is the version that it must have, null the base weights. An engine that has another one takes the reverse patch of the
    version that it has, and then the newest patch. `latest.json` names the newest and is written after it.

    directory: new, or of the run that is resumed. interval: steps. dtype: of the values, the engine's or a wider one. keep:
    patches that stay on the disk. names: of a target's tensor in the checkpoint, where it is not the target's name with
    `.weight`.
    Raises ConfigError for numbers below 1.
    """

    def __init__(
        self,
        directory: str | Path,
        interval: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        keep: int = 4,
        names: Mapping[str, str] | None = None,
    ) -> None:
        if interval < 1 or keep < 1:
            raise ConfigError(f"interval and keep must be at least 1, got {interval} and {keep}.")
        self.directory, self.interval, self.dtype, self.keep = Path(directory), interval, dtype, keep
        self.names = dict(names or {})
        self._before: dict[str, Tensor] = {}
        self._version: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write a patch if this step is due. Raises what `write_patch` raises."""
        if state.global_step % self.interval == 0 and state.is_world_process_zero:
            self.write(kwargs["model"], state.global_step)

    def write(self, model: torch.nn.Module, version: int) -> Path:
        """Write the patch of the adapter as it is now. The first one of a process starts from the base weights."""
        adapter = active_adapters(model)[0]
        targets, fingerprints = {}, {}
        for target, layer in require_layers(model, adapter).items():
            name = self.names.get(target, target + WEIGHT)
            base = unadapted_weight(layer)
            targets[name] = PatchedTarget(base, layer.delta(adapter), self._before.get(name))
            fingerprints[name] = fingerprint_weight(base)
        path = self.directory / f"patch-{version}"
        if path.exists():  # a resumed run repeats the step
            shutil.rmtree(path)
        write_patch(path, targets, fingerprints, self.dtype, version, self._version)
        write_json(self.directory / LATEST_FILE, {"version": version, "path": path.name, "previous": self._version})
        self._before = {name: target.delta.expand().indices.clone() for name, target in targets.items()}
        self._version = version
        self._remove_old(version)
        return path

    def _remove_old(self, version: int) -> None:
        """Remove all but the newest patches; those of later steps are of a run that was resumed before them."""
        steps = {int(text): path for path in self.directory.glob("patch-*") if (text := path.name[6:]).isdigit()}
        kept = sorted(step for step in steps if step <= version)[-self.keep :]
        for step, path in steps.items():
            if step not in kept:
                shutil.rmtree(path, ignore_errors=True)


def latest_patch(directory: str | Path) -> Path:
    """The newest patch in a directory. Raises MissingFile."""
    return Path(directory) / str(read_object(Path(directory) / LATEST_FILE).get("path"))
