"""The echo service on a real Ray Serve instance, with real clients over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from ray import cloudpickle, serve
from support.configs import make_config
from support.otlp import OtlpReceiver, read_attributes
from support.serving import metric, read_sse, wait_for

from serve_app.app import build, build_with
from serve_app.config import EchoOptions, ServeConfig
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Event, GenerateRequest, Tokens
from serve_app.local import _quiet_serve

pytestmark = pytest.mark.ray

CHAT: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "hello there"}]}
SAID = "user: hello there"


class MortalEngine(EchoEngine):
    """An echo whose process dies when the prompt says so."""

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        fault = bytes(request.prompt_ids).decode()
        if fault == "die now":
            os._exit(1)
        if fault == "die later":
            yield Tokens((1,), "x")
            await asyncio.sleep(0.3)
            os._exit(1)
        async for event in super().generate(request):
            yield event


@pytest.fixture(scope="module")
def url(serve_url: str, otlp: OtlpReceiver) -> Iterator[str]:
    """An echo application with two ingress replicas, traced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.endpoint)
        patch.setenv("OTEL_SERVICE_NAME", "intserve-test")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        config = make_config(
            echo=EchoOptions(ttft_s=0.02, itl_s=0.002),
            ingress={"replicas": 2},
            max_body_bytes=10_000,
            drain_s=2.0,
        )
        serve.run(build(config), name="echo", route_prefix="/echo")
    yield f"{serve_url}/echo/v1"
    serve.delete("echo")


@pytest.fixture(scope="module")
def small_url(serve_url: str) -> Iterator[str]:
    """Two places, one more in the queue, and an engine that can die."""
    config = make_config(
        echo=EchoOptions(itl_s=0.02),
        max_ongoing_requests=2,
        max_queued_requests=1,
        drain_s=2.0,
        health_check_period_s=1.0,
        timeout_s=30.0,
        enabled=False,  # a request that kills its engine kills one
    )
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    options = config.pool.engine
    try:
        app = build_with(config, lambda: MortalEngine(options))
        serve.run(app, name="small", route_prefix="/small")
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    yield f"{serve_url}/small/v1"
    serve.delete("small")


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


def scrape(url: str) -> str:
    return httpx.get(url.removesuffix("/v1") + "/metrics", timeout=10).text


def test_the_openai_client_chats(client: OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=1, n=2)
    assert [choice.message.content for choice in answer.choices] == [SAID, SAID]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2 * len(SAID)
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == SAID
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").owned_by == "intserve"


def test_the_openai_client_streams(client: OpenAI) -> None:
    options = {"include_usage": True}
    with client.chat.completions.create(**CHAT, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == SAID
    assert chunks[-1].usage.completion_tokens == len(SAID)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    with client.completions.create(model="echo", prompt="abc", stream=True) as pieces:
        assert "".join(piece.choices[0].text for piece in pieces) == "abc"


def test_the_openai_client_gets_its_own_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4") as unknown:
        client.chat.completions.create(**CHAT | {"model": "gpt-4"})
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as negative:
        client.chat.completions.create(**CHAT, max_tokens=-1)
    assert negative.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError, match="5000 tokens"):
        client.completions.create(model="echo", prompt="x" * 5000)
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model="echo", prompt="x" * 20_000)
    assert large.value.status_code == 413


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_of_every_prompt_of_one_request_is_answered(url: str, stream: bool) -> None:
    """Each is a call of its own to an engine replica."""
    prompts = ["first", "the second"]
    body = {"model": "echo", "prompt": prompts, "n": 3, "stream": stream}
    answer = httpx.post(f"{url}/completions", json=body, timeout=30)
    said = dict.fromkeys(range(6), "")
    for item in read_sse(answer.text)[:-1] if stream else [answer.json()]:
        for choice in item["choices"]:
            said[choice["index"]] += choice["text"]
    assert list(said.values()) == [text for text in prompts for _ in range(3)]


async def test_concurrent_streams_do_not_mix(url: str) -> None:
    async def ask(client: AsyncOpenAI, number: int) -> None:
        prompt = f"request {number} " * 5
        stream = await client.completions.create(model="echo", prompt=prompt, stream=True)
        assert "".join([piece.choices[0].text async for piece in stream]) == prompt

    async with AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        await asyncio.gather(*(ask(client, number) for number in range(24)))


