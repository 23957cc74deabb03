"""The path of one generation request, and the objects that all requests share.

`Service.answer` calls, in this order:

    check_key -> read_body -> parse -> check_model -> check_choices -> encode -> admit
              -> open_stream -> 200 and Answer.sse, or Answer.collect and 200

The deadline runs from the first of them. What can be refused is refused before the 200; a later
failure is reported in-band.
routes.py calls it; it knows no Ray.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Send

from serve_app.config import ServeConfig
from serve_app.engines.protocol import EngineClient
from serve_app.errors import to_api_error
from serve_app.openai.answers import ChatFormat, CompletionFormat
from serve_app.openai.body import read_body
from serve_app.openai.prompts import PromptEncoder
from serve_app.openai.requests import AnyRequest, ChatRequest, CompletionRequest, parse
from serve_app.openai.stream import Answer, open_stream
from serve_app.openai.tokenizer import Tokenizer
from serve_app.routing.checks import (
    ContextLimit,
    admit,
    check_choices,
    check_key,
    check_model,
    most_requests,
)
from serve_app.telemetry.metrics import RequestMetrics
from serve_app.telemetry.request import Observation
from serve_app.telemetry.tracing import Telemetry

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
        self._encoder = PromptEncoder(tokenizer)

    async def answer(self, request: Request, route: str) -> Response:
        """Answer one generation request, and record its outcome exactly once.

        Raises:
            ApiError: the request is refused; the application's handler makes the response.
        """
        deadline = asyncio.get_running_loop().time() + self.config.request_timeout_s
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
            async with asyncio.timeout_at(deadline):
                raw = await read_body(request, self.config.max_body_bytes)
            body = parse(_BODIES[route], raw)
            check_model(body.model, self.config.served_name)
            return await self._respond(body, observation, deadline)
        except asyncio.CancelledError:
            observation.finish(None, status=499, disconnected=True)
            raise
        except Exception as error:
            known = to_api_error(error)
            observation.finish(known, status=known.status)
            raise

    async def _respond(
        self, body: AnyRequest, observation: Observation, deadline: float
    ) -> Response:
        request_id = uuid.uuid4().hex
        check_choices(body, most_requests(self.config))
        info = await self.engines.info()
        prompts = await self._encode(body, ContextLimit.of(info), deadline)
        requests = admit(
            body,
            prompts,
            request_id=request_id,
            info=info,
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

    async def _encode(
        self, body: AnyRequest, limit: ContextLimit, deadline: float
    ) -> list[list[int]]:
        """Token ids of each prompt of the body."""
        if isinstance(body, ChatRequest):
            return [await self._encoder.encode_chat(body.conversation(), limit, deadline)]
        return await self._encoder.encode(body.prompts(), limit, deadline)

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
