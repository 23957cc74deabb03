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
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from serve_app.config import ServeConfig
from serve_app.engines.protocol import EngineClient, GenerateRequest
from serve_app.errors import (
    ApiError,
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
from serve_app.openai.own_deadline import own_deadline_s
from serve_app.openai.pool_details import model_card
from serve_app.openai.prompts import PromptEncoder
from serve_app.openai.requests import AnyRequest, BodyParser, ChatRequest, CompletionRequest
from serve_app.openai.responses import EventStream, WholeAnswer, while_connected
from serve_app.openai.stream import Answer, MergedStream, open_stream
from serve_app.openai.tokenizer import Tokenizer
from serve_app.openai.unread import Unread, UnreadAnswers
from serve_app.routing.admission_client import Admission, OpenAdmission
from serve_app.routing.admission_stats import AdmissionStats
from serve_app.routing.checks import (
    ContextLimit,
    check_choices,
    check_model,
    check_prompt_logprobs,
    entry,
    most_requests,
    to_sequences,
)
from serve_app.routing.homes import Pools, assign
from serve_app.routing.key_watch import KeyWatch
from serve_app.routing.keys import Keys
from serve_app.routing.loading_board import LoadingBoard
from serve_app.routing.tenants import Tenant, read_tenants
from serve_app.routing.tickets import Enter, Leave
from serve_app.sections import Live
from serve_app.telemetry.access_log import AccessLog
from serve_app.telemetry.metrics import RequestMetrics
from serve_app.telemetry.request import Caller, Observation, Sinks, log_refused_key
from serve_app.telemetry.tracing import Telemetry

Result = TypeVar("Result")

_BODIES: dict[str, type[ChatRequest] | type[CompletionRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}


class Service:
    """The objects that the endpoints share: configuration, tokenizer, engines, metrics, tracer.

    `addresses_known` is false where every request seems to come from one address: a proxy's.
    `ingress` is the name of this ingress in the access log.

    The constructor raises ConfigError when the access log or the keys cannot be used.
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
        ingress: str = "0",
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.engines = engines
        self.telemetry = telemetry
        self.metrics = RequestMetrics()
        self.admission = admission or OpenAdmission()
        #: Asks the owner of admission for its figures; None where there is no owner.
        self.admission_stats: Callable[[], Awaitable[AdmissionStats]] | None = None
        #: The engine replicas that do not serve yet.
        self.loading = LoadingBoard()
        self.live = config.live
        self.keys = Keys(read_tenants(config.keys))
        self.bodies = BodyReader(
            max_body_bytes=config.http.max_body_bytes,
            timeout_s=config.http.body_timeout_s,
            max_bodies=config.http.max_open_bodies,
            max_total_bytes=config.http.max_open_body_bytes,
        )
        self.unread = UnreadAnswers(
            max_bytes=config.http.max_unread_bytes, timeout_s=config.http.client_timeout_s
        )
        self.metrics.measure("intserve_unread_bytes", lambda: self.unread.num_bytes)
        target = config.telemetry.access_log
        self.access_log = None if target is None else AccessLog(target, self._note_lost_lines)
        self._sinks = Sinks(telemetry, self.metrics, self.access_log, ingress)
        self._addresses_known = addresses_known
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
        except TooManyFailedKeys as error:
            self._note_refused_key(request, error, "limited")
            raise
        except Unauthorized as error:
            reason = "wrong" if "authorization" in request.headers else "missing"
            self._note_refused_key(request, error, reason)
            raise

    def _note_refused_key(self, request: Request, error: ApiError, reason: str) -> None:
        self.metrics.count("intserve_refused_keys_total", 1, reason)
        route = request.scope.get("route")  # as we wrote it: the path is the client's
        caller = Caller(key=None, address=self.client_host(request))
        path = str(getattr(route, "path", "unknown"))
        log_refused_key(self._sinks, path, request.method, error, caller)

    def _note_lost_lines(self, number: int) -> None:
        self.metrics.count("intserve_access_log_dropped_total", number)

    def count_resume(self, outcome: str) -> None:
        """Count how it ended that a sequence lost its replica."""
        self.metrics.count("intserve_resumes_total", 1, outcome)

    def close(self) -> None:
        """Write what telemetry still holds."""
        self.telemetry.shutdown()
        if self.access_log is not None:
            self.access_log.close()

    async def answer(self, request: Request, route: str) -> Response:
        """Answer one generation request, and record its outcome exactly once.

        Raises:
            ApiError: the request is refused; the application's handler makes the response.
        """
        arrived = asyncio.get_running_loop().time()
        deadline = arrived + self.live.requests.timeout_s
        tenant = self.check_key(request)
        chat = _BODIES[route] is ChatRequest
        request_id = uuid.uuid4().hex
        observation = Observation(
            self._sinks,
            request_id=request_id,
            operation="chat" if chat else "text_completion",
            route=route,
            headers=request.headers,
            caller=Caller(
                key=tenant.name if self.keys.required else None, address=self.client_host(request)
            ),
            trusted=self.keys.required,
        )
        try:
            own_s = own_deadline_s(request.headers)
            if own_s is not None:
                deadline = min(deadline, arrived + own_s)
            raw = await self.bodies.read(request, arrived=arrived, deadline=deadline)
            body = await self._parser.parse(_BODIES[route], raw)
            check_model(body.model, self.config.served_name, tenant)
            answered = self._respond(
                body,
                request_id,
                tenant,
                observation,
                deadline,
                own_deadline=own_s is not None,
                session=self._session(request),
            )
            return await while_connected(request.receive, answered)
        except asyncio.CancelledError:
            observation.finish(None, status=499, disconnected=True)
            raise
        except ClientDisconnect:  # nobody reads an answer
            observation.finish(None, status=499, disconnected=True)
            return Response(status_code=499)
        except Exception as error:
            known = to_api_error(error)
            observation.finish(known, status=known.status)
            raise

    async def _respond(
        self,
        body: AnyRequest,
        request_id: str,
        tenant: Tenant,
        observation: Observation,
        deadline: float,
        own_deadline: bool,
        session: str | None,
    ) -> Response:
        live = self.live
        check_choices(body, most_requests(self.config, live.admission))
        pools = await self.pools()
        prompts = await self._encode(body, pools.largest, deadline)
        requests = to_sequences(
            body,
            prompts,
            request_id=request_id,
            limit=pools.largest,
            vocab_size=self.tokenizer.vocab_size,
            default_max_tokens=live.requests.default_max_tokens,
            trace_context=observation.trace_context,
            cache_salt=tenant.cache_salt(body.cache_salt),
        )
        requests = assign(
            requests,
            pools,
            live.routing,
            session=session,
            opening=body.opening() if isinstance(body, ChatRequest) else None,
            arrived=observation.arrived,
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

        visit = entry(
            request_id,
            tenant.terms(live.admission.key_limits),
            requests,
            reserved_output=live.admission.reserved_output,
            page_tokens=pools.page_tokens,
            seconds_left=deadline - asyncio.get_running_loop().time(),
            own_deadline=own_deadline,
        )
        unread = self.unread.open_one()
        try:
            merged = await self._open(visit, requests, deadline, observation, unread)
            answer = Answer(merged, form, len(requests), observation.event, unread.add)
            if body.stream:
                chunks = answer.sse(
                    num_prompt_tokens,
                    include_usage=body.include_usage,
                    continuous_usage=body.continuous_usage,
                )
                if body.include_obfuscation:
                    chunks = obfuscate(chunks)
                return EventStream(chunks, answer, observation, unread)
            try:
                whole = await answer.collect(num_prompt_tokens)
            finally:
                merged.close()
            return WholeAnswer(whole, observation, unread)
        except BaseException:
            unread.end()
            raise

    async def _open(
        self,
        visit: Enter,
        requests: Sequence[GenerateRequest],
        deadline: float,
        observation: Observation,
        unread: Unread,
    ) -> MergedStream:
        """Enter, and await the first event. A request that fails or is cancelled meanwhile has left
        when this raises."""
        observation.entered()
        try:
            await self.admission.enter(visit)
            return await open_stream(
                self.engines,
                requests,
                deadline,
                on_close=self._leave,
                on_placed=observation.placed,
                note_unread=unread.add,
            )
        except BaseException:
            for request in requests:  # also where `enter` was cancelled: it may have got through
                self._leave(request.request_id, 0)
            raise

    def _leave(self, sequence_id: str, used_tokens: int) -> None:
        """Give back the place of a sequence that may never have run."""
        self.admission.leave(Leave(sequence_id=sequence_id, used_tokens=used_tokens))

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

    async def pools(self) -> Pools:
        """The pools as they are known now.

        Raises:
            EngineUnavailable: nothing is known of any. It is waited for a while: an ingress may not
                have heard of an engine yet.
        """
        sections = self.config.pools
        told = any(pool.max_request_tokens is not None for pool in sections.values())
        return Pools.of(sections, await self.engines.infos(wait=not told))

    def _session(self, request: Request) -> str | None:
        """What the client calls its session."""
        name = self.live.routing.session_header
        return None if name is None else request.headers.get(name)

    async def model_card(self) -> dict[str, Any]:
        """The model as /v1/models tells it, with vLLM's `max_model_len`, and what each pool holds.

        Raises:
            EngineUnavailable: see `pools`.
        """
        pools = await self.pools()
        try:
            statuses = await self.engines.statuses()
        except EngineUnavailable:
            statuses = []
        infos = await self.engines.infos(wait=False)
        return model_card(self.config, pools, infos, statuses, created=self.started)
