"""The endpoints of OpenAI's HTTP API.

`make_app` makes an ordinary FastAPI application over a `Service` (service.py, where the path of one
generation request is). It knows no Ray, and tests run it without; ingress.py is the Serve
deployment around it. FastAPI's own telemetry is off: a request has one SERVER span, and
telemetry/request.py makes it.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serve_app.errors import HTTP_REASONS, ApiError, EngineUnavailable, to_api_error
from serve_app.openai.service import Service
from serve_app.routing.checks import check_key, check_model
from serve_app.telemetry.metrics import render


def make_app(service: Service, snapshots: Any = None) -> FastAPI:
    """The HTTP application. `snapshots` is an async function that gives the metrics text of every
    ingress by its id; None means that this one is alone."""
    app = FastAPI(
        title="IntServe",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await service.answer(request, "/v1/chat/completions")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.answer(request, "/v1/completions")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        check_key(service.config.api_keys, request.headers)
        return JSONResponse({"object": "list", "data": [service.model_card()]})

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> Response:
        check_key(service.config.api_keys, request.headers)
        check_model(model, service.config.served_name)
        return JSONResponse(service.model_card())

    @app.get("/health")
    async def health() -> Response:
        ready = await service.engines.statuses()
        info = ready[0].info
        return JSONResponse(
            {
                "status": "ok",
                "engine_replicas": len(ready),
                "engine": info.engine,
                "recipe": info.recipe,
                "artifact_digest": info.artifact_digest,
                "engine_digest": info.engine_digest,
                "kv_cache": info.kv_cache,
                "gated": ready[0].gated,
                "max_model_len": info.max_model_len,
            }
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        try:
            replicas = await service.engines.statuses()
        except EngineUnavailable:
            replicas = []  # the request metrics are still worth a scrape
        texts = await snapshots() if snapshots else {"0": service.metrics.snapshot()}
        return Response(render(texts, replicas), media_type="text/plain; version=0.0.4")

    app.add_exception_handler(HTTPException, _refused_by_framework)
    app.add_exception_handler(Exception, _failed)
    app.add_exception_handler(ApiError, _failed)
    return app


async def _failed(request: Request, error: Exception) -> Response:
    known = to_api_error(error)
    return JSONResponse(known.body(), known.status, known.headers())


async def _refused_by_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind, code = HTTP_REASONS.get(error.status_code, ("invalid_request_error", "bad_request"))
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, error.status_code, dict(error.headers or {}))