def test_one_streamed_request_is_one_trace_from_http_to_decode(
    url: str, otlp: OtlpReceiver
) -> None:
    trace_id, client_span = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace_id}-{client_span}-01"}
    body = CHAT | {"stream": True, "max_tokens": 6}
    answer = httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=30)
    assert read_sse(answer.text)[-1] == "[DONE]"

    pairs = otlp.trace(trace_id, expected=5)
    spans = {span.name: span for _, span in pairs}
    assert sorted(spans) == ["chat echo", "decode", "engine.generate", "prefill", "queue"]
    assert len(pairs) == 5
    assert {resource["service.name"] for resource, _ in pairs} == {"intserve-test"}

    root, engine = spans["chat echo"], spans["engine.generate"]
    assert root.kind == root.SPAN_KIND_SERVER
    assert root.parent_span_id.hex() == client_span
    assert engine.parent_span_id == root.span_id
    told = read_attributes(root.attributes)
    assert told["http.response.status_code"] == 200
    assert told["gen_ai.request.stream"] is True
    assert told["gen_ai.usage.input_tokens"] == len(SAID)
    assert told["gen_ai.usage.output_tokens"] == 6
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    for name in ("queue", "prefill", "decode"):
        assert spans[name].parent_span_id == engine.span_id
        assert spans[name].start_time_unix_nano >= engine.start_time_unix_nano
    prefill = read_attributes(spans["prefill"].attributes)
    assert prefill["gen_ai.usage.input_tokens"] == len(SAID)
    assert read_attributes(spans["decode"].attributes)["gen_ai.usage.output_tokens"] == 6
    decode_ns = spans["decode"].end_time_unix_nano - spans["decode"].start_time_unix_nano
    assert 0 < decode_ns < root.end_time_unix_nano - root.start_time_unix_nano
    assert spans["prefill"].end_time_unix_nano == spans["decode"].start_time_unix_nano
    assert all("hello there" not in str(span) for span in spans.values())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(url: str, stream: bool) -> None:
    def used() -> float:
        return metric(scrape(url), "intserve_engine_kv_tokens_used")

    def ask_and_leave() -> None:
        body = {"model": "echo", "prompt": "x" * 100, "max_tokens": 3900, "ignore_eos": True}
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.stream(
                "POST", f"{url}/completions", json=body | {"stream": stream}, timeout=2.5
            ) as answer,
        ):
            leave.wait(10)
            answer.close()

    before = metric(scrape(url), "intserve_requests_total", outcome="disconnected")
    wait_for(lambda: used() == 0)
    leave = threading.Event()
    client = threading.Thread(target=ask_and_leave)
    client.start()
    wait_for(lambda: used() == 4000)
    leave.set()
    client.join()
    # The whole answer takes eight seconds: what is free sooner was freed by the abort.
    wait_for(lambda: used() == 0, 4.0)
    told = scrape(url)
    assert metric(told, "intserve_requests_in_flight") == 0
    assert metric(told, "intserve_requests_total", outcome="disconnected") == before + 1


def test_a_scrape_of_any_ingress_tells_of_all(url: str) -> None:
    def count(text: str) -> float:
        return metric(text, "intserve_requests_total", outcome="ok")

    before = count(scrape(url))
    for _ in range(10):
        httpx.post(f"{url}/completions", json={"model": "echo", "prompt": "a"}).raise_for_status()
    scrapes = [scrape(url) for _ in range(4)]
    assert {count(text) for text in scrapes} == {before + 10}
    ids = {
        part.split('ingress="')[1].split('"')[0]
        for part in scrapes[0].split("\n")
        if part.startswith("intserve_requests_in_flight{")
    }
    assert len(ids) == 2


async def test_overload_is_429_with_retry_after_and_health_still_answers(small_url: str) -> None:
    url = f"{small_url}/completions"
    short = {"model": "echo", "prompt": "queued"}
    endless = {"model": "echo", "prompt": "x" * 1000, "max_tokens": 3000, "ignore_eos": True}

    async with httpx.AsyncClient(timeout=30) as client, contextlib.AsyncExitStack() as streams:
        open_lines = []  # httpx closes the connection when an iterator over it is collected
        for _ in range(2):  # both places
            call = client.stream("POST", url, json=endless | {"stream": True})
            lines = (await streams.enter_async_context(call)).aiter_lines()
            await anext(lines)
            open_lines.append(lines)
        queued = asyncio.create_task(client.post(url, json=short))
        async with asyncio.timeout(20):
            while metric(scrape(small_url), "intserve_requests_in_flight") < 3:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)  # from the ingress into the queue behind it
        refused = [await client.post(url, json=short | {"stream": s}) for s in (False, True)]
        health = await client.get(small_url.removesuffix("/v1") + "/health")
        assert not queued.done()
        await streams.aclose()  # leaving frees a place for the one that waits
        assert (await queued).json()["choices"][0]["text"] == "queued"
    for answer in refused:
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
    assert health.status_code == 200


def test_a_dead_engine_is_503_or_told_in_band_and_comes_back(small_url: str) -> None:
    def post(prompt: str, **fields: Any) -> httpx.Response:
        body = {"model": "echo", "prompt": prompt, **fields}
        return httpx.post(f"{small_url}/completions", json=body, timeout=40)

    answer = post("die later", stream=True)
    first, *rest = read_sse(answer.text)
    assert answer.status_code == 200
    assert first["choices"][0]["text"] == "x"
    assert [item["error"]["code"] for item in rest] == ["engine_unavailable"]

    wait_for(lambda: post("back?").status_code == 200)
    answer = post("die now", stream=True)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_unavailable"
    assert "retry-after" in answer.headers
    wait_for(lambda: post("back?").status_code == 200)


def test_serve_can_turn_the_args_of_a_deploy_file_into_our_settings() -> None:
    # What `serve deploy` does with `args`: it wants the class itself, not its name as a string.
    (parameter,) = inspect.signature(build).parameters.values()
    assert parameter.annotation is ServeConfig
    args = {"pools": {"default": {"engine": {"kind": "echo", "ttft_s": 0.5}}}}
    assert ServeConfig.model_validate(args).pool.engine == EchoOptions(ttft_s=0.5)


def test_serves_logger_in_this_process_is_quiet_only_while_it_is_used_here() -> None:
    logger = logging.getLogger("ray.serve")
    before = logger.level
    with _quiet_serve():
        assert logger.level == logging.WARNING
    assert logger.level == before
