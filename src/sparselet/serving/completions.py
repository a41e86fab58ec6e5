"""/v1/chat/completions and /v1/completions: a body to a request of the engine, its outputs to JSON or server-sent events."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from sparselet.errors import RequestRefused, ServerBusy
from sparselet.profiles.router import Route
from sparselet.serving.bodies import ChatBody, CompletionBody, GenerationBody
from sparselet.serving.http_errors import CLIENT_GONE, describe, status_of
from sparselet.serving.metrics import ServingMetrics
from sparselet.serving.outputs import next_output, output_queue
from sparselet.serving.registry import MERGE_NAME, ROUTE_NAME
from sparselet.serving.request import GenerationRequest, Output, Sampling
from sparselet.serving.service import Service
from sparselet.tasks.rows import Message

DEFAULT_TOKENS = 256  # of an answer, where the request does not say
DIGEST_HEADER = "x-sparselet-expert"


@dataclass(frozen=True)
class CompletionShape:
    """What the JSON of an answer looks like. name: of `object`, of whole answers and of parts. prefix: of `id`."""

    name: str
    part_name: str
    prefix: str
    chat: bool

    def whole(self, text: str, finish: str | None) -> dict[str, Any]:
        """The choice of a whole answer."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish}

    def part(self, text: str, finish: str | None, first: bool = False) -> dict[str, Any]:
        """The choice of a part."""
        delta = {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}
        return {"index": 0, **({"delta": delta} if self.chat else {"text": text}), "logprobs": None, "finish_reason": finish}


CHAT_SHAPE = CompletionShape("chat.completion", "chat.completion.chunk", "chatcmpl-", True)
TEXT_SHAPE = CompletionShape("text_completion", "text_completion", "cmpl-", False)


class Completions:
    """The two endpoints of one service."""

    def __init__(self, service: Service, metrics: ServingMetrics) -> None:
        self.service, self.metrics = service, metrics

    async def chat(self, body: ChatBody, http: Request) -> Response:
        """/v1/chat/completions."""
        return await self._answer(body, [message.message() for message in body.messages], http, CHAT_SHAPE)

    async def text(self, body: CompletionBody, http: Request) -> Response:
        """/v1/completions."""
        return await self._answer(body, body.prompt, http, TEXT_SHAPE)

    async def _answer(
        self, body: GenerationBody, prompt: str | Sequence[Message], http: Request, shape: CompletionShape
    ) -> Response:
        route = None
        if body.model == ROUTE_NAME and body.experts is None:
            route = await self._route(prompt, http)
            if route is None:
                return Response(status_code=CLIENT_GONE)
            body = body.model_copy(update={"model": route.expert})
        outputs, emit = output_queue()
        label = MERGE_NAME if body.experts is not None else str(body.model)
        request = await run_in_threadpool(self._prepare, body, prompt, emit)
        try:
            self.service.engine.submit(request)
        except ServerBusy:
            self.metrics.requests.labels(label, "429").inc()
            raise
        frame = {
            "id": f"{shape.prefix}{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": label,
            "system_fingerprint": request.expert.digest,
        }
        headers = {DIGEST_HEADER: request.expert.digest}
        received = self._received(request, outputs, http, label)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(received, frame, shape, len(request.prompt), usage, _route_json(route))
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        last = [output async for output in received][-1:]
        if not last:
            return Response(status_code=CLIENT_GONE)
        if last[0].error is not None:
            return JSONResponse(describe(last[0].error), status_of(last[0].error))
        choices = [shape.whole(last[0].text, last[0].finish)]
        usage = _usage(len(request.prompt), last[0])
        content = {**frame, "object": shape.name, "choices": choices, "usage": usage, **_route_json(route)}
        return JSONResponse(content, headers=headers)

    async def _route(self, prompt: str | Sequence[Message], http: Request) -> Route | None:
        """Whom a prompt belongs to; None if the client has gone. Raises what `Service` and the engine raise."""
        tokens = await run_in_threadpool(self.service.encode_for_route, prompt)
        state = self.service.router.states.get(tokens)
        if state is None:
            outputs, emit = output_queue()
            base = self.service.registry.base
            request = GenerationRequest(base, tokens, frozenset(), Sampling(max_tokens=1), emit, state_only=True)
            self.service.engine.submit(request)
            try:
                output = await next_output(outputs, http)
            finally:
                request.cancelled = True
            if output is None:
                return None
            if output.error is not None:
                raise output.error
            assert output.state is not None
            state = output.state
            self.service.router.states.keep(tokens, state)
        return await run_in_threadpool(self.service.router.route, state)

    def _prepare(self, body: GenerationBody, prompt: str | Sequence[Message], emit: Any) -> GenerationRequest:
        """Find or merge the expert, and encode the prompt. Raises what `Service` raises."""
        expert = self.service.resolve(body.model, body.members(), body.method, body.parameters)
        encoded = self.service.encode(expert, prompt)
        longest = body.longest_answer()
        if longest is not None and longest > encoded.room:
            raise RequestRefused(f"max_tokens may be at most {encoded.room} for this prompt, got {longest}.", "max_tokens")
        sampling = Sampling(
            max_tokens=min(DEFAULT_TOKENS, encoded.room) if longest is None else longest,
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            stop=body.stops(),
        )
        steer = self.service.steering(body.steer, body.steer_strength)
        return GenerationRequest(expert, encoded.tokens, encoded.ends, sampling, emit, body.stream, steer=steer)

    async def _received(
        self, request: GenerationRequest, outputs: "asyncio.Queue[Output]", http: Request, label: str
    ) -> AsyncIterator[Output]:
        """A request's outputs up to the last one, or until the client has gone, which cancels the request."""
        status = str(CLIENT_GONE)
        try:
            while (output := await next_output(outputs, http)) is not None:
                if output.error is not None:
                    status = str(status_of(output.error))
                elif output.finish is not None:
                    status = "200"
                    self.metrics.answered(label, len(request.prompt), output)
                yield output
                if output.is_last:
                    return
        finally:
            request.cancelled = True  # has no effect on an answer that has ended
            self.metrics.requests.labels(label, status).inc()


def _route_json(route: Route | None) -> dict[str, Any]:
    """The field of an answer that was routed: the expert, the margin to the second nearest, and the distances of all."""
    return {} if route is None else {"route": {**vars(route), "distances": dict(route.distances)}}


async def _events(
    received: AsyncIterator[Output],
    frame: dict[str, Any],
    shape: CompletionShape,
    prompt_tokens: int,
    with_usage: bool,
    route: dict[str, Any],
) -> AsyncIterator[str]:
    """Server-sent events: the parts, the usage if it is wanted, and [DONE]; or an error, after which none follows.

    The part that ends the answer has the fields of `route` too.
    """
    frame = {**frame, "object": shape.part_name}
    if shape.chat:
        yield _event({**frame, "choices": [shape.part("", None, first=True)]})
    async with contextlib.aclosing(received) as outputs:  # pyright: ignore[reportArgumentType]
        async for output in outputs:
            if output.error is not None:
                yield _event(describe(output.error))
                return
            if output.text:
                yield _event({**frame, "choices": [shape.part(output.text, None)]})
            if output.finish is not None:
                yield _event({**frame, "choices": [shape.part("", output.finish)], **route})
                if with_usage:
                    yield _event({**frame, "choices": [], "usage": _usage(prompt_tokens, output)})
                yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _usage(prompt_tokens: int, output: Output) -> dict[str, int]:
    """Tokens, the end token among those of the answer."""
    answer = len(output.tokens)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": answer, "total_tokens": prompt_tokens + answer}
