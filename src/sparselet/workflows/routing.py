"""Routing: which experts of a library answer a prompt, and their answers."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.apply import apply_temporarily
from sparselet.errors import ArgumentError
from sparselet.evaluation import EvalSettings
from sparselet.evaluation.harness import prompt_for
from sparselet.expert import ExpertOrDeltas
from sparselet.generation.generate import generate
from sparselet.generation.prompts import in_prompt, longest_prompt, prompt_format, prompt_tokens
from sparselet.profiles.collect import prompt_states
from sparselet.profiles.router import Route, Router
from sparselet.setting_checks import check_settings
from sparselet.tasks.rows import Prompt

FALLBACKS = ("nearest", "merge", "base")
MERGED = 3  # experts of a merge to fall back on


@dataclass(frozen=True)
class RouteSettings:
    """How prompts are routed."""

    rule: str = "residual"
    """Distance of a prompt to an expert: residual, of its state outside the expert's leading directions, or mean."""
    margin: float = 0.05
    """A route is unsure if the second expert is not farther by this fraction."""
    fallback: str = "nearest"
    """What answers an unsure prompt: nearest (the nearest expert), merge (of the three nearest, by overlap), or base."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.fallback not in FALLBACKS:
            raise ArgumentError(f"fallback must be one of {', '.join(FALLBACKS)}, got {self.fallback!r}.")


def route_prompts(
    router: Router,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    chat_template: bool,
    max_input_length: int,
) -> list[Route]:
    """Where each prompt belongs, by one forward pass of the base model a prompt."""
    form = prompt_format(model, tokenizer, chat_template)
    longest = longest_prompt(form, max_input_length, 1)
    return router.route(prompt_states(model, (prompt_tokens(form, prompt)[-longest:] for prompt in prompts)))


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: ExpertOrDeltas | None,
    prompts: Sequence[Prompt],
    settings: EvalSettings,
    chat_template: bool,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Answers of an expert or a merge; of the base model for None."""
    prompt = prompt_for(adapter, settings)
    with contextlib.nullcontext() if adapter is None else apply_temporarily(model, adapter):
        return generate(
            model,
            tokenizer,
            [in_prompt(prompt, each) for each in prompts],
            chat_template=chat_template,
            max_input_length=settings.max_input_length,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            progress=progress,
        )


def answering_experts(chosen: Route, fallback: str) -> tuple[str, ...]:
    """The names of the experts whose merge answers a prompt: one, several, or none for the base model."""
    if not chosen.unsure or fallback == "nearest":
        return (chosen.expert,)
    return tuple(sorted(list(chosen.distances)[:MERGED])) if fallback == "merge" else ()
