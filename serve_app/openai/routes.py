"""The endpoints of OpenAI's HTTP API; operations.py adds those for operators.

`make_app` makes an ordinary FastAPI application over a `Service` (service.py, where the path of one
generation request is). It knows no Ray, and tests run it without; ingress.py is the Serve
deployment around it. FastAPI's own telemetry is off: a request has one SERVER span, and
telemetry/request.py makes it.
"""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from deepseek.text import printable
from serve_app.errors import HTTP_REASONS, ApiError, to_api_error
from serve_app.openai.drain import Drain, DrainMiddleware
from serve_app.openai.operations import Snapshots, add_operations
from serve_app.openai.origins import Origins
from serve_app.openai.service import Service
from serve_app.openai.tokenize import add_tokenizing
from serve_app.routing.checks import check_model

#: Characters of a path that a refusal repeats.
_SHOWN = 200


def make_app(
    service: Service, snapshots: Snapshots | None = None, drain: Drain | None = None
) -> ASGIApp:
    """The HTTP application. `snapshots` is an async function that gives the metrics text of every
    ingress by its id; None means that this one is alone. `drain`, if any, counts its requests."""
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
        tenant = service.check_key(request)
        usable = tenant.may_use(service.config.served_name)
        cards = [await service.model_card()] if usable else []
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> Response:
        tenant = service.check_key(request)
        check_model(model, service.config.served_name, tenant)
        return JSONResponse(await service.model_card())

    add_tokenizing(app, service)
    add_operations(app, service, snapshots)
    app.add_exception_handler(HTTPException, _refused_by_framework)
    app.add_exception_handler(Exception, _failed)
    app.add_exception_handler(ApiError, _failed)
    app.add_exception_handler(ClientDisconnect, _left)
    if drain is not None:
        app.add_middleware(DrainMiddleware, drain=drain)
    return Origins(app, service.config.http.allowed_origins)


async def _failed(request: Request, error: Exception) -> Response:
    known = to_api_error(error)
    return JSONResponse(known.body(), known.status, known.headers())


async def _left(request: Request, error: Exception) -> Response:
    """While its body was arriving: nobody reads the answer."""
    return Response(status_code=499)


async def _refused_by_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind, code = HTTP_REASONS.get(error.status_code, ("invalid_request_error", "bad_request"))
    asked = printable(f"{request.method} {request.url.path}"[:_SHOWN])
    message = f"{asked}: {error.detail}"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, error.status_code, dict(error.headers or {}))
