"""The endpoints of OpenAI's HTTP API, and the path of one generation request through them.

`make_app` makes an ordinary FastAPI application over an `EngineClient`. It knows no Ray, and tests
run it without; ingress.py is the Serve deployment around it. `Service.answer` calls, in this order:

    check_key -> read_body -> parse -> check_model -> tokenize -> admit -> open_stream
              -> 200 and Answer.sse, or Answer.collect and 200

Everything that can be refused is refused before the 200; a later failure is reported in-band.
FastAPI's own telemetry is off: a request has one SERVER span, and telemetry/request.py makes it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Send

from serve_app.config import ServeConfig
from serve_app.engines.protocol import EngineClient
from serve_app.errors import (
    HTTP_REASONS,
    ApiError,
    BodyTooLarge,
    DeadlineExceeded,
    EngineUnavailable,
    to_api_error,
)
from serve_app.openai.answers import ChatFormat, CompletionFormat
from serve_app.openai.requests import AnyRequest, ChatRequest, CompletionRequest, parse
from serve_app.openai.stream import Answer, open_stream
from serve_app.openai.tokenizer import Tokenizer
from serve_app.routing.checks import admit, check_key, check_model
from serve_app.telemetry.metrics import RequestMetrics, render
from serve_app.telemetry.request import Observation
from serve_app.telemetry.tracing import Telemetry

#: Conversations that are tokenized at one time.
CHAT_THREADS = 8

_BODIES: dict[str, type[ChatRequest] | type[CompletionRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}


class Service:
    """The objects that the endpoints share: configuration, tokenizer, engines, metrics, tracer."""

    def __init__(
        self,
        config: ServeConfig,
        tokenizer: Tokenizer,
        engines: EngineClient,
        telemetry: Telemetry,
    ) -> None:
        self.config = config
        self._tokenizer = tokenizer
        self.engines = engines
        self.telemetry = telemetry
        self.metrics = RequestMetrics()
        self.started = int(time.time())
        self._chat_threads = ThreadPoolExecutor(CHAT_THREADS, "chat-template")

    async def answer(self, request: Request, route: str) -> Response:
        """Answer one generation request, and record its outcome exactly once.

        Raises:
            ApiError: the request is refused; the application's handler makes the response.
        """
        chat = _BODIES[route] is ChatRequest
        observation = Observation(
            self.telemetry,
            self.metrics,
            operation="chat" if chat else "text_completion",
            route=route,
            headers=request.headers,
        )
        try:
            check_key(self.config.api_keys, request.headers)
            body = parse(_BODIES[route], await read_body(request, self.config.max_body_bytes))
            check_model(body.model, self.config.served_name)
            return await self._respond(body, observation)
        except asyncio.CancelledError:
            observation.finish(None, status=499, disconnected=True)
            raise
        except Exception as error:
            known = to_api_error(error)
            observation.finish(known, status=known.status)
            raise

    async def _respond(self, body: AnyRequest, observation: Observation) -> Response:
        deadline = asyncio.get_running_loop().time() + self.config.request_timeout_s
        request_id = uuid.uuid4().hex
        prompts = await self._tokenize_in_thread(body, deadline)
        requests = admit(
            body,
            prompts,
            request_id=request_id,
            info=await self.engines.info(),
            vocab_size=self._tokenizer.vocab_size,
            default_max_tokens=self.config.default_max_tokens,
            trace_context=observation.trace_context,
        )
        make_format = ChatFormat if isinstance(body, ChatRequest) else CompletionFormat
        form = make_format(request_id, body.model)
        num_prompt_tokens = sum(map(len, prompts))
        observation.describe(
            requests,
            model=body.model,
            num_choices=body.num_choices,
            streamed=bool(body.stream),
            num_prompt_tokens=num_prompt_tokens,
            response_id=f"{form.prefix}{request_id}",
        )

        merged = await open_stream(self.engines, requests, deadline)
        answer = Answer(merged, form, len(requests), observation.event)
        if body.stream:
            chunks = answer.sse(num_prompt_tokens, include_usage=body.include_usage)
            return EventStream(chunks, answer, observation)
        try:
            whole = await answer.collect(num_prompt_tokens)
        finally:
            merged.close()
        observation.finish(None, status=200)
        return JSONResponse(whole)

    async def _tokenize_in_thread(self, body: AnyRequest, deadline: float) -> list[list[int]]:
        """`_tokenize`. Conversations have threads of their own: a chat template may take seconds to
        fail, and prompts do not wait for that."""
        threads = self._chat_threads if isinstance(body, ChatRequest) else None
        try:
            async with asyncio.timeout_at(deadline):
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(threads, self._tokenize, body)
        except TimeoutError:
            raise DeadlineExceeded(
                "the request waited to be tokenized until its deadline; send it again later"
            ) from None

    def _tokenize(self, body: AnyRequest) -> list[list[int]]:
        """Token ids of each prompt of the body. Slow for long prompts: call it in a thread."""
        if isinstance(body, ChatRequest):
            return [self._tokenizer.encode_chat(body.conversation())]
        return [
            self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            for prompt in body.prompts()
        ]

    def model_card(self) -> dict[str, Any]:
        return {
            "id": self.config.served_name,
            "object": "model",
            "created": self.started,
            "owned_by": "intserve",
        }


class EventStream(StreamingResponse):
    """Server-sent events. However the connection ends, open choices are aborted and the outcome is
    recorded."""

    def __init__(
        self, chunks: AsyncIterator[bytes], answer: Answer, observation: Observation
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks, headers=headers, media_type="text/event-stream")
        self._answer = answer
        self._observation = observation

    async def stream_response(self, send: Send) -> None:
        complete = False
        try:
            await super().stream_response(send)
            complete = True
        finally:
            self._answer.merged.close()
            error = next(iter(self._answer.merged.errors.values()), None)
            self._observation.finish(error, status=200, disconnected=not complete)


async def read_body(request: Request, limit: int) -> bytes:
    """The body, or BodyTooLarge as soon as it is known to exceed `limit` bytes."""
    refusal = BodyTooLarge(f"the body is over the limit of {limit} bytes; shorten the request")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise refusal
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise refusal
    return bytes(body)


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
