"""`Answer`: a request's tokens as they are chosen, its text, and where that ends."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparselet.serving.request import FinishReason, GenerationRequest, Output, Sampling

UNFINISHED_CHARACTER = "\ufffd"  # what a tokenizer makes of the first bytes of a character


class Answer:
    """The answer to a request, token by token.

    `take` appends a token and emits the text that no later token changes: not the beginning of a stop text or of a character.
    """

    def __init__(self, request: GenerationRequest, tokenizer: PreTrainedTokenizerBase) -> None:
        self.request, self.tokenizer = request, tokenizer
        self.tokens: list[int] = []
        self.emitted = 0
        self.began = 0.0
        self.generator = generator_of(request.sampling) if request.sampling.temperature else None

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the answer without its last token, which no one has read yet."""
        return len(self.request.prompt) + len(self.tokens) - 1

    def take(self, token: int) -> bool:
        """Append a token; whether the answer has ended."""
        request = self.request
        self.tokens.append(token)
        self.began = self.began or time.monotonic()
        finish: FinishReason | None = "stop" if token in request.ends else None
        if finish is None and len(self.tokens) >= request.sampling.max_tokens:
            finish = "length"
        if finish is None and not request.stream and not request.sampling.stop:
            return False
        text = self._decode()
        if finish is None:
            text = text.rstrip(UNFINISHED_CHARACTER)
        stop = first_stop(text, request.sampling.stop)
        if stop is not None:
            text, finish = text[:stop], "stop"
        if finish is not None:
            waited, seconds = self.began - request.arrived, time.monotonic() - self.began
            request.emit(Output(text[self.emitted :], finish, tuple(self.tokens), waited, seconds))
        elif request.stream and (new := without_stop_beginning(text, request.sampling.stop)[self.emitted :]):
            self.emitted += len(new)
            request.emit(Output(new))
        return finish is not None

    def _decode(self) -> str:
        tokens = self.tokens[:-1] if self.tokens[-1] in self.request.ends else self.tokens
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop texts begins, None without one."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def without_stop_beginning(text: str, stops: Sequence[str]) -> str:
    """The part of a growing text that no stop text can end before: without the beginning of one at its end."""
    held = 0
    for stop in stops:
        held = max(held, next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0))
    return text[: len(text) - held]


def choose_tokens(logits: Tensor, answers: Sequence[Answer]) -> list[int]:
    """The next token of each answer by its own sampling. logits: [answers, vocabulary], of any float dtype."""
    tokens = logits.argmax(dim=-1).tolist()
    for row, answer in enumerate(answers):
        if answer.generator is not None:
            sampling = answer.request.sampling
            tokens[row] = draw(logits[row], sampling.temperature, sampling.top_p, answer.generator)
    return tokens


def generator_of(sampling: Sampling) -> torch.Generator:
    """The generator of a request's draws."""
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(sampling.seed)


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token from softmax(logits / temperature) among the fewest likeliest tokens whose sum is at least top_p.

    Nucleus sampling (Holtzman et al. 2020). logits: [vocabulary]. Computed in float64 on the CPU, so that a seed means the same
    on every device.
    """
    likelihoods = (logits.detach().cpu().double() / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, places = likelihoods.sort(descending=True, stable=True)
        kept = int((ordered.cumsum(0) < top_p).sum()) + 1
        return int(places[:kept][torch.multinomial(ordered[:kept], 1, generator=generator)])
    return int(torch.multinomial(likelihoods, 1, generator=generator))
