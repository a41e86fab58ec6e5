"""A library of experts: the profile of one, and the experts that a prompt is routed among."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from contestants.models import make_model, targets
from sparselet.profiles.collect import collect_moments, prompt_states
from sparselet.profiles.file import PROFILE_FILE, read_profile
from sparselet.profiles.router import Router


@functools.cache
def _model(name: str, dtype: str, device: str) -> PreTrainedModel:
    return make_model(name, dtype, device)


def _model_and_rows(job: dict[str, Any]) -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """A frozen model, and `rows` rows of `tokens` random tokens, one forward pass each."""
    model = _model(job["model"], job["dtype"], job["device"])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (job["rows"], 1, job["tokens"]), generator=generator).to(model.device)
    return model, [{"input_ids": row} for row in ids]


def forward(job: dict[str, Any]) -> Callable[[], None]:
    """The model's forward pass over the rows, up to the last hidden states: what a profile and a route cannot do without."""
    model, rows = _model_and_rows(job)

    def start() -> None:
        with torch.inference_mode():
            for row in rows:
                model.base_model(**row)

    return start


def profile(job: dict[str, Any]) -> Callable[[], Any]:
    """The second moments of query, key and value layers' inputs over the rows, of `rank`."""
    model, rows = _model_and_rows(job)
    names = list(targets(model))
    return lambda: collect_moments(model, names, rows, job["rank"])


def route(job: dict[str, Any]) -> Callable[[], Any]:
    """Where each row belongs, among the experts with these profiles, which are read before the clock starts."""
    model, rows = _model_and_rows(job)
    router = _router(tuple(job["adapters"]))
    prompts = [row["input_ids"][0].tolist() for row in rows]
    return lambda: router.route(prompt_states(model, prompts))


@functools.cache
def _router(adapters: tuple[str, ...]) -> Router:
    return Router({adapter: read_profile(Path(adapter) / PROFILE_FILE) for adapter in adapters})
