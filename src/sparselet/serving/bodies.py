"""The bodies of requests, as OpenAI's API has them, with our fields. Unknown fields, and choices that are not offered, are
refused by name and never ignored."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sparselet.serving.merge_cache import MAX_MEMBERS
from sparselet.tasks.rows import Message


class Body(BaseModel):
    """A JSON object without unknown fields, whose numbers are numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Member(Body):
    """An expert of a merge."""

    name: str
    weight: float = 1.0


class MergedExperts(Body):
    """Experts and how they are merged, as in `sparselet merge`."""

    experts: list[Member] | None = Field(None, min_length=1, max_length=MAX_MEMBERS)
    method: str = "overlap"
    parameters: dict[str, Any] = Field(default_factory=dict)

    def members(self) -> list[tuple[str, float]] | None:
        """Names with weights."""
        return None if self.experts is None else [(member.name, member.weight) for member in self.experts]


class StreamOptions(Body):
    """Choices of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class GenerationBody(MergedExperts):
    """What chat and text completions have in common. temperature is 0 by default, as in `sparselet eval`.

    steer: a served steering vector. steer_strength: by default the vector's own; negative steers the other way.
    """

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    user: str | None = None
    steer: str | None = None
    steer_strength: float | None = None

    def longest_answer(self) -> int | None:
        """Tokens, None if the request does not say."""
        return self.max_tokens

    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionBody(GenerationBody):
    """/v1/completions: the prompt is a text as it is."""

    prompt: str
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def message(self) -> Message:
        """The turn with its parts joined."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(self.role, text)


class ResponseFormat(Body):
    """Text is all that is offered."""

    type: Literal["text"]


class ChatBody(GenerationBody):
    """/v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    response_format: ResponseFormat | None = None

    def longest_answer(self) -> int | None:
        """Tokens, None if the request does not say."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class MeasureBody(MergedExperts):
    """/library/measure: an expert by `model`, or a merge, on the first validation rows of a task."""

    model: str | None = None
    task: str
    rows: int = Field(24, ge=1, le=1000)


class LoadBody(Body):
    """/admin/load: a directory in the served ones."""

    name: str
    path: str


class UnloadBody(Body):
    """/admin/unload."""

    name: str


class RenameBody(Body):
    """/admin/rename."""

    name: str
    new_name: str


class SaveMergeBody(MergedExperts):
    """/admin/merge: a merge that is saved and served under a name."""

    name: str
    experts: list[Member] = Field(min_length=1, max_length=MAX_MEMBERS)  # pyright: ignore[reportIncompatibleVariableOverride]
