"""The path of one generation request, and the objects that all requests share.

`Service.answer` calls, in this order:

    check_key -> BodyReader.read -> parse -> check_model -> check_choices -> encode -> to_sequences
              -> enter -> open_stream -> 200 and Answer.sse, or Answer.collect and 200

The deadline runs from the first of them. Until the key is checked a request is nobody's: nothing of
it is traced, and only the refusal is counted. What can be refused is refused before the 200; a
later failure is reported in-band. routes.py calls it; it knows no Ray.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Send

from serve_app.config import ServeConfig
from serve_app.engines.protocol import EngineClient, EngineInfo
from serve_app.errors import (
    EngineUnavailable,
    TooManyFailedKeys,
    Unauthorized,
    to_api_error,
)
from serve_app.openai.answers import ChatFormat, CompletionFormat
from serve_app.openai.body import BodyReader
from serve_app.openai.echoed import EchoedPrompt
from serve_app.openai.logprobs import LogprobStyle
from serve_app.openai.obfuscation import obfuscate
from serve_app.openai.prompts import PromptEncoder
from serve_app.openai.requests import AnyRequest, BodyParser, ChatRequest, CompletionRequest
from serve_app.openai.stream import Answer, open_stream
from serve_app.openai.tokenizer import Tokenizer
from serve_app.routing.admission_client import Admission, OpenAdmission
from serve_app.routing.checks import (
    ContextLimit,
    check_choices,
    check_model,
    check_prompt_logprobs,
    entry,
    most_requests,
    to_sequences,
)
from serve_app.routing.key_watch import KeyWatch
from serve_app.routing.keys import Keys
from serve_app.routing.tenants import Tenant, read_tenants
from serve_app.routing.tickets import Leave
from serve_app.sections import Live
from serve_app.telemetry.metrics import RequestMetrics
from serve_app.telemetry.request import Observation
from serve_app.telemetry.tracing import Telemetry

Result = TypeVar("Result")

_BODIES: dict[str, type[ChatRequest] | type[CompletionRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}


class Service:
    """The objects that the endpoints share: configuration, tokenizer, engines, metrics, tracer.

    `addresses_known` is false where every request seems to come from one address: a proxy's.
    """

    def __init__(
        self,
        config: ServeConfig,
        tokenizer: Tokenizer,
        engines: EngineClient,
        telemetry: Telemetry,
        *,
        admission: Admission | None = None,
        addresses_known: bool = True,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.engines = engines
        self.telemetry = telemetry
        self.metrics = RequestMetrics()
        self.admission = admission or OpenAdmission()
        self.live = config.live
        self.keys = Keys(read_tenants(config.keys))
        self.bodies = BodyReader(
            max_body_bytes=config.http.max_body_bytes,
            timeout_s=config.http.body_timeout_s,
            max_bodies=config.http.max_open_bodies,
            max_total_bytes=config.http.max_open_body_bytes,
        )
        self._addresses_known = addresses_known
        self._info: EngineInfo | None = None
        self.started = int(time.time())
        self._parser = BodyParser(config.served_name)
        self.encoder = PromptEncoder(tokenizer)

    def reconfigure(self, live: Live) -> None:
        """Take in changed settings; requests under way keep those that they began with."""
        self.live = live

    def watch_keys(self) -> asyncio.Task[None] | None:
        """Start to read the file of keys again when it changes, if there is one; the caller cancels
        the task."""
        if self.config.keys.file is None:
            return None

        def note_failed(failed: bool) -> None:
            self.metrics.set("intserve_key_reload_failed", failed)

        return asyncio.create_task(KeyWatch(self.config.keys, self.keys, note_failed).run())

    def client_host(self, request: Request) -> str | None:
        """The client's address, None where it is not known. Never from a header of the client's:
        the server in front believes `X-Forwarded-For` of this machine's own proxies only."""
        known = self._addresses_known and request.client is not None
        return request.client.host if known and request.client is not None else None

    def check_key(self, request: Request) -> Tenant:
        """Whose the request is; one without a right key is counted and refused, where keys are
        configured.

        Raises:
            Unauthorized, TooManyFailedKeys: see `Keys.check`.
        """
        try:
            return self.keys.check(request.headers, self.client_host(request))
        except TooManyFailedKeys:
            self.metrics.count("intserve_refused_keys_total", 1, "limited")
            raise
        except Unauthorized:
            reason = "wrong" if "authorization" in request.headers else "missing"
            self.metrics.count("intserve_refused_keys_total", 1, reason)
            raise

    async def answer(self, request: Request, route: str) -> Response:
        """Answer one generation request, and record its outcome exactly once.

        Raises:
            ApiError: the request is refused; the application's handler makes the response.
        """
        arrived = asyncio.get_running_loop().time()
        deadline = arrived + self.live.requests.timeout_s
        tenant = self.check_key(request)
        chat = _BODIES[route] is ChatRequest
        observation = Observation(
            self.telemetry,
            self.metrics,
            operation="chat" if chat else "text_completion",
            route=route,
            headers=request.headers,
            trusted=self.keys.required,
        )
        try:
            raw = await self.bodies.read(request, arrived=arrived, deadline=deadline)
            body = await self._parser.parse(_BODIES[route], raw)
            check_model(body.model, self.config.served_name, tenant)
            return await self._respond(body, tenant, observation, deadline)
        except asyncio.CancelledError:
            observation.finish(None, status=499, disconnected=True)
            raise
        except ClientDisconnect:  # while the body was arriving: nobody reads an answer
            observation.finish(None, status=499, disconnected=True)
            return Response(status_code=499)
        except Exception as error:
            known = to_api_error(error)
            observation.finish(known, status=known.status)
            raise

    async def _respond(
        self, body: AnyRequest, tenant: Tenant, observation: Observation, deadline: float
    ) -> Response:
        request_id = uuid.uuid4().hex
        live = self.live
        check_choices(body, most_requests(self.config, live.admission))
        info = await self.engines.info()
        prompts = await self._encode(body, ContextLimit.of(info), deadline)
        requests = to_sequences(
            body,
            prompts,
            request_id=request_id,
            info=info,
            vocab_size=self.tokenizer.vocab_size,
            default_max_tokens=live.requests.default_max_tokens,
            trace_context=observation.trace_context,
            cache_salt=tenant.cache_salt(body.cache_salt),
        )
        check_prompt_logprobs(requests, live.requests.max_prompt_logprobs)
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

        loop = asyncio.get_running_loop()
        await self.admission.enter(
            entry(
                request_id,
                tenant.terms(live.admission.key_limits),
                requests,
                reserved_output=live.admission.reserved_output,
                page_tokens=info.page_tokens,
                seconds_left=deadline - loop.time(),
            )
        )
        merged = await open_stream(self.engines, requests, deadline, on_close=self._leave)
        answer = Answer(merged, form, len(requests), observation.event)
        if body.stream:
            chunks = answer.sse(
                num_prompt_tokens,
                include_usage=body.include_usage,
                continuous_usage=body.continuous_usage,
            )
            if body.include_obfuscation:
                chunks = obfuscate(chunks)
            return EventStream(chunks, answer, observation)
        try:
            whole = await answer.collect(num_prompt_tokens)
        finally:
            merged.close()
        observation.finish(None, status=200)
        return Response(whole, media_type="application/json")

    def _leave(self, sequence_id: str) -> None:
        """Give back the place of a sequence that may never have run."""
        self.admission.leave(Leave(sequence_id=sequence_id, used_tokens=0))

    async def _encode(
        self, body: AnyRequest, limit: ContextLimit, deadline: float
    ) -> list[list[int]]:
        """Token ids of each prompt of the body."""
        special = body.add_special_tokens
        if isinstance(body, ChatRequest):  # the template has its own
            conversation = body.conversation()
            return [
                await self.encoder.encode_chat(
                    conversation, limit, deadline, special_tokens=bool(special)
                )
            ]
        return await self.encoder.encode(
            body.prompts(), limit, deadline, special_tokens=special is not False
        )

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
            size = sum(len(prompt) for prompt in sent if not isinstance(prompt, str))
            echoes = await self.encoder.run(lambda: self._echo(sent, prompts), size, deadline)
        return CompletionFormat(request_id, model, style, tuple(echoes), body.num_choices)

    def _echo(self, sent: list[str | list[int]], prompts: list[list[int]]) -> list[EchoedPrompt]:
        pairs = zip(sent, prompts, strict=True)
        return [EchoedPrompt.of(prompt, ids, self.tokenizer) for prompt, ids in pairs]

    async def read_plain(
        self, request: Request, parse: Callable[[bytes], Result]
    ) -> tuple[Result, float, Tenant]:
        """The body of a request that generates nothing, after its key; the request's deadline, on
        the running loop's clock; and whose it is."""
        arrived = asyncio.get_running_loop().time()
        deadline = arrived + self.live.requests.timeout_s
        tenant = self.check_key(request)
        raw = await self.bodies.read(request, arrived=arrived, deadline=deadline)
        return await self._parser.run(parse, raw), deadline, tenant

    async def model_card(self) -> dict[str, Any]:
        """The model as /v1/models tells it, with vLLM's `max_model_len`.

        Raises:
            EngineUnavailable: no engine has ever been ready, so that its length is not known. It is
                waited for a while, as generation does: an ingress may not have heard of one yet.
        """
        try:
            self._info = (await self.engines.statuses())[0].info
        except EngineUnavailable:
            self._info = self._info or await self.engines.info()
        return {
            "id": self.config.served_name,
            "object": "model",
            "created": self.started,
            "owned_by": "intserve",
            "root": self.config.served_name,
            "parent": None,
            "max_model_len": self._info.max_model_len,
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
