"""The HTTP API over an engine in this process: answers, errors, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from support.serving import FaultyEngine, LocalEngines, client_of, make_service, metric, read_sse

from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.errors import EngineUnavailable
from serve_app.telemetry.metrics import ENGINE_METRICS, LOADING_METRICS, OF_LOADING, REQUEST_METRICS

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
JSON = {"content-type": "application/json"}


def chat(content: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": content}], **fields}


def text(prompt: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "prompt": prompt, **fields}


def assert_error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (CHAT, b"{", 400, "invalid_json"),
        (CHAT, b"\xff\xfe", 400, "invalid_json"),
        (CHAT, json.dumps(chat(model="gpt-4")).encode(), 404, "model_not_found"),
        (CHAT, json.dumps(chat(max_tokens=-5)).encode(), 400, "invalid_value"),
        (CHAT, json.dumps(chat(tools=[{"type": "function"}])).encode(), 400, "unsupported_field"),
        (CHAT, json.dumps(chat(colour="red")).encode(), 400, "unknown_field"),
        (CHAT, json.dumps(chat("x" * 5000)).encode(), 400, "context_length_exceeded"),
        (CHAT, json.dumps(chat(max_tokens=5000)).encode(), 400, "context_length_exceeded"),
        (TEXT, json.dumps(text("")).encode(), 400, "invalid_value"),
        (TEXT, json.dumps(text([256])).encode(), 400, "invalid_value"),
        (TEXT, json.dumps(text(["a"] * 70, n=2)).encode(), 400, "invalid_value"),
        (TEXT, b"x" * (4 * 2**20 + 1), 413, "body_too_large"),
        ("/v1/embeddings", b"{}", 404, "unknown_path"),
        ("/v1/models", b"{}", 405, "method_not_allowed"),
    ],
)
async def test_every_refusal_has_openais_shape(
    path: str, body: bytes, status: int, code: str
) -> None:
    service = make_service()
    async with client_of(service) as client:
        assert_error(await client.post(path, content=body, headers=JSON), status, code)
    assert metric(service.metrics.snapshot(), "intserve_requests_in_flight") == 0


async def test_an_over_long_prompt_is_told_both_lengths() -> None:
    async with client_of(make_service()) as client:
        error = assert_error(
            await client.post(TEXT, json=text("x" * 4090, max_tokens=10)),
            400,
            "context_length_exceeded",
        )
    assert "4090" in error["message"]
    assert "4096" in error["message"]
    assert "at most 6" in error["message"]


async def test_a_body_without_a_length_is_cut_off_at_the_limit() -> None:
    async def endless() -> Any:
        for _ in range(100):
            yield b"x" * 1000

    async with client_of(make_service(max_body_bytes=5000)) as client:
        assert_error(
            await client.post(TEXT, content=endless(), headers=JSON), 413, "body_too_large"
        )


async def test_models_lists_what_is_served() -> None:
    async with client_of(make_service(model_name="a/b")) as client:
        listed = (await client.get("/v1/models")).json()
        assert [card["id"] for card in listed["data"]] == ["a/b"]
        assert (await client.get("/v1/models/a/b")).json() == listed["data"][0]
        assert_error(await client.get("/v1/models/c"), 404, "model_not_found")


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_streamed_and_whole_answers_say_the_same(path: str) -> None:
    fields = {"n": 2, "logprobs": True if path == CHAT else 1, "max_tokens": 9}
    body = chat("wörld", **fields) if path == CHAT else text("wörld é", **fields)
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with client_of(make_service()) as client:
        whole = (await client.post(path, json=body)).json()
        answer = await client.post(path, json=streamed)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last, end = read_sse(answer.text)
    assert end == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    for index, choice in enumerate(whole["choices"]):
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        if path == CHAT:
            told = "".join(part["delta"].get("content", "") for part in parts)
            assert told == choice["message"]["content"] == "user: wö"
            assert [part["delta"].get("role") for part in parts[:2]] == ["assistant", None]
            entries = [e for p in parts if p["logprobs"] for e in p["logprobs"]["content"]]
            assert entries == choice["logprobs"]["content"]
        else:
            told = "".join(part["text"] for part in parts)
            assert told == choice["text"] == "wörld é"
            offsets = [o for p in parts if p["logprobs"] for o in p["logprobs"]["text_offset"]]
            assert offsets == choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 3, 4, 5, 6, 6]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == choice["finish_reason"] == "length"


async def test_usage_counts_each_prompt_once_and_each_choice() -> None:
    async with client_of(make_service()) as client:
        answer = await client.post(TEXT, json=text([[97, 98], [99]], n=3))
    assert [choice["text"] for choice in answer.json()["choices"]] == ["ab"] * 3 + ["c"] * 3
    assert [choice["index"] for choice in answer.json()["choices"]] == list(range(6))
    usage = answer.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 9, 12)


@pytest.mark.parametrize("stop", ["lo w", ["zzz", "lo w"]])
async def test_a_stop_string_ends_the_answer_and_is_not_shown(stop: Any) -> None:
    async with client_of(make_service()) as client:
        whole = await client.post(TEXT, json=text("hello world", stop=stop))
        parts = await client.post(TEXT, json=text("hello world", stop=stop, stream=True))
    assert whole.json()["choices"][0]["text"] == "hel"
    assert whole.json()["choices"][0]["finish_reason"] == "stop"
    told = [chunk["choices"][0]["text"] for chunk in read_sse(parts.text)[:-1]]
    assert "".join(told) == "hel"


async def test_the_default_length_is_cut_to_what_the_context_leaves() -> None:
    service = make_service(echo=EchoOptions(max_model_len=20))
    async with client_of(service) as client:
        answer = await client.post(TEXT, json=text("x" * 15, ignore_eos=True))
    assert answer.json()["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(
    ("fault", "status", "code", "retry_after"),
    [
        ("overloaded", 429, "overloaded", "7"),
        ("unavailable", 503, "engine_unavailable", "5"),
        ("failed", 500, "engine_failed", None),
        ("bug", 500, "internal_error", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_is_told_by_the_status(
    fault: str, status: int, code: str, retry_after: str | None, stream: bool
) -> None:
    service = make_service(FaultyEngine(EchoOptions()))
    async with client_of(service) as client:
        answer = await client.post(TEXT, json=text(fault, stream=stream))
        error = assert_error(answer, status, code)
        assert answer.headers.get("retry-after") == retry_after
        assert "secret-detail" not in error["message"]
    told = service.metrics.snapshot()
    assert metric(told, "intserve_requests_total", outcome=code) == 1
    assert metric(told, "intserve_requests_in_flight") == 0


@pytest.mark.parametrize("fault", ["late-failed", "late-bug", "silent"])
async def test_a_failure_after_the_first_byte_is_told_in_band_and_ends_the_stream(
    fault: str,
) -> None:
    service = make_service(FaultyEngine(EchoOptions()))
    async with client_of(service) as client:
        streamed = await client.post(TEXT, json=text(fault, stream=True))
        whole = await client.post(TEXT, json=text(fault))
    first, *rest = read_sse(streamed.text)
    assert streamed.status_code == 200
    assert first["choices"][0]["text"] == "hi"
    assert len(rest) == 1
    assert set(rest[0]["error"]) == {"message", "type", "param", "code"}
    assert "secret-detail" not in streamed.text
    code = rest[0]["error"]["code"]
    assert code == ("engine_failed" if fault == "late-failed" else "internal_error")
    assert_error(whole, 500, code)
    told = service.metrics.snapshot()
    assert metric(told, "intserve_requests_total", outcome=code) == 2
    assert metric(told, "intserve_requests_in_flight") == 0


@pytest.mark.parametrize("slow", [{"ttft_s": 30.0}, {"itl_s": 30.0}])
async def test_the_deadline_covers_the_whole_answer(slow: dict[str, float]) -> None:
    engine = EchoEngine(EchoOptions(**slow))
    service = make_service(engine, timeout_s=0.1)
    async with client_of(service) as client:
        assert_error(await client.post(TEXT, json=text()), 504, "deadline_exceeded")
        streamed = await client.post(TEXT, json=text(stream=True))
    if "ttft_s" in slow:
        assert_error(streamed, 504, "deadline_exceeded")
    else:
        assert "deadline" in read_sse(streamed.text)[-1]["error"]["message"]
    for _ in range(5):
        await asyncio.sleep(0)
    assert engine.load().running == 0


async def test_a_client_that_leaves_frees_its_place() -> None:
    engine = EchoEngine(EchoOptions(itl_s=30.0))
    service = make_service(engine)
    async with client_of(service) as client:
        for stream in (False, True):
            call = asyncio.create_task(client.post(TEXT, json=text(stream=stream, n=2)))
            async with asyncio.timeout(5):
                while engine.load().running < 2:
                    await asyncio.sleep(0.001)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            async with asyncio.timeout(5):
                while engine.load().running:
                    await asyncio.sleep(0.001)
    told = service.metrics.snapshot()
    assert metric(told, "intserve_requests_total", outcome="disconnected") == 2
    assert metric(told, "intserve_requests_in_flight") == 0
    assert engine.load().kv_tokens_used == 0


async def test_health_follows_the_engines() -> None:
    class Gone(LocalEngines):
        async def statuses(self) -> Any:
            raise EngineUnavailable("no engine replica is ready; retry later")

    service = make_service()
    async with client_of(service) as client:
        assert (await client.get("/health")).json()["engine_replicas"] == 1
    service.engines = Gone(EchoEngine(EchoOptions()))
    async with client_of(service) as client:
        answer = await client.get("/health")
        assert_error(answer, 503, "engine_unavailable")
        assert answer.headers["retry-after"] == "5"
        assert (await client.get("/metrics")).status_code == 200


async def test_metric_names_and_labels_are_these() -> None:
    frozen = {
        "gen_ai_server_request_duration_seconds": "gen_ai_operation_name gen_ai_request_model "
        "error_type",
        "gen_ai_server_time_to_first_token_seconds": "gen_ai_operation_name gen_ai_request_model "
        "pool",
        "gen_ai_server_time_per_output_token_seconds": "gen_ai_operation_name "
        "gen_ai_request_model pool",
        "intserve_access_log_dropped_total": "",
        "intserve_admission_exchanges_total": "",
        "intserve_admission_joins_total": "",
        "intserve_admission_hung_owners_total": "",
        "intserve_admission_messages_total": "",
        "intserve_admission_queue_seconds": "pool",
        "intserve_resumes_total": "outcome",
        "intserve_unread_bytes": "",
        "intserve_requests_total": "gen_ai_operation_name outcome",
        "intserve_refused_keys_total": "reason",
        "intserve_key_reload_failed": "",
        "intserve_tokens_total": "kind",
        "intserve_requests_in_flight": "",
        "intserve_engine_requests_running": "replica pool",
        "intserve_engine_requests_waiting": "replica pool",
        "intserve_engine_kv_tokens_used": "replica pool",
        "intserve_engine_kv_tokens_capacity": "replica pool",
        "intserve_engine_kv_bytes_per_token": "replica pool",
        "intserve_engine_kv_tokens_cached": "replica pool",
        "intserve_engine_prompt_tokens_total": "replica pool source",
        "intserve_engine_info": "replica pool engine recipe artifact_digest kv_cache gated "
        "emulated",
        "intserve_loading_seconds": "replica pool phase",
        "intserve_loading_done_bytes": "replica pool phase",
        "intserve_loading_expected_bytes": "replica pool phase",
        "intserve_loading_eta_seconds": "replica pool phase",
    }
    table = {name: " ".join(labels) for name, (_, labels, _, _) in REQUEST_METRICS.items()}
    table |= {name: " ".join(labels) for name, (labels, _) in ENGINE_METRICS.items()}
    table |= dict.fromkeys(LOADING_METRICS, " ".join(OF_LOADING))
    assert table == frozen

    async with client_of(make_service()) as client:
        await client.post(TEXT, json=text())
        scraped = (await client.get("/metrics")).text
    exposed = {line.split()[2] for line in scraped.splitlines() if line.startswith("# TYPE")}
    assert exposed == set(frozen)
    assert metric(scraped, "intserve_tokens_total", kind="output") == 5
    assert metric(scraped, "gen_ai_server_time_to_first_token_seconds_count") == 1


async def test_prompts_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    caplog.set_level("DEBUG", logger="ray.serve")
    service = make_service(FaultyEngine(EchoOptions()))
    async with client_of(service) as client:
        for prompt in ("bug CANARY", "late-bug CANARY", "overloaded CANARY", "failed CANARY"):
            await client.post(TEXT, json=text(prompt, stream=True))
        await client.post(TEXT, json=text("CANARY", temperature="CANARY"))
    assert caplog.records
    assert "CANARY" not in caplog.text
