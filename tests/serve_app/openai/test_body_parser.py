"""Bodies on an event loop: a long one is parsed beside it, and at most a few at one time."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from serve_app.errors import InvalidRequest
from serve_app.limits import INLINE_BODY_BYTES, PARSER_THREADS
from serve_app.openai import requests
from serve_app.openai.requests import BodyParser, CompletionRequest


def body(prompt: str, **fields: Any) -> bytes:
    return json.dumps({"prompt": prompt} | fields).encode()


LONG = body("x" * INLINE_BODY_BYTES)


async def test_the_event_loop_runs_while_a_long_body_is_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    going = threading.Event()

    def parse_once_the_loop_has_run(model: Any, raw: bytes) -> Any:
        assert going.wait(20)
        return requests_parse(model, raw)

    requests_parse = requests.parse
    monkeypatch.setattr(requests, "parse", parse_once_the_loop_has_run)
    parsed = asyncio.create_task(BodyParser("m").parse(CompletionRequest, LONG))
    await asyncio.sleep(0)
    going.set()  # only a loop that runs gets here
    assert (await parsed).prompts() == ["x" * INLINE_BODY_BYTES]


async def test_few_long_bodies_are_parsed_at_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, lock = 0, 0, threading.Lock()
    full = threading.Barrier(PARSER_THREADS)

    def count(model: Any, raw: bytes) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        full.wait(20)  # all threads are in here at once
        with lock:
            running -= 1
        return requests_parse(model, raw)

    requests_parse = requests.parse
    monkeypatch.setattr(requests, "parse", count)
    parser = BodyParser("m")
    await asyncio.gather(*(parser.parse(CompletionRequest, LONG) for _ in range(6)))
    assert most == PARSER_THREADS


async def test_the_errors_of_a_long_body_are_those_of_a_short_one() -> None:
    parser = BodyParser("m")
    for prompt in ("x", "x" * INLINE_BODY_BYTES):
        with pytest.raises(InvalidRequest, match="did you mean 'temperature'"):
            await parser.parse(CompletionRequest, body(prompt, temprature=1))


async def test_a_body_without_a_model_gets_the_name_of_the_one_that_is_served() -> None:
    parser = BodyParser("served")
    for fields, name in (({}, "served"), ({"model": ""}, "served"), ({"model": "x"}, "x")):
        assert (await parser.parse(CompletionRequest, body("hi", **fields))).model == name
