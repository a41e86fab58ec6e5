"""Errors as HTTP answers in OpenAI's form, and a bound on bodies."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparselet.errors import NotEnoughMemory, RequestRefused, ServerBusy, SparseletError, UnknownExpert, WriteFailed
from sparselet.io.printable import printable

logger = logging.getLogger("sparselet")

CLIENT_GONE = 499
_STATUS: dict[type[SparseletError], int] = {
    UnknownExpert: 404,
    ServerBusy: 429,
    WriteFailed: 507,
    NotEnoughMemory: 503,
    SparseletError: 400,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_json(status: int, message: str, field: str | None = None) -> dict[str, Any]:
    """An error's body, as OpenAI's clients read it."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = {400: "invalid_value", 404: "model_not_found", 429: "server_busy"}.get(status)
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def status_of(error: Exception) -> int:
    """The HTTP status of an error; 500 for one that nobody raised on purpose."""
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)


def describe(error: Exception) -> dict[str, Any]:
    """An error's body; what nobody raised on purpose is not shown to clients."""
    status = status_of(error)
    message = printable(error) if status != 500 else "the server failed to answer; its log has the reason."
    return error_json(status, message, (error.field or None) if isinstance(error, RequestRefused) else None)


def respond(status: int, message: str, field: str | None = None, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error_json(status, message, field), status, dict(headers or {}))


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's form."""

    @app.exception_handler(SparseletError)
    async def refuse(request: Request, error: SparseletError) -> JSONResponse:
        headers = {"Retry-After": str(error.retry_after)} if isinstance(error, ServerBusy) else {}
        return JSONResponse(describe(error), status_of(error), headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"][1:]]
        field = ".".join(path) or "body"
        if not path and "json" not in request.headers.get("content-type", ""):
            return respond(400, "the body must be a JSON object, sent with `content-type: application/json`.", field)
        return respond(400, f"{printable(field)}: {printable(first['msg'])}.", field)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> JSONResponse:
        return respond(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s failed", request.url.path, exc_info=error)
        return JSONResponse(describe(error), 500)


class BodyLimit:
    """Refuses bodies of more than `limit` bytes with 413, also those that do not say their length."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = 0

        async def count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise HTTPException(413, f"the body has more than {self.limit} bytes.")
            return message

        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if any(not value.isdigit() or int(value) > self.limit for value in lengths):
            await respond(413, f"the body has more than {self.limit} bytes.")(scope, receive, send)
            return
        await self.app(scope, count, send)
