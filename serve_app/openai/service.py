"""The path of one generation request, and the objects that all requests share.

`Service.answer` calls, in this order:

    check_key -> read_body -> parse -> check_model -> tokenize -> admit -> open_stream
              -> 200 and Answer.sse, or Answer.collect and 200

Everything that can be refused is refused before the 200; a later failure is reported in-band.
routes.py calls it; it knows no Ray.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Send

from serve_app.config import ServeConfig
from serve_app.engines.protocol import EngineClient
from serve_app.errors import DeadlineExceeded, to_api_error
from serve_app.openai.answers import ChatFormat, CompletionFormat
from serve_app.openai.body import read_body
from serve_app.openai.echoed import EchoedPrompt
from serve_app.openai.logprobs import LogprobStyle
from serve_app.openai.requests import AnyRequest, BodyParser, ChatRequest, CompletionRequest
from serve_app.openai.stream import Answer, open_stream
from serve_app.openai.tokenizer import Tokenizer
from serve_app.routing.checks import admit, check_key, check_model, check_prompt_logprobs
from serve_app.telemetry.metrics import RequestMetrics
from serve_app.telemetry.request import Observation
from serve_app.telemetry.tracing import Telemetry

Result = TypeVar("Result")

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
        self._parser = BodyParser()
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
            raw = await read_body(request, self.config.max_body_bytes)
            body = await self._parser.parse(_BODIES[route], raw)
            if body.model:  # without one, the model that is served is meant
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
        check_prompt_logprobs(requests, self.config.max_prompt_logprobs)
        form = await self._format(body, request_id, prompts, deadline)
        num_prompt_tokens = sum(map(len, prompts))
        observation.describe(
            requests,
            model=self.config.served_name,
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
        return Response(whole, media_type="application/json")

    async def _format(
        self, body: AnyRequest, request_id: str, prompts: list[list[int]], deadline: float
    ) -> ChatFormat | CompletionFormat:
        """How the answer is written, with the prompts that it echoes."""
        style = LogprobStyle(
            body.num_logprobs, body.prompt_logprobs, bool(body.return_tokens_as_token_ids)
        )
        model = self.config.served_name
        if isinstance(body, ChatRequest):
            return ChatFormat(request_id, model, style)
        echoes: list[EchoedPrompt] = []
        if body.echo:
            sent = body.prompts()
            echoes = await self._in_thread(lambda: self._echo(sent, prompts), deadline)
        return CompletionFormat(request_id, model, style, tuple(echoes), body.num_choices)

    def _echo(self, sent: list[str | list[int]], prompts: list[list[int]]) -> list[EchoedPrompt]:
        pairs = zip(sent, prompts, strict=True)
        return [EchoedPrompt.of(prompt, ids, self._tokenizer) for prompt, ids in pairs]

    async def _tokenize_in_thread(self, body: AnyRequest, deadline: float) -> list[list[int]]:
        """`_tokenize`. Conversations have threads of their own: a chat template may take seconds to
        fail, and prompts do not wait for that."""
        threads = self._chat_threads if isinstance(body, ChatRequest) else None
        return await self._in_thread(lambda: self._tokenize(body), deadline, threads)

    async def _in_thread(
        self, work: Callable[[], Result], deadline: float, threads: Executor | None = None
    ) -> Result:
        """Run work of the tokenizer beside the event loop, until the request's deadline."""
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.get_running_loop().run_in_executor(threads, work)
        except TimeoutError:
            raise DeadlineExceeded(
                "the request waited to be tokenized until its deadline; send it again later"
            ) from None

    def _tokenize(self, body: AnyRequest) -> list[list[int]]:
        """Token ids of each prompt of the body. Slow for long prompts: call it in a thread."""
        if isinstance(body, ChatRequest):
            special = bool(body.add_special_tokens)  # the template has its own
            return [self._tokenizer.encode_chat(body.conversation(), add_special_tokens=special)]
        special = body.add_special_tokens is not False
        return [
            self._tokenizer.encode(prompt, add_special_tokens=special)
            if isinstance(prompt, str)
            else prompt
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
