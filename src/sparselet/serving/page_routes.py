"""The page at `/`: its files, which need no key, and the data that it shows, which need the clients' key."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from sparselet.serving.bodies import MeasureBody
from sparselet.serving.http_errors import CLIENT_GONE
from sparselet.serving.library import Library
from sparselet.serving.measuring import Measuring
from sparselet.serving.service import Service

_DIRECTORY = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page_files() -> APIRouter:
    """`/` and `/page/NAME`: HTML, style and scripts, which hold nothing of the server's."""
    files = {file.name: file.read_bytes() for file in _DIRECTORY.iterdir() if file.suffix in _TYPES}
    router = APIRouter()

    def respond(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "the page has no such file.")
        return Response(files[name], media_type=_TYPES[Path(name).suffix], headers=_HEADERS)

    @router.get("/")
    async def page() -> Response:
        return respond("index.html")

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        return respond(name)

    return router


def library_routes(service: Service, measuring: Measuring | None = None) -> APIRouter:
    """`/library`: cards of all experts; `/library/where`: where the named experts' changes lie; `/library/measure`: what an
    expert or a merge scores on a task's validation rows."""
    router, library = APIRouter(), Library(service)

    @router.get("/library")
    def cards() -> dict[str, Any]:
        return {**library.cards(), "tasks": [] if measuring is None else list(measuring.tasks)}

    @router.get("/library/where")
    def where(names: Annotated[Sequence[str], Query(alias="name")]) -> dict[str, Any]:
        return library.where(names)

    if measuring is not None:

        @router.post("/library/measure")
        async def measure(body: MeasureBody, http: Request) -> Response:
            expert = await run_in_threadpool(service.resolve, body.model, body.members(), body.method, body.parameters)
            score = await measuring.score(expert, body.task, body.rows, http)
            return Response(status_code=CLIENT_GONE) if score is None else JSONResponse(score)

    return router
