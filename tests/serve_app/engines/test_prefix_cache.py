"""What a client, the access log and the metrics are told of cached prefixes; whole and streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from support.configs import make_config
from support.serving import LocalEngines, client_of, metric, read_sse

from deepseek.artifact.engine_manifest import read_documents, read_engine_manifest
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.targets.embedded import pack_engine
from serve_app.engines.embedded import EmbeddedEngine
from serve_app.engines.events import cached_prompt_tokens
from serve_app.openai.service import Service
from serve_app.openai.tokenizer import HfTokenizer
from serve_app.telemetry.tracing import Telemetry

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = [(37 * i) % 1900 + 100 for i in range(70)]

Serve = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture(scope="module")
def serve(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Serves the trained model in this process, on an engine that has seen nothing."""
    directory = tmp_path_factory.mktemp("prefix") / "tiny"
    pack_engine(CheckpointReader(tiny_model), directory)
    documents = read_documents(directory, read_engine_manifest(directory))
    tokenizer = HfTokenizer(directory, documents)

    @asynccontextmanager
    async def serving(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
        config = make_config(
            engine=directory,
            allow_ungated=True,
            model_name="tiny",
            max_model_len=512,
            kv_tokens=2048,
            num_threads=1,
            **settings,
        )
        engine = EmbeddedEngine(config.pool.engine)
        service = Service(config, tokenizer, LocalEngines(engine), Telemetry(TracerProvider()))
        try:
            async with client_of(service) as client:
                yield client
        finally:
            service.close()
            await engine.shutdown()

    return serving


async def ask(client: httpx.AsyncClient, route: str = TEXT, key: str = "", **fields: Any) -> Any:
    """The usage, of a whole answer or of a stream's last chunk."""
    body = {"model": "tiny", "temperature": 0, "max_tokens": 4, "ignore_eos": True, **fields}
    if body.get("stream"):
        body["stream_options"] = {"include_usage": True}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = await client.post(route, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        *_, last, done = read_sse(answer.text)
        assert done == "[DONE]"
        return last["usage"]
    return answer.json()["usage"]


async def idle_metrics(client: httpx.AsyncClient) -> str:
    """The metrics once the engine's thread has noticed that nothing runs any more."""
    while True:
        text = (await client.get("/metrics")).text
        if not metric(text, "intserve_engine_requests_running"):
            return text
        await asyncio.sleep(0.01)


def cached(usage: dict[str, Any]) -> int:
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    count = usage["prompt_tokens_details"]["cached_tokens"]
    assert isinstance(count, int)
    return count


@pytest.mark.heavy
@pytest.mark.parametrize("stream", [False, True])
async def test_usage_log_and_metrics_tell_what_was_found(
    serve: Serve, stream: bool, tmp_path: Path
) -> None:
    path = tmp_path / "access.jsonl"
    async with serve(access_log=path) as client:
        usages = [await ask(client, prompt=PROMPT, stream=stream) for _ in range(2)]
        usages.append(await ask(client, prompt=[*PROMPT[:40], 5], stream=stream))
        metrics = await idle_metrics(client)
    assert [cached(usage) for usage in usages] == [0, 64, 32]
    assert [usage["prompt_tokens"] for usage in usages] == [70, 70, 41]
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["cached_tokens"] for line in lines] == [0, 64, 32]
    name = "intserve_engine_prompt_tokens_total"
    assert metric(metrics, name, source="cache") == 96
    assert metric(metrics, name, source="computed") == 70 + 6 + 9
    assert metric(metrics, "intserve_tokens_total", kind="input") == 181
    assert metric(metrics, "intserve_tokens_total", kind="cached_input") == 96
    assert metric(metrics, "intserve_engine_kv_tokens_used") == 0
    assert metric(metrics, "intserve_engine_kv_tokens_cached") == 64


@pytest.mark.heavy
async def test_the_second_turn_of_a_chat_finds_the_first(serve: Serve) -> None:
    messages = [{"role": "user", "content": "What does a list comprehension return? " * 4}]
    body = {"model": "tiny", "temperature": 0, "max_tokens": 24, "messages": messages}
    async with serve() as client:
        first = (await client.post(CHAT, json=body)).json()
        assert cached(first["usage"]) == 0
        said = first["choices"][0]["message"]["content"]
        turn = [*messages, {"role": "assistant", "content": said}, messages[0]]
        usage = await ask(client, CHAT, messages=turn)
    before = first["usage"]["prompt_tokens"]
    assert cached(usage) >= before // 16 * 16 - 16 > 0


@pytest.mark.heavy
async def test_a_prompt_counts_once_however_many_choices_find_it(serve: Serve) -> None:
    """Also where a later choice finds what the first one has computed, and of several prompts."""
    async with serve(max_batch_size=1, max_batched_tokens=16) as client:
        assert cached(await ask(client, prompt=PROMPT, n=2)) == 0
        assert cached(await ask(client, prompt=PROMPT, n=3, stream=True)) == 64
        both = await ask(client, prompt=[PROMPT, PROMPT[:20], [7] * 20], n=2)
        metrics = await idle_metrics(client)
    assert (both["prompt_tokens"], cached(both)) == (110, 80)
    assert metric(metrics, "intserve_tokens_total", kind="cached_input") == 64 + 80


def test_of_the_choices_of_a_prompt_the_one_that_found_least_counts() -> None:
    assert cached_prompt_tokens({0: 16, 1: 0, 2: 48, 3: 32}, 2) == 32
    assert cached_prompt_tokens({1: 16, 2: 5}, 2) == 21  # one that was cut short told nothing
    assert cached_prompt_tokens({}, 3) == 0


@pytest.mark.heavy
async def test_keys_and_salts_find_only_their_own(serve: Serve) -> None:
    async with serve(api_keys=("sk-one", "sk-two")) as client:
        found = [
            cached(await ask(client, prompt=PROMPT, key=key, **own))
            for key, own in (
                *(("sk-one", {}), ("sk-one", {}), ("sk-two", {}), ("sk-two", {})),
                *(("sk-one", {"cache_salt": "u"}), ("sk-two", {"cache_salt": "u"})),
                ("sk-one", {"cache_salt": "u"}),
            )
        ]
    assert found == [0, 64, 0, 64, 0, 0, 64]


@pytest.mark.heavy
async def test_prompt_logprobs_and_the_setting_go_without(serve: Serve) -> None:
    async with serve() as client:
        for fields in ({"echo": True, "logprobs": 0}, {"prompt_logprobs": 0}):
            assert cached(await ask(client, prompt=PROMPT, **fields)) == 0
        assert cached(await ask(client, prompt=PROMPT)) == 0  # they left nothing
        assert cached(await ask(client, prompt=PROMPT, echo=True, logprobs=0)) == 0
        assert cached(await ask(client, prompt=PROMPT, echo=True)) == 64  # no logprobs of it
    async with serve(prefix_cache=False) as client:
        assert [cached(await ask(client, prompt=PROMPT)) for _ in range(2)] == [0, 0]
        metrics = await idle_metrics(client)
    assert metric(metrics, "intserve_engine_prompt_tokens_total", source="cache") == 0
    assert metric(metrics, "intserve_engine_kv_tokens_cached") == 0
