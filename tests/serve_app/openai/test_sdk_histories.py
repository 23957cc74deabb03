"""Conversations through the real `openai` SDK, which feeds answers back as it made them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError
from openai.types.chat import ChatCompletionMessage
from support.serving import make_service

from serve_app.openai.routes import make_app

USER: dict[str, Any] = {"role": "user", "content": "hello"}


@pytest.fixture
async def client() -> AsyncIterator[AsyncOpenAI]:
    transport = httpx.ASGITransport(make_app(make_service()), raise_app_exceptions=False)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://test") as http,
        AsyncOpenAI(
            api_key="any", base_url="http://test/v1", http_client=http, max_retries=0
        ) as client,
    ):
        yield client


@pytest.mark.parametrize(
    "feed_back",
    [
        lambda message: message,
        lambda message: message.model_dump(),
        lambda message: message.to_dict(),
        lambda message: json.loads(message.model_dump_json()),
        lambda message: message.model_dump(exclude_none=True),
        lambda message: ChatCompletionMessage(role="assistant", content=message.content),
    ],
    ids=["object", "model_dump", "to_dict", "json", "without nulls", "made by hand"],
)
async def test_an_answer_may_be_appended_to_its_history(
    client: AsyncOpenAI, feed_back: Callable[[Any], Any]
) -> None:
    history: list[Any] = [USER]
    for turn in range(3):
        answer = await client.chat.completions.create(
            model="echo", messages=history, max_tokens=200
        )
        said = answer.choices[0].message
        lines = (said.content or "").splitlines()
        assert lines.count("user: hello") >= 2**turn  # the echo repeats the whole conversation
        history += [feed_back(said), USER]


async def test_every_field_of_a_history_that_the_sdk_knows_may_be_null(client: AsyncOpenAI) -> None:
    said = dict.fromkeys(ChatCompletionMessage.model_fields) | {"role": "assistant"}
    history: Any = [USER, said, USER]
    answer = await client.chat.completions.create(model="echo", messages=history, max_tokens=60)
    assert answer.choices[0].message.content == "user: hello\nassistant: \nuser: hello"


async def test_the_sdk_names_the_field_that_is_not_supported(client: AsyncOpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    history: Any = [USER, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(BadRequestError) as caught:
        await client.chat.completions.create(model="echo", messages=history)
    assert (caught.value.param, caught.value.code) == (
        "messages.1.tool_calls",
        "unsupported_field",
    )


async def test_usage_may_come_with_every_chunk(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="echo",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
    )
    usages = [chunk.usage async for chunk in stream]
    assert all(usage is not None and usage.prompt_tokens == 11 for usage in usages)
    counts = [usage.completion_tokens for usage in usages if usage is not None]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 5


async def test_usage_with_every_chunk_needs_usage_at_all(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="echo",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=5,
        stream=True,
        stream_options={"continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
    )
    assert [chunk.usage async for chunk in stream if chunk.usage] == []


async def test_obfuscation_hides_the_length_of_every_chunk(client: AsyncOpenAI) -> None:
    async def sizes(obfuscate: bool) -> tuple[set[int], str]:
        response = await client.completions.with_raw_response.create(
            model="echo",
            prompt="a€ b",
            stream=True,
            stream_options={"include_usage": True, "include_obfuscation": obfuscate},
        )
        text = (await response.http_response.aread()).decode()
        frames = [frame for frame in text.split("\n\n") if frame.startswith("data: {")]
        pieces = [json.loads(frame.removeprefix("data: ")) for frame in frames]
        assert all(("obfuscation" in piece) == obfuscate for piece in pieces)
        said = "".join(c["text"] for piece in pieces for c in piece["choices"])
        return {len(frame.encode()) for frame in frames}, said

    plain, hidden = await sizes(False), await sizes(True)
    assert plain[1] == hidden[1] == "a€ b"
    assert len(plain[0]) > 2
    assert len(hidden[0]) <= 2  # the last chunk, with the usage, is longer


async def test_a_body_without_a_model_is_answered_by_the_one_that_is_served() -> None:
    transport = httpx.ASGITransport(make_app(make_service(model_name="a/b")))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for model in ({}, {"model": None}, {"model": ""}):
            answer = await http.post("/v1/completions", json={"prompt": "hi", **model})
            assert answer.json()["model"] == "a/b"
