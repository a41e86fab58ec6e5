"""Profiles of experts from rows that were encoded for training."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparselet.errors import ArgumentError, SparseletError
from sparselet.fingerprint import Fingerprint, fingerprint_weight
from sparselet.generation.prompts import PromptFormat
from sparselet.io.printable import reason
from sparselet.names import Names
from sparselet.profiles.collect import (
    PROMPTS,
    Inputs,
    collect_moments,
    describe_prompts,
    profiled_targets,
    prompt_states,
    sample_rows,
)
from sparselet.profiles.profile import RANK, Profile
from sparselet.training.collate import Collator, Encoded, collator
from sparselet.training.methods import TrainContext, TrainMethod, find_targets

logger = logging.getLogger("sparselet")

TOKENS = 4096  # of a profile

MakeProfile = Callable[[str, torch.dtype | None], Profile | None]
"""Profiles a trained model, given the task's name and `TrainableModel.autocast`; None if it cannot."""


@dataclass(frozen=True)
class BaseSide:
    """What a profile says of the base model: fingerprints and layout of its linear layers, and the states of prompts.

    transposed: by target, whether it is stored [in, out]. states: float32 [prompts, width].
    """

    fingerprints: dict[str, Fingerprint]
    transposed: dict[str, bool]
    states: Tensor


def profile_base(model: PreTrainedModel, rows: Sequence[Encoded], names: Iterable[str] | None = None) -> BaseSide:
    """The base model's side of a profile, before an expert is applied.

    rows: prompts and targets as tokens; 64 prompts are read. names: the targets; every linear layer by default.
    """
    layers = Names(model).layers
    targets = profiled_targets(model, layers if names is None else names)
    states = prompt_states(model, (rows[i]["prompt"] for i in sample_rows(len(rows), PROMPTS)))
    return BaseSide(
        {name: fingerprint_weight(layers[name].parameter) for name in targets},
        {name: layers[name].transposed for name in targets},
        states,
    )


def profile_expert(
    model: PreTrainedModel,
    form: PromptFormat,
    rows: Sequence[Encoded],
    base: BaseSide,
    *,
    tokens: int = TOKENS,
    rank: int | None = RANK,
    task: str | None = None,
    autocast: torch.dtype | None = None,
    progress: Callable[[], object] | None = None,
) -> Profile:
    """The profile of the expert that the model has in its weights or layers.

    tokens: of prompts and targets, at most; at least one row is read. autocast: the dtype to compute in, where it is not that
    of the weights. progress: called after each row. Raises what `collect_moments` raises.
    """
    chosen = choose_rows(rows, tokens)
    collate = collator(model, form)  # tries the model on rows of its own, which are not to be counted
    with torch.autocast(model.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        moments, inputs = collect_moments(model, list(base.transposed), _inputs(collate, chosen, progress), rank)
    return Profile(
        moments,
        inputs,
        frozenset(name for name in inputs if base.transposed[name]),
        describe_prompts(base.states),
        {name: base.fingerprints[name] for name in inputs},
        sum(len(row["prompt"]) + len(row["target"]) for row in chosen),
        len(chosen),
        task,
    )


def profiler(context: TrainContext, method: TrainMethod, rows: Mapping[str, Sequence[Encoded]]) -> MakeProfile:
    """A function that profiles the model of a run once it is trained; what it needs of the base model is computed now.

    rows: the training rows by task. A profile that cannot be made is reported, and does not lose the expert.
    """
    all_rows = [row for task_rows in rows.values() for row in task_rows]
    base: BaseSide | None = None
    with _reported():
        names = None  # all linear layers
        if context.initial is not None and method.initial == "entries":
            names = list(context.initial)
        elif "target_modules" in method.settings:
            names = find_targets(context.model, context.config)
        base = profile_base(context.model, all_rows, names)

    def make(task: str, autocast: torch.dtype | None) -> Profile | None:
        with _reported():
            if base is not None:
                return profile_expert(context.model, context.form, all_rows, base, task=task, autocast=autocast)
        return None

    return make


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Log an error of making a profile instead of raising it."""
    try:
        yield
    except (SparseletError, RuntimeError) as error:
        logger.warning("The expert gets no profile: %s", reason(error))


def choose_rows(rows: Sequence[Encoded], tokens: int) -> list[Encoded]:
    """Rows of at most that many tokens together, but at least one, in the order of `sample_rows`. Raises ArgumentError."""
    if tokens < 1:
        raise ArgumentError(f"tokens must be at least 1, got {tokens}.")
    chosen: list[Encoded] = []
    total = 0
    for i in sample_rows(len(rows)):
        total += len(rows[i]["prompt"]) + len(rows[i]["target"])
        if chosen and total > tokens:
            break
        chosen.append(rows[i])
    return chosen


def _inputs(collate: Collator, rows: Sequence[Encoded], progress: Callable[[], object] | None) -> Iterator[Inputs]:
    """The arguments of a forward pass for one row at a time."""
    for row in rows:
        batch: dict[str, Any] = dict(collate([row]))
        del batch["labels"]
        yield batch
        if progress is not None:
            progress()
