"""`GenerationRequest`: one prompt for one expert, and the `Output`s by which its answer arrives."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from sparselet.errors import RequestRefused
from sparselet.serving.served_expert import ServedExpert

FinishReason = Literal["stop", "length"]
MAX_STOPS, MAX_STOP_LENGTH = 4, 256


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen.

    temperature: 0 takes the likeliest token, as `sparselet eval` does; otherwise logits are divided by it. top_p: draw from the
    fewest likeliest tokens whose probabilities sum to at least this. seed: of the request's own generator; equal seeds give
    equal answers whatever else is in the batch, up to the rounding of its sums. stop: an answer ends before the first of these
    texts. max_tokens: the longest answer.
    Raises RequestRefused, naming the field.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RequestRefused(f"max_tokens must be at least 1, got {self.max_tokens}.", "max_tokens")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 2):
            raise RequestRefused(f"temperature must be in [0, 2], got {self.temperature}.", "temperature")
        if not 0 < self.top_p <= 1:
            raise RequestRefused(f"top_p must be in (0, 1], got {self.top_p}.", "top_p")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise RequestRefused(f"seed must be in [0, 2**63), got {self.seed}.", "seed")
        if len(self.stop) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_LENGTH for text in self.stop):
            raise RequestRefused(f"stop must be up to {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters.", "stop")


@dataclass(frozen=True)
class Output:
    """A part of an answer. The last one has `finish`, `state` or `error`.

    text: what is new. tokens: of the answer so far, with its end token; empty unless it is finished. waited: seconds from the
    request to its first token. seconds: from the first token to the last. state: of a request for the prompt's state.
    """

    text: str = ""
    finish: FinishReason | None = None
    tokens: tuple[int, ...] = ()
    waited: float = 0.0
    seconds: float = 0.0
    state: Tensor | None = None
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        """Whether none follows."""
        return self.finish is not None or self.state is not None or self.error is not None


@dataclass(eq=False)
class GenerationRequest:
    """One prompt for one expert.

    expert: who answers. prompt: token ids. ends: the tokens that end an answer. stream: emit text as it is decoded, not only at
    the end. emit: called on the engine's thread with each `Output`; it must return at once. state_only: decode nothing, and
    emit the prompt's state, as `prompt_states`. steer: a block's number and what is added to its output at the prompt's
    last token and at each token of the answer, [width]. cancelled: set it from any thread, and the request leaves at the
    engine's next step without a further output.
    """

    expert: ServedExpert
    prompt: Sequence[int]
    ends: frozenset[int]
    sampling: Sampling
    emit: Callable[[Output], None]
    stream: bool = False
    state_only: bool = False
    steer: tuple[int, Tensor] | None = None
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)

    @property
    def cache_tokens(self) -> int:
        """The most tokens whose keys and values it will need."""
        return 0 if self.state_only else len(self.prompt) + self.sampling.max_tokens
