"""The embedded engine's adapter: over HTTP with the trained example model, and alone."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI
from ray import serve
from support.configs import make_config
from support.family import NAMES, Name, family_model
from support.serving import LocalEngines, client_of, metric, told_health, wait_for

from deepseek.artifact.engine_manifest import read_documents, read_engine_manifest
from deepseek.engine import process
from deepseek.engine.detokenizer import engine_tokenizer
from deepseek.engine.engine import LLMEngine
from deepseek.engine.kv_cache import token_bytes
from deepseek.engine.options import EngineOptions
from deepseek.engine.request import Request, SamplingParams, StepOutput
from deepseek.errors import ArtifactError, RequestError
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.targets.embedded import pack_engine
from serve_app.app import build
from serve_app.config import EmbeddedOptions, ServeConfig
from serve_app.engines import embedded
from serve_app.engines.embedded import EmbeddedEngine, _engine_options
from serve_app.engines.protocol import Done, GenerateRequest, Tokens
from serve_app.errors import EngineUnavailable
from serve_app.openai.service import Service
from serve_app.openai.tokenizer import HfTokenizer, PromptText
from serve_app.telemetry.tracing import Telemetry

QUESTION = [{"role": "user", "content": "What does a list comprehension return?"}]


@pytest.fixture(scope="module")
def engine_dir(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("serve") / "tiny"
    pack_engine(CheckpointReader(tiny_model), directory)
    return directory


def documents_of(engine_dir: Path) -> dict[str, bytes]:
    return read_documents(engine_dir, read_engine_manifest(engine_dir))


@pytest.fixture(scope="module")
def settings(engine_dir: Path) -> ServeConfig:
    return make_config(
        engine=engine_dir,
        allow_ungated=True,
        max_model_len=1024,
        kv_tokens=4096,
        num_threads=1,
        drain_s=2.0,
    )


@pytest.fixture(scope="module")
def direct(engine_dir: Path) -> LLMEngine:
    """The same engine without the service around it."""
    torch.set_num_threads(1)
    return LLMEngine.load(engine_dir, EngineOptions(max_model_len=1024, max_kv_tokens=4096))


def run_direct(engine: LLMEngine, prompt_ids: list[int], **sampling: Any) -> list[StepOutput]:
    request = Request(
        request_id="direct", prompt_ids=tuple(prompt_ids), sampling=SamplingParams(**sampling)
    )
    engine.add_request(request)
    outputs: list[StepOutput] = []
    while engine.has_work:
        outputs.extend(engine.step())
    return outputs


# The service: Ray Serve, HTTP, the openai client.


@pytest.fixture(scope="module")
def url(serve_url: str, settings: ServeConfig) -> Iterator[str]:
    serve.run(build(settings), name="tiny", route_prefix="/tiny")
    yield f"{serve_url}/tiny/v1"
    serve.delete("tiny")


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


def chat(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=QUESTION, **fields)  # type: ignore[arg-type]


@pytest.mark.ray
def test_a_greedy_chat_is_what_the_engine_says(
    client: OpenAI, direct: LLMEngine, engine_dir: Path
) -> None:
    tokenizer = HfTokenizer(engine_dir, documents_of(engine_dir))
    prompt_ids = tokenizer.encode(tokenizer.render(QUESTION))
    outputs = run_direct(direct, prompt_ids, max_tokens=24, temperature=0.0, logprobs=2)
    expected = "".join(output.text for output in outputs)
    assert expected.strip()

    answer = chat(client, max_tokens=24, temperature=0, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == outputs[-1].finish_reason
    assert answer.usage.prompt_tokens == len(prompt_ids)
    assert answer.usage.completion_tokens == outputs[-1].completion_tokens
    told = answer.choices[0].logprobs.content
    logprobs = [item for output in outputs for item in output.logprobs]
    assert [entry.token for entry in told] == [item.token for item in logprobs]
    assert [entry.logprob for entry in told] == pytest.approx([item.logprob for item in logprobs])
    assert all(entry.logprob == entry.top_logprobs[0].logprob <= 0.0 for entry in told)

    with chat(client, max_tokens=24, temperature=0, stream=True) as stream:
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == expected


@pytest.mark.ray
def test_a_seed_reproduces_an_answer_and_each_of_its_choices(client: OpenAI) -> None:
    def say(**fields: Any) -> list[str]:
        answer = chat(client, max_tokens=16, temperature=1.0, **fields)
        return [choice.message.content for choice in answer.choices]

    both = say(seed=5, n=2)
    assert say(seed=5, n=2) == both
    assert say(seed=5) == both[:1]
    assert say(seed=6) == both[1:]
    assert both[0] != both[1]


@pytest.mark.ray
def test_a_stop_string_ends_the_answer_before_it(client: OpenAI) -> None:
    whole = chat(client, max_tokens=24, temperature=0).choices[0].message.content
    stop = whole[5:9]
    answer = chat(client, max_tokens=24, temperature=0, stop=[stop]).choices[0]
    assert answer.message.content == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


@pytest.mark.ray
def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(url: str) -> None:
    body = {"model": "tiny", "prompt": [5] * 1500}
    answer = httpx.post(f"{url}/completions", json=body, timeout=30)
    assert answer.status_code == 400
    assert "1500 tokens" in answer.json()["error"]["message"]
    assert "1024" in answer.json()["error"]["message"]


@pytest.mark.ray
def test_a_client_that_leaves_gives_its_pages_back(url: str) -> None:
    def used() -> float:
        text = httpx.get(url.removesuffix("/v1") + "/metrics", timeout=10).text
        return metric(text, "intserve_engine_kv_tokens_used")

    body = {"model": "tiny", "prompt": "def main():", "max_tokens": 1000, "n": 2}
    body |= {"ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()  # closing this iterator would close the connection
        next(lines)
        wait_for(lambda: used() > 0)  # the gauge comes with a heartbeat
    wait_for(lambda: used() == 0)


@pytest.mark.ray
def test_health_says_that_the_artifact_is_not_gated(url: str, engine_dir: Path) -> None:
    health = told_health(url.removesuffix("/v1"))
    assert health["gated"] is False
    assert health["recipe"] == "unquantized"
    assert health["artifact_digest"] == read_engine_manifest(engine_dir).artifact_digest


# The adapter alone, in this process.


class FailingSteps(LLMEngine):
    """Fails in its fifth step, as a kernel might."""

    steps = 0

    def step(self) -> list[StepOutput]:
        self.steps += 1
        if self.steps == 5:
            raise RuntimeError("the kernel failed")
        return super().step()


class HangingSteps(LLMEngine):
    """Its fifth step lasts until the test lets it go, as a kernel or a collective may."""

    released = threading.Event()
    steps = 0

    def step(self) -> list[StepOutput]:
        self.steps += 1
        if self.steps == 5:
            self.released.wait(60)
        return super().step()


class FailingCommands(LLMEngine):
    """Fails where the loop takes a request in, outside of any step."""

    def add_request(self, request: Request) -> None:
        if request.request_id == "poison":
            raise SystemExit
        super().add_request(request)


def asked(name: str, length: int = 5, **sampling: Any) -> GenerateRequest:
    fields = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True, **sampling}
    return GenerateRequest(
        request_id=name, prompt_ids=tuple(range(5, 5 + length)), sampling=SamplingParams(**fields)
    )


async def consume(engine: EmbeddedEngine, request: GenerateRequest) -> tuple[int, Done]:
    *tokens, done = [event async for event in engine.generate(request)]
    assert isinstance(done, Done)
    return sum(len(event.token_ids) for event in tokens if isinstance(event, Tokens)), done


async def test_a_failing_step_ends_every_request_once_and_fails_the_check(
    settings: ServeConfig,
) -> None:
    engine = EmbeddedEngine(settings.pool.engine, load=FailingSteps.load)
    await engine.start()
    await engine.check()
    ended = await asyncio.gather(*(consume(engine, asked(f"r{i}")) for i in range(3)))
    for produced, done in ended:
        assert (done.reason, done.completion_tokens) == ("error", produced)
        assert done.error
        assert done.retryable
    with pytest.raises(EngineUnavailable):
        await engine.check()
    with pytest.raises(EngineUnavailable):
        await consume(engine, asked("late"))
    await engine.shutdown()


async def test_a_failure_outside_a_step_ends_every_request_once_too(settings: ServeConfig) -> None:
    engine = EmbeddedEngine(settings.pool.engine, load=FailingCommands.load)
    await engine.start()
    requests = [asked("a", max_tokens=1000), asked("poison"), asked("b")]
    ended = await asyncio.gather(*(consume(engine, request) for request in requests))
    assert [(done.reason, done.retryable) for _, done in ended] == [("error", True)] * 3
    with pytest.raises(EngineUnavailable):
        await engine.check()
    await engine.shutdown()


async def test_a_step_that_hangs_shows_and_holds_up_no_shutdown(settings: ServeConfig) -> None:
    engine = EmbeddedEngine(settings.pool.engine, load=HangingSteps.load, join_s=0.1)
    await engine.start()
    assert engine.stalled_s() == 0.0
    stream = engine.generate(asked("hung"))
    for _ in range(4):
        await anext(stream)
    waiting = asyncio.create_task(anext(stream))
    async with asyncio.timeout(10):
        while engine.stalled_s() < 0.3:
            await asyncio.sleep(0.01)
    assert not waiting.done()
    async with asyncio.timeout(5):
        await engine.shutdown()
    with pytest.raises(EngineUnavailable, match="stopping"):
        await waiting
    HangingSteps.released.set()


async def test_shutting_down_tells_every_request_that_it_may_be_sent_again(
    settings: ServeConfig,
) -> None:
    engine = EmbeddedEngine(settings.pool.engine)
    await engine.start()
    streams = [engine.generate(asked(name, max_tokens=1000)) for name in ("a", "b")]
    for stream in streams:
        await anext(stream)
    await engine.shutdown()
    for stream in streams:
        with pytest.raises(EngineUnavailable, match="stopping"):
            async for _ in stream:
                pass
    with pytest.raises(EngineUnavailable, match="stopping"):
        await consume(engine, asked("late"))


async def test_requests_run_together_and_abort_ends_one_of_them(settings: ServeConfig) -> None:
    engine = EmbeddedEngine(settings.pool.engine)
    info = await engine.start()
    assert info.max_model_len == 1024
    model = engine._engine.config
    assert info.kv_bytes_per_token == token_bytes(model, "bf16"), "of all layers"
    endless = engine.generate(asked("endless", max_tokens=1000))
    await anext(endless)
    produced, done = await consume(engine, asked("short"))
    assert (produced, done.reason) == (20, "length")
    assert done.prefill_s > 0.0
    assert done.decode_s > 0.0
    await engine.abort(["endless", "unknown"])
    rest = [event async for event in endless]
    assert isinstance(rest[-1], Done)
    assert rest[-1].reason == "abort"

    left = engine.generate(asked("left", max_tokens=1000))
    await anext(left)
    await left.aclose()
    async with asyncio.timeout(10):
        while engine.load().kv_tokens_used:
            await asyncio.sleep(0.001)
    assert engine.load().running == engine.load().waiting == 0
    await engine.shutdown()


async def test_what_the_engine_refuses_is_the_clients_mistake(settings: ServeConfig) -> None:
    engine = EmbeddedEngine(settings.pool.engine)
    await engine.start()
    with pytest.raises(RequestError, match="1500 tokens"):
        await consume(engine, asked("long", length=1500))
    await engine.shutdown()


# Other models of the family.


@pytest.mark.parametrize("name", NAMES)
async def test_kimi_and_moonlight_answer_text_and_token_ids_alike(
    name: Name, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pack_engine(
        CheckpointReader(family_model(name, tmp_path_factory.getbasetemp()).directory),
        tmp_path / "engine",
    )
    config = make_config(
        engine=tmp_path / "engine",
        allow_ungated=True,
        max_model_len=128,
        kv_tokens=256,
        num_threads=1,
        model_name=name,
    )
    engine = EmbeddedEngine(config.pool.engine)
    client = LocalEngines(engine)
    tokenizer = HfTokenizer(tmp_path / "engine", documents_of(tmp_path / "engine"))
    service = Service(config, tokenizer, client, Telemetry(None))
    answers = []
    async with client_of(service) as http:
        for prompt in ("w30 w31 w32", [30, 31, 32]):
            body = {"model": name, "prompt": prompt, "max_tokens": 5, "temperature": 0}
            answers.append(await http.post("/v1/completions", json=body))
    await engine.shutdown()
    texts = [answer.json()["choices"][0]["text"] for answer in answers]
    assert texts[0] == texts[1]
    assert len(texts[0].split()) == 5


# The tokenizer of its directory.


async def test_the_chat_template_and_the_tokenizer_are_the_models(engine_dir: Path) -> None:
    tokenizer = HfTokenizer(engine_dir, documents_of(engine_dir))
    ids = tokenizer.encode(tokenizer.render([{"role": "user", "content": "hi"}]))
    assert ids[0] == 0  # begin of sentence, once
    assert ids.count(0) == 1
    assert tokenizer.encode(PromptText("hi", special_tokens=True))[0] == 0
    assert tokenizer.vocab_size == 2048
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is absent; .*then build the engine"):
        HfTokenizer(engine_dir, {"config.json": b"{}"})


def test_a_tokenizer_cannot_pad_cut_or_fetch_another_file(engine_dir: Path, tmp_path: Path) -> None:
    """A fixed length of three thousand million tokens would fill the memory with the first
    prompt; a path in the configuration is of a file that no digest covers."""
    documents = documents_of(engine_dir)
    text = PromptText("def f(x): return x", special_tokens=True)
    plain = HfTokenizer(engine_dir, documents).encode(text)
    raw = json.loads(documents["tokenizer.json"])
    side = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    raw["padding"] = side | {"strategy": {"Fixed": 3_000_000_000}, "pad_token": "x"}
    raw["truncation"] = {"direction": "Right", "max_length": 2, "stride": 0}
    raw["truncation"] |= {"strategy": "LongestFirst"}
    other = tmp_path / "tokenizer.json"
    other.write_text("no tokenizer")
    config = json.loads(documents["tokenizer_config.json"])
    config |= {"tokenizer_file": str(other), "vocab_file": str(other), "auto_map": {"A": "b.C"}}
    hostile = documents | {
        "tokenizer.json": json.dumps(raw).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    tokenizer = HfTokenizer(engine_dir, hostile)
    assert tokenizer.encode(text) == plain
    assert engine_tokenizer(engine_dir, hostile).encode("def f(x): return x").ids == plain


@pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_a_file_that_is_no_tokenizer_is_one_sentence(engine_dir: Path, content: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json ") as refused:
        HfTokenizer(engine_dir, documents_of(engine_dir) | {"tokenizer.json": content})
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("value", [{"bos_token": 5}, {"added_tokens_decoder": {"x": 1}}])
def test_a_tokenizer_config_that_cannot_be_used_is_one_sentence(
    engine_dir: Path, value: dict[str, Any]
) -> None:
    documents = documents_of(engine_dir)
    config = json.dumps(json.loads(documents["tokenizer_config.json"]) | value).encode()
    with pytest.raises(ArtifactError, match="has a tokenizer that cannot be loaded"):
        HfTokenizer(engine_dir, documents | {"tokenizer_config.json": config})


def test_threads_follow_the_cpus_that_the_replica_reserves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "num_cores", lambda: 4)
    monkeypatch.setattr(embedded, "num_cores", lambda: 4)
    options = EmbeddedOptions(directory=Path("e"))
    chosen = {cpus: _engine_options(options, cpus).num_threads for cpus in (None, 0.5, 2.0)}
    assert chosen == {None: None, 0.5: 3, 2.0: 2}
    assert not caplog.records
    assert _engine_options(options, 8.0).num_threads == 4
    assert "reserves 8 CPUs and may run on 4" in caplog.text
    assert _engine_options(options.model_copy(update={"num_threads": 1}), 8.0).num_threads == 1
