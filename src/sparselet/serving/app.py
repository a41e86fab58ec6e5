"""The HTTP server: routes, keys, and an engine that starts and drains with it."""

import contextlib
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from sparselet.serving.bodies import LoadBody, RenameBody, SaveMergeBody, UnloadBody
from sparselet.serving.completions import Completions
from sparselet.serving.http_errors import BodyLimit, add_error_handlers
from sparselet.serving.measuring import Measuring
from sparselet.serving.metrics import ServingMetrics
from sparselet.serving.page_routes import library_routes, page_files
from sparselet.serving.registry import BASE_NAME, Registration
from sparselet.serving.served_expert import ServedExpert
from sparselet.serving.service import Service


def create_app(
    service: Service, api_key: str | None = None, admin_key: str | None = None, measuring: Measuring | None = None
) -> FastAPI:
    """The server as an ASGI application. The engine starts with it, and is drained when it ends.

    api_key: what clients send as `Authorization: Bearer KEY`; None lets everyone ask. admin_key: the same for /admin, which is
    closed without one. measuring: what the page measures experts and merges on.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await run_in_threadpool(service.engine.stop)

    app = FastAPI(title="sparselet", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, limit=service.engine.limits.max_body_bytes)
    add_error_handlers(app)
    metrics = ServingMetrics(service)
    clients = [Depends(_require_key(api_key))] if api_key is not None else []
    app.include_router(_public_routes(service, metrics), dependencies=clients)
    app.include_router(library_routes(service, measuring), dependencies=clients)
    app.include_router(page_files())
    app.include_router(_admin_routes(service), dependencies=[Depends(_require_key(admin_key))], prefix="/admin")

    @app.get("/health")
    async def health() -> Response:
        accepts = service.engine.accepts
        return JSONResponse({"status": "ok" if accepts else "stopping"}, 200 if accepts else 503)

    return app


def _public_routes(service: Service, metrics: ServingMetrics) -> APIRouter:
    router, completions, began = APIRouter(), Completions(service, metrics), int(time.time())
    router.add_api_route("/v1/chat/completions", completions.chat, methods=["POST"], response_model=None)
    router.add_api_route("/v1/completions", completions.text, methods=["POST"], response_model=None)

    def model_json(name: str, expert: ServedExpert) -> dict[str, Any]:
        described = {"digest": expert.digest, "task": expert.metadata.task}
        return {"id": name, "object": "model", "created": began, "owned_by": "sparselet", **described}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        experts = {name: registration.expert for name, registration in service.registry.registrations().items()}
        served = {BASE_NAME: service.registry.base, **experts}
        listed = [model_json(name, expert) for name, expert in served.items()]
        return {"object": "list", "data": listed, "steering_vectors": sorted(service.vectors)}

    @router.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        return model_json(name, service.registry[name])

    @router.get("/metrics")
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return router


def _admin_routes(service: Service) -> APIRouter:
    """Changes of the registry. They run in threads, since they read and write files."""
    router, registry = APIRouter(), service.registry

    @router.get("/experts")
    def experts() -> list[dict[str, Any]]:
        return [_describe(name, registration) for name, registration in registry.registrations().items()]

    @router.post("/load")
    def load(body: LoadBody) -> dict[str, Any]:
        return _describe(body.name, registry.load(body.name, body.path))

    @router.post("/unload")
    def unload(body: UnloadBody) -> dict[str, Any]:
        registry.unload(body.name)
        return {"name": body.name}

    @router.post("/rename")
    def rename(body: RenameBody) -> dict[str, Any]:
        registry.rename(body.name, body.new_name)
        return {"name": body.new_name}

    @router.post("/merge")
    def merge(body: SaveMergeBody) -> dict[str, Any]:
        merged = service.resolve(None, body.members(), body.method, body.parameters)
        return _describe(body.name, registry.save(body.name, merged))

    return router


def _describe(name: str, registration: Registration) -> dict[str, Any]:
    expert = registration.expert
    metadata = expert.metadata
    return {
        "name": name,
        "path": str(registration.path),
        "digest": expert.digest,
        "bytes": expert.bytes,
        "task": metadata.task,
        "density": metadata.density,
        "metrics": metadata.metrics,
        "merge": metadata.merge,
    }


def _require_key(expected: str | None) -> Callable[[Request], None]:
    """A dependency that refuses requests without this key, compared in constant time."""

    def check(request: Request) -> None:
        if expected is None:
            raise HTTPException(403, "the admin API is closed: start the server with an admin key.")
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        sent, right = (hashlib.sha256(text.encode()).digest() for text in (key.strip(), expected))
        if kind.lower() != "bearer" or not hmac.compare_digest(sent, right):
            raise HTTPException(401, "send `Authorization: Bearer KEY` with the server's key.", {"WWW-Authenticate": "Bearer"})

    return check
