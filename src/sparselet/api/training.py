"""`train`: one sparse expert, or a baseline to compare it with."""

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from sparselet.adapter import SparseAdapter
from sparselet.errors import ConfigError
from sparselet.evaluation.metrics import Metric
from sparselet.training import Trained, TrainSettings
from sparselet.training import train as train_to
from sparselet.training.methods import FAST_SLOW
from sparselet.training_recipes import with_recipe
from sparselet.workflows.fast_slow import fast_slow as train_fast_slow
from sparselet.workflows.fast_slow_settings import FastSlowSettings
from sparselet.workflows.proposers import Proposer

IN_MEMORY = ("sparse", "full-qkv", FAST_SLOW)  # the methods whose result is a sparse adapter


def train(
    task: str | Sequence[str] | TrainSettings,
    *,
    recipe: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    base: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    fast_slow: FastSlowSettings | None = None,
    reward: Metric | None = None,
    proposer: Proposer | None = None,
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
    fast_slow: of method fast-slow, its settings (docs/fast-slow.md). reward, proposer: functions in the place of those that
        they name.

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
    if chosen.method == FAST_SLOW:
        if resume:
            raise ConfigError(f"resume does not apply to method {FAST_SLOW}, which keeps no checkpoints.")
        how = fast_slow or FastSlowSettings()
        with contextlib.nullcontext(out) if out is not None else tempfile.TemporaryDirectory() as place:
            output = Path(place) if out is not None else Path(place, "expert")
            return train_fast_slow(chosen, how, output, reward=reward, proposer=proposer, base=base, callbacks=callbacks)
    if fast_slow is not None or reward is not None or proposer is not None:
        raise ConfigError(f"method is {chosen.method}; prompts, rewards and proposers are of method {FAST_SLOW}.")
    if out is not None:
        return train_to(chosen, out, resume=resume, base=base, callbacks=callbacks)
    if chosen.method not in IN_MEMORY:
        raise ConfigError(f"method {chosen.method} writes a directory; set `out`.")
    if resume:
        raise ConfigError("a run without a directory cannot be resumed; set `out` with `resume`.")
    with tempfile.TemporaryDirectory() as directory:
        return train_to(chosen, Path(directory) / "expert", base=base, callbacks=callbacks)
