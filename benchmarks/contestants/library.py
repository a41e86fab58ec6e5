"""A library of experts: the profile of one, and the experts that a prompt is routed among."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from contestants.models import make_model, targets
from sparselet.profiles.collect import collect_moments, describe_prompts, prompt_states
from sparselet.profiles.file import PROFILE_FILE, read_profile, write_profile
from sparselet.profiles.profile import Profile, low_rank_plus_diagonal
from sparselet.profiles.router import Router

PROMPTS = 64  # whose states a synthetic profile describes


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


def write_profiles(adapters: Sequence[str], layers: int, width: int, rank: int, hidden: int) -> None:
    """Beside each synthetic expert the profile of normal inputs with a decaying spectrum, and of normal prompt states.

    width: of the inputs of query, key and value layers. hidden: of prompt states.
    """
    for seed, adapter in enumerate(adapters):
        if (Path(adapter) / PROFILE_FILE).exists():
            continue
        generator = torch.Generator().manual_seed(seed)
        moments, inputs = {}, {}
        for layer in range(layers):
            names = [f"model.layers.{layer}.self_attn.{name}_proj" for name in "qkv"]
            states = torch.randn(2 * width, width, generator=generator) @ torch.diag(torch.arange(1, width + 1) ** -0.5)
            moments[names[0]] = low_rank_plus_diagonal(states.T @ states / len(states), rank)
            inputs |= dict.fromkeys(names, names[0])
        prompts = describe_prompts(torch.randn(PROMPTS, hidden, generator=generator) + torch.randn(hidden, generator=generator))
        made = Profile(moments, inputs, frozenset(), prompts, dict.fromkeys(inputs), 2 * width, PROMPTS, f"synthetic-{seed}")
        write_profile(made, Path(adapter) / PROFILE_FILE)
