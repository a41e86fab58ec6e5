"""Experts as they are named on the command line, with the base model where they need it."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from sparselet.cli.terminal import note
from sparselet.errors import ConfigError
from sparselet.expert import Expert
from sparselet.formats import BaseModel, open_expert
from sparselet.models import local_path


def open_experts(names: Sequence[str], model: str | None, without: Sequence[str] = ()) -> list[Expert]:
    """Open experts. model: the base model; of one on the hub the weights are fetched only where an expert needs them.
    without: patterns of targets that are left out of each.

    A full checkpoint's base model is called as it was asked for, or by its whole path, so that it means the same elsewhere.
    Raises ModelError for a base model that is not there, and what `open_expert` raises.
    """
    base = None if model is None else BaseModel(local_path(model))
    opened = [open_expert(name, base, without) for name in names]
    for expert in opened:
        if model is not None and base is not None and expert.metadata.base_model_name_or_path == base.name:
            called = os.path.realpath(model) if Path(model).is_dir() else model
            expert.metadata = replace(expert.metadata, base_model_name_or_path=called)
    return opened


def template_of(wanted: bool | None, experts: Iterable[Expert]) -> bool:
    """Whether to ask through the chat template: as wanted, or as the experts were trained.

    Raises ConfigError where they were trained differently.
    """
    if wanted is not None:
        return wanted
    trained = {expert.metadata.chat_template for expert in experts} - {None}
    if len(trained) > 1:
        raise ConfigError(
            "some adapters were trained with the chat template, some without. Say --chat-template or --no-chat-template."
        )
    if trained == {False}:
        note("Asking without the chat template, as the adapters were trained.")
    return False not in trained
