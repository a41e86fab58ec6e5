"""`train`: one sparse expert, or a baseline to compare it with."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from sparselet.adapter import SparseAdapter
from sparselet.errors import ConfigError
from sparselet.training import Trained, TrainSettings
from sparselet.training import train as train_to
from sparselet.training_recipes import with_recipe

IN_MEMORY = ("sparse", "full-qkv")  # the methods whose result is a sparse adapter


def train(
    task: str | Sequence[str] | TrainSettings,
    *,
    recipe: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    base: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> SparseAdapter | Trained:
    """Train an expert on one task or several.

        expert = sl.train("trec", model="HuggingFaceTB/SmolLM2-135M-Instruct", epochs=2)
        expert.metadata.metrics

    task: directories, `builtin:NAME` or hub data sets; or all settings as one `TrainSettings`.
    settings: fields of `TrainSettings`. recipe: the name of one of RECIPES, for the settings that are not given.
    out: the directory to write to, where `resume` can continue a stopped run; by default the expert is kept in memory and no
        file remains.
    base: the base model and tokenizer, if they are loaded. callbacks: of transformers' Trainer, such as a progress bar.

    Returns the adapter, its figures in `metadata.metrics`; a `Trained` for methods that write a LoRA or a checkpoint.
    Raises ConfigError and what `training.train` raises.
    """
    if isinstance(task, TrainSettings):
        if settings or recipe:
            raise ConfigError(
                f"{min([*settings, *(['recipe'] if recipe else [])])} is given beside TrainSettings; set it there."
            )
        chosen = task
    else:
        unknown = sorted(settings.keys() - TrainSettings.__dataclass_fields__.keys())
        if unknown:
            raise ConfigError(f"train has no setting {unknown[0]!r}; TrainSettings lists all.")
        names = task if isinstance(task, str) else tuple(task)
        chosen = TrainSettings(**with_recipe(recipe, {**settings, "task": names}))
    if out is not None:
        return train_to(chosen, out, resume=resume, base=base, callbacks=callbacks)
    if chosen.method not in IN_MEMORY:
        raise ConfigError(f"method {chosen.method} writes a directory; set `out`.")
    if resume:
        raise ConfigError("a run without a directory cannot be resumed; set `out` with `resume`.")
    with tempfile.TemporaryDirectory() as directory:
        return train_to(chosen, Path(directory) / "expert", base=base, callbacks=callbacks)
