"""Whatever a body holds, it is answered or refused in OpenAI's shape, and never a fault of ours."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.serving import client_of, make_service

from serve_app.openai.neutral import BODY, MESSAGE, PART
from serve_app.openai.requests import ChatRequest, CompletionRequest

pytestmark = pytest.mark.heavy

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"

BODIES: dict[str, list[dict[str, Any]]] = {
    CHAT: [
        {
            "model": "echo",
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "me"},
                {"role": "assistant", "content": None, "refusal": None, "tool_calls": []},
                {"role": "user", "content": "again"},
            ],
            "max_tokens": 3,
            "stop": ["a", "b"],
            "stop_token_ids": [1],
            "logprobs": True,
            "top_logprobs": 2,
            "metadata": {"a": "b"},
        },
        {
            "messages": [{"role": "user", "content": "hi"}],
            "max_completion_tokens": 3,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ],
    TEXT: [
        {
            "model": "echo",
            "prompt": ["hi", "ho"],
            "max_tokens": 3,
            "n": 2,
            "seed": 1,
            "logprobs": 1,
            "echo": True,
            "add_special_tokens": False,
            "user": "me",
        },
        {
            "prompt": [[1, 2], [3]],
            "max_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.5,
            "stream": True,
            "ignore_eos": True,
            "top_k": -1,
            "repetition_penalty": 1.0,
        },
    ],
    TOKENIZE: [
        {"prompt": "hi", "return_token_strs": True},
        {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True},
    ],
    DETOKENIZE: [{"model": "echo", "tokens": [104, 105]}],
}

NAMES = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *BODY, *MESSAGE, *PART})

HOSTILE: list[Any] = ["", "\x00", "\ud800", "a\udfff", "\u202e", "\ufffe", "x" * 300]
HOSTILE += [
    None,
    True,
    -1,
    2**63,
    10**100,
    10**400,
    0.5,
    float("nan"),
    [],
    {},
    [[]],
    {"a": {"b": []}},
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**53, -(2**63) - 1, 2**64]),
    st.floats(),
    st.text(max_size=9),
    st.sampled_from(["text", "user", "tool", "auto"]),
    st.sampled_from(HOSTILE).map(copy.deepcopy),  # a later mutation changes what was drawn
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=5)), inner, max_size=4),
    ),
    max_leaves=8,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value, with each of its keys or indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


@st.composite
def mutated(draw: st.DrawFn, valid: list[dict[str, Any]]) -> bytes:
    """A valid body with up to three values replaced, removed, added or doubled."""
    body = copy.deepcopy(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 3))):
        spots = list(places(body))
        if not spots:
            break
        holder, key = spots[draw(st.integers(0, len(spots) - 1))]
        match draw(st.sampled_from(["replace", "remove", "add", "double"])):
            case "replace":
                holder[key] = draw(VALUES)
            case "remove":
                del holder[key]
            case "add" if isinstance(holder, dict):
                holder[draw(st.one_of(st.sampled_from(NAMES), st.text(max_size=9)))] = draw(VALUES)
            case "double" if isinstance(holder, list):
                holder *= draw(st.sampled_from([2, 40]))
    return json.dumps(body).encode()


class Asker:
    """Asks one service in this process, on an event loop of its own."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._client = client_of(make_service(default_max_tokens=3))

    def ask(self, path: str, raw: bytes) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return self._runner.run(self._client.post(path, content=raw, headers=headers))


@pytest.fixture(scope="module")
def asker() -> Iterator[Asker]:
    with asyncio.Runner() as runner:
        yield Asker(runner)


def check_answer(answer: httpx.Response) -> None:
    if answer.status_code == 200:
        assert "internal_error" not in answer.text
        return
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].isprintable()
    assert len(error["message"]) < 1000
    assert error["param"] is None or len(error["param"]) < 400


@pytest.mark.parametrize("path", BODIES)
def test_any_hostile_value_in_any_place_is_answered_or_refused(path: str, asker: Asker) -> None:
    for body in BODIES[path]:
        for spot in range(len(list(places(body)))):
            for value in HOSTILE:
                hostile = copy.deepcopy(body)
                holder, key = list(places(hostile))[spot]
                holder[key] = value
                check_answer(asker.ask(path, json.dumps(hostile).encode()))


RELAXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("path", BODIES)
@given(data=st.data())
@RELAXED
def test_any_mutated_body_is_answered_or_refused(
    path: str, data: st.DataObject, asker: Asker
) -> None:
    check_answer(asker.ask(path, data.draw(mutated(BODIES[path]))))


@given(raw=st.binary(max_size=50), start=st.integers(0, 200), end=st.integers(0, 200))
@example(raw=b'"\\', start=0, end=0)
@RELAXED
def test_any_damaged_bytes_are_answered_or_refused(
    raw: bytes, start: int, end: int, asker: Asker
) -> None:
    valid = json.dumps(BODIES[CHAT][0]).encode()
    check_answer(asker.ask(CHAT, valid[:start] + raw + valid[end:]))


@pytest.mark.parametrize("path", BODIES)
def test_the_bodies_that_are_mutated_are_valid(path: str, asker: Asker) -> None:
    for body in BODIES[path]:
        answer = asker.ask(path, json.dumps(body).encode())
        assert answer.status_code == 200, answer.text
