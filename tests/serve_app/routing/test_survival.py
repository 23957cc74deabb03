"""A stream whose replica is lost at any token, on the embedded engine: equal to the undisturbed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.configs import make_config
from support.fleets import LocalFleet, LocalReplica, LocalStream, read
from support.serving import client_of, read_sse

from deepseek.artifact.engine_manifest import read_documents, read_engine_manifest
from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions
from deepseek.engine.request import SamplingParams, TokenLogprob
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.targets.embedded import pack_engine
from serve_app.config import EmbeddedOptions
from serve_app.engines.embedded import EmbeddedEngine
from serve_app.engines.protocol import (
    Done,
    Event,
    GenerateRequest,
    Placed,
    PromptLogprobs,
    Tokens,
)
from serve_app.openai.service import Service
from serve_app.openai.tokenizer import HfTokenizer, PromptText
from serve_app.telemetry.tracing import Telemetry

pytestmark = pytest.mark.heavy

#: Tokens of every answer here, at most.
LENGTH = 6


@pytest.fixture(scope="module")
def engine_dir(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("survival") / "tiny"
    pack_engine(CheckpointReader(tiny_model), directory)
    return directory


@pytest.fixture(scope="module")
def models(engine_dir: Path) -> list[LLMEngine]:
    options = EngineOptions(max_model_len=512, max_kv_tokens=2048, num_threads=1)
    return [LLMEngine.load(engine_dir, options) for _ in range(2)]


@pytest.fixture(scope="module")
def tokenizer(engine_dir: Path) -> HfTokenizer:
    return HfTokenizer(engine_dir, read_documents(engine_dir, read_engine_manifest(engine_dir)))


@asynccontextmanager
async def two_replicas(models: list[LLMEngine], **settings: Any) -> AsyncGenerator[LocalFleet]:
    """A fleet over the models, without another load of them."""

    def engine(model: LLMEngine) -> EmbeddedEngine:
        return EmbeddedEngine(EmbeddedOptions(directory=Path()), load=lambda *_: model)

    names = {name: engine(model) for name, model in zip("ab", models, strict=True)}
    fleet = LocalFleet(names, **settings)
    await fleet.start()
    try:
        yield fleet
    finally:
        for one in names.values():
            await one.shutdown()


class KillAt:
    """Ends the replica of each sequence when it has said a number of tokens: once, unless `each`,
    which ends the next one after as many further tokens. Another replica takes its place."""

    def __init__(self, fleet: LocalFleet, num_tokens: int, *, each: int | None = None) -> None:
        self.fleet = fleet
        self.num_tokens = num_tokens
        self.each = each
        self.kills = 0

    def __call__(self, replica: LocalReplica, stream: LocalStream, event: Event) -> None:
        if stream.num_tokens < self.num_tokens or not replica.listed:
            return
        self.num_tokens = self.num_tokens + self.each if self.each else 1 << 30
        self.kills += 1
        self.fleet.die(replica.replica_id)
        added = self.fleet.add(f"{replica.replica_id}'", replica.engine)
        self.tasks = asyncio.ensure_future(added)


def sampled(**given: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": LENGTH, "temperature": 0.0, **given})


def joined(events: list[Event]) -> dict[str, Any]:
    """All that a client can see of one sequence, however it came in pieces. A logprob is rounded:
    a continued prompt is computed in one batch, where the tokens came one at a time."""
    tokens = [event for event in events if isinstance(event, Tokens)]
    done = [event for event in events if isinstance(event, Done)]
    prompts = [event for event in events if isinstance(event, PromptLogprobs)]
    assert [events[-1]] == done
    return {
        "token_ids": [token for event in tokens for token in event.token_ids],
        "text": "".join(event.text for event in tokens),
        "logprobs": [rounded(item) for event in tokens for item in event.logprobs],
        "prompt": [[item and rounded(item) for item in event.logprobs] for event in prompts],
        "end": (done[0].reason, done[0].prompt_tokens, done[0].completion_tokens),
    }


def rounded(item: TokenLogprob) -> Any:
    top = [(one.token_id, one.token, round(one.logprob, 4)) for one in item.top]
    return item.token_id, item.token, round(item.logprob, 4), top, item.bytes, item.rank


def stop_of(text: str) -> str:
    """A stop string that begins within this text and spans several tokens of it."""
    return text[len(text) // 2 : len(text) // 2 + 6]


async def test_a_kill_at_any_token_changes_nothing_that_a_client_sees(
    models: list[LLMEngine], tokenizer: HfTokenizer
) -> None:
    prompt = tuple(tokenizer.encode(PromptText("The function json.dumps returns")))
    async with two_replicas(models) as fleet:
        plain = joined(await read(fleet.fleet, GenerateRequest(
            request_id="plain", prompt_ids=prompt, sampling=sampled()
        )))  # fmt: skip
        assert len(plain["token_ids"]) == LENGTH
        kinds = {
            "greedy": sampled(),
            "seeded": sampled(temperature=1.0, seed=7),
            "logprobs": sampled(temperature=0.8, seed=3, logprobs=2, prompt_logprobs=1),
            "stop": sampled(stop=(stop_of(plain["text"]),)),
            "never": sampled(stop=("\x00\x01", plain["text"][-3:] + "\x00"), logprobs=0),
        }
        for kind, sampling in kinds.items():
            request = GenerateRequest(request_id=kind, prompt_ids=prompt, sampling=sampling)
            whole = joined(await read(fleet.fleet, request))
            for at in range(len(whole["token_ids"]) + 1):
                kill = fleet.before_message = KillAt(fleet, at)
                events = await read(fleet.fleet, replace(request, request_id=f"{kind}-{at}"))
                assert kill.kills == 1, (kind, at)
                assert joined(events) == whole, (kind, at)
                attempts = [event.attempt for event in events if isinstance(event, Placed)]
                assert attempts in ([1, 2], [2]), (kind, at)


async def test_a_sequence_that_loses_replica_after_replica_still_says_the_same(
    models: list[LLMEngine], tokenizer: HfTokenizer
) -> None:
    request = GenerateRequest(
        request_id="r",
        prompt_ids=tuple(tokenizer.encode(PromptText("A list comprehension"))),
        sampling=sampled(temperature=1.0, seed=11, logprobs=1),
    )
    async with two_replicas(models) as fleet:
        whole = joined(await read(fleet.fleet, request))
        kill = fleet.before_message = KillAt(fleet, 1, each=2)
        events = await read(fleet.fleet, replace(request, request_id="killed"))
        assert kill.kills == 3
        assert joined(events) == whole
        assert [e.attempt for e in events if isinstance(e, Placed)] == [1, 2, 3, 4]


async def test_an_unseeded_sequence_goes_on_with_the_seed_that_it_began_with(
    models: list[LLMEngine], tokenizer: HfTokenizer
) -> None:
    request = GenerateRequest(
        request_id="r",
        prompt_ids=tuple(tokenizer.encode(PromptText("import"))),
        sampling=sampled(temperature=1.5),
    )
    async with two_replicas(models) as fleet:
        fleet.before_message = KillAt(fleet, 5)
        said = joined(await read(fleet.fleet, request))
        (first, second) = (fleet.replicas[name].received for name in ("a", "b"))
        sent = [*first, *second]
        assert len(sent) == 2
        seeds = {one.sampling.seed for one in sent}
        assert len(seeds - {None}) == len(seeds) == 1
        again = replace(request, request_id="again", sampling=sent[0].sampling)
        assert joined(await read(fleet.fleet, again)) == said
        other = [await read(fleet.fleet, replace(request, request_id=f"o{i}")) for i in range(3)]
        assert any(joined(events) != said for events in other)


@pytest.mark.parametrize("stream", [True, False])
async def test_the_answer_to_a_request_with_choices_is_the_undisturbed_one(
    models: list[LLMEngine], tokenizer: HfTokenizer, engine_dir: Path, stream: bool
) -> None:
    body = {
        "model": "tiny",
        "prompt": "The method str.join",
        "n": 3,
        "seed": 5,
        "temperature": 0.9,
        "max_tokens": LENGTH,
        "logprobs": 2,
        "stop": ["\n\n", "zz"],
        "stream": stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }
    config = make_config(engine=engine_dir, allow_ungated=True)
    async with two_replicas(models) as fleet:
        service = Service(config, tokenizer, fleet.fleet, Telemetry(None))

        async def answer() -> Any:
            async with client_of(service) as client:
                response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            return visible(read_sse(response.text) if stream else [response.json()])

        whole = await answer()
        assert len(whole[0]) == 3
        for at in (0, 4, LENGTH):
            kill = fleet.before_message = KillAt(fleet, at)
            assert await answer() == whole, at
            assert kill.kills == 1


def visible(payloads: list[Any]) -> Any:
    """Each choice's text, logprobs and end, and the usage, of an answer or its stream."""
    choices: dict[int, list[Any]] = {}
    usage = None
    for payload in payloads:
        if payload == "[DONE]":
            continue
        usage = payload.get("usage") or usage
        for piece in payload["choices"]:
            text, tokens, offsets, reasons = choices.setdefault(piece["index"], ["", [], [], []])
            logprobs = piece["logprobs"] or {"tokens": [], "text_offset": []}
            choices[piece["index"]] = [
                text + piece["text"],
                tokens + logprobs["tokens"],
                offsets + logprobs["text_offset"],
                reasons + [piece["finish_reason"]] * (piece["finish_reason"] is not None),
            ]
    return choices, usage
