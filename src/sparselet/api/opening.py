"""Experts by path, hub name or object, opened against their base model."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sparselet.adapter import AdapterFile, SparseAdapter, as_expert
from sparselet.errors import ArgumentError, ConfigError
from sparselet.expert import Expert
from sparselet.formats import BaseModel, open_expert
from sparselet.formats.expert import leave_out
from sparselet.merging.engine.plan import ExpertSource
from sparselet.models import local_path

logger = logging.getLogger("sparselet")


def open_experts(sources: Sequence[ExpertSource], base: str | Path | None = None, without: Sequence[str] = ()) -> list[Expert]:
    """Open experts for reading target by target; objects are used as they are.

    base: the base model; of one on the hub the weights are fetched only if an expert needs them. A full checkpoint records
        it by this name, or by its absolute path, which means the same model elsewhere.
    without: patterns of target names that are left out of each expert.
    Raises ArgumentError (no list of experts), ModelError (the base model), and what `open_expert` raises.
    """
    if isinstance(sources, str | Path | Mapping) or not sources:
        raise ArgumentError(f"experts must be a list of at least one expert, got {sources!r:.80}.")
    model = None if base is None else BaseModel(local_path(str(base)))
    return [_open(source, base, model, without) for source in sources]


def load(source: str | Path, base: str | Path | None = None) -> Expert:
    """Load an expert of any kind: a sparse adapter, PEFT's LoRA, SHiRA or Super-Tuning, or a full checkpoint.

    source: a directory, `org/name` or `org/name@revision`. base: the base model, which full checkpoints need.
    Returns a `SparseAdapter` in memory for a sparse adapter; the other kinds are read from their files, target by target.
    Raises what `open_expert` raises, and NonFiniteValue.
    """
    return read_checked(open_experts([source], base)[0])


def read_checked(expert: Expert) -> Expert:
    """An expert whose every value is finite: a sparse adapter in memory, other kinds in their files. Raises NonFiniteValue."""
    if isinstance(expert, AdapterFile):
        return SparseAdapter.load(expert.path)
    expert.check_values()
    return expert


def name_of(source: ExpertSource) -> str:
    """A short name of an expert: its path or hub name, or of one in memory its task or what it was merged by."""
    if isinstance(source, str | Path):
        return str(source)
    expert = as_expert(source)
    if expert.path is not None:
        return str(expert.path)
    merge = expert.metadata.merge
    return expert.metadata.task or (f"merged by {merge.get('method')}" if merge else "expert")


def base_of(experts: Iterable[Expert]) -> str | None:
    """The base model that the experts record, None if none does. Raises ConfigError if they record several."""
    names = {expert.metadata.base_model_name_or_path for expert in experts} - {None}
    if len(names) > 1:
        listed = " and ".join(sorted(map(str, names)))
        raise ConfigError(f"the experts record several base models, {listed}. Set `model` to one.")
    return next(iter(names), None)


def chat_template_of(experts: Iterable[Expert]) -> bool:
    """Whether the experts were trained with the chat template; True if none records it.

    Raises ConfigError if they were trained differently.
    """
    trained = {expert.metadata.chat_template for expert in experts} - {None}
    if len(trained) > 1:
        raise ConfigError(
            "some adapters were trained with the chat template, some without. Set `chat_template=True` or "
            "`chat_template=False`."
        )
    if trained == {False}:
        logger.info("Asking without the chat template, as the adapters were trained.")
    return False not in trained


def _open(source: ExpertSource, base: str | Path | None, model: BaseModel | None, without: Sequence[str]) -> Expert:
    if not isinstance(source, str | Path):
        return _select(as_expert(source), without)
    expert = open_expert(source, model, without)
    if base is not None and model is not None and expert.metadata.base_model_name_or_path == model.name:
        name = os.path.realpath(base) if Path(base).is_dir() else str(base)
        expert.metadata = replace(expert.metadata, base_model_name_or_path=name)
    return expert


def _select(expert: Expert, without: Sequence[str]) -> Expert:
    """The targets of an expert that match no pattern, in memory. Raises ArgumentError."""
    left_out = leave_out(expert, without)
    if not left_out:
        return expert
    deltas = {name: expert[name] for name in expert if name not in left_out}
    selected = SparseAdapter(deltas, expert.metadata, expert.fingerprints, profile=expert.profile)
    selected.left_out = left_out
    return selected
