"""The prompt in the answer: `echo`, `prompt_logprobs`, and answers without any new token."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from support.serving import client_of, make_service, metric, read_sse

from deepseek.engine.request import TokenLogprob, TopLogprob
from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Event, GenerateRequest, PromptLogprobs
from serve_app.openai import answers, json_text

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"


async def ask(path: str = TEXT, status: int = 200, **fields: Any) -> Any:
    async with client_of(make_service()) as client:
        answer = await client.post(path, json={"model": "echo", **fields})
    assert answer.status_code == status, answer.text
    return read_sse(answer.text) if fields.get("stream") else answer.json()


def joined(chunks: list[Any], index: int) -> dict[str, Any]:
    """What the streamed pieces of one choice add up to."""
    parts = [c["choices"][0] for c in chunks if c != "[DONE]" and c["choices"]]
    parts = [part for part in parts if part["index"] == index]
    logprobs = [part["logprobs"] for part in parts if part["logprobs"]]
    keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {
        "index": index,
        "text": "".join(part["text"] for part in parts),
        "logprobs": {key: [x for item in logprobs for x in item[key]] for key in keys}
        if logprobs
        else None,
        "finish_reason": parts[-1]["finish_reason"],
    }


async def test_the_prompt_comes_first_and_its_first_token_has_no_logprob() -> None:
    [choice] = (await ask(prompt="hé!", echo=True, logprobs=1, max_tokens=2))["choices"]
    assert choice["text"] == "hé!h\ufffd"  # the echo engine says `h` and half of `é`
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["h", "", "é", "!", "h", ""]
    assert logprobs["token_logprobs"] == [None, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert logprobs["top_logprobs"] == [None, *({t: 0.0} for t in ("", "é", "!", "h", ""))]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3, 4]


@pytest.mark.parametrize("logprobs", [None, 0, 1])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
async def test_streamed_and_whole_echoes_say_the_same(
    logprobs: int | None, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "PIECE_LOGPROBS", 4)  # the prompt comes in several pieces
    prompts = ["Grüße aus 世界", "z"]
    fields = {"prompt": prompts, "n": 2, "echo": True, "max_tokens": max_tokens}
    whole = await ask(**fields, logprobs=logprobs)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = await ask(**fields, logprobs=logprobs, **options)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    for index, choice in enumerate(whole["choices"]):
        prompt = prompts[index // 2]
        assert choice["text"].startswith(prompt)
        assert (choice["logprobs"] is None) == (logprobs is None)
        assert joined(chunks, index) == choice
        assert choice["finish_reason"] == "length" if max_tokens < 2 or index < 2 else "stop"
        if max_tokens == 0:
            assert choice["text"] == prompt
    usage = whole["usage"]
    assert usage["completion_tokens"] == 2 * max_tokens + 2 * min(max_tokens, 1)
    assert chunks[-2]["usage"] == usage


async def test_token_ids_are_echoed_as_their_text() -> None:
    whole = await ask(prompt=[[104, 105], [0xE4, 0xB8, 0x96]], echo=True, max_tokens=0)
    assert [choice["text"] for choice in whole["choices"]] == ["hi", "世"]
    assert whole["usage"]["completion_tokens"] == 0


async def test_nothing_new_needs_no_echo_where_the_prompts_logprobs_are_asked_for() -> None:
    whole = await ask(prompt="ab", max_tokens=0, prompt_logprobs=1)
    [choice] = whole["choices"]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == ("", None, "length")
    entry = {"logprob": 0.0, "rank": 1, "decoded_token": "b"}
    assert choice["prompt_logprobs"] == [None, {"98": entry}]


async def test_prompt_logprobs_stand_in_the_choice_of_a_completion_and_beside_those_of_a_chat() -> (
    None
):
    messages = [{"role": "user", "content": "x"}]
    chat = await ask(CHAT, messages=messages, prompt_logprobs=0, max_tokens=1, n=2)
    assert len(chat["prompt_logprobs"]) == len("user: x")
    assert chat["prompt_logprobs"][0] is None
    assert all("prompt_logprobs" not in choice for choice in chat["choices"])
    text = await ask(prompt="abc", echo=True, logprobs=0, max_tokens=1)
    assert "prompt_logprobs" not in text["choices"][0]
    assert "prompt_logprobs" not in text


async def test_tokens_may_be_written_as_their_ids() -> None:
    fields: dict[str, Any] = {"return_tokens_as_token_ids": True, "max_tokens": 1}
    whole = await ask(prompt="ab", echo=True, logprobs=1, **fields)
    logprobs = whole["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:97", "token_id:98", "token_id:97"]
    assert logprobs["top_logprobs"] == [None, {"token_id:98": 0.0}, {"token_id:97": 0.0}]
    assert logprobs["text_offset"] == [0, 1, 2]
    messages = [{"role": "user", "content": "x"}]
    chat = await ask(CHAT, messages=messages, logprobs=True, top_logprobs=1, **fields)
    [entry] = chat["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("token_id:117", [117])
    assert entry["top_logprobs"][0]["token"] == "token_id:117"


async def test_bytes_are_the_tokens_own_also_within_a_character() -> None:
    messages = [{"role": "user", "content": "x"}]
    fields = {"logprobs": True, "top_logprobs": 1, "max_tokens": 9, "ignore_eos": True}
    chat = await ask(CHAT, messages=[{"role": "user", "content": "é"}], **fields)
    content = chat["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "user: éu".encode()
    assert [entry["top_logprobs"][0]["bytes"] for entry in content] == [
        entry["bytes"] for entry in content
    ]
    zero = await ask(CHAT, messages=messages, logprobs=True, top_logprobs=0, max_tokens=1)
    assert zero["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"echo": 1}, "echo"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    async with client_of(make_service()) as client:
        answer = await client.post(TEXT, json={"model": "echo", "prompt": "x", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == words


@pytest.mark.parametrize("fields", [{"echo": True, "logprobs": 4}, {"prompt_logprobs": 4}])
async def test_more_logprobs_than_an_answer_holds_are_refused_with_both_numbers(
    fields: dict[str, Any],
) -> None:
    async with client_of(make_service(max_prompt_logprobs=100)) as client:
        body = {"model": "echo", "prompt": "x" * 10, "max_tokens": 1, **fields}
        fits = await client.post(TEXT, json=body | {"n": 2})
        assert fits.status_code == 200
        answer = await client.post(TEXT, json=body | {"n": 3})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "too_many_logprobs"
    assert "150 entries" in error["message"]
    assert "holds 100" in error["message"]


async def test_a_large_answer_is_made_beside_the_event_loop_and_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = {"prompt": "wörld" * 40, "echo": True, "logprobs": 1, "max_tokens": 2}
    at_once = await ask(**fields)
    monkeypatch.setattr(json_text, "LARGE", 10)
    monkeypatch.setattr(json_text, "SLICE", 7)
    in_thread = await ask(**fields)
    assert in_thread["choices"] == at_once["choices"]


class Unlikely(EchoEngine):
    """An echo whose prompts have tokens that no text can have: their logprob is minus infinity."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        async for event in super().generate(request):
            if isinstance(event, PromptLogprobs):
                never = float("-inf")
                item = TokenLogprob(98, "b", never, (TopLogprob(97, "a", never),), b"b", 2)
                event = PromptLogprobs((None, item))
            yield event


@pytest.mark.parametrize("stream", [True, False])
async def test_an_impossible_prompt_still_gets_valid_json(stream: bool) -> None:
    async with client_of(make_service(Unlikely(EchoOptions()))) as client:
        body = {"model": "echo", "prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 0}
        answer = await client.post(TEXT, json=body | {"stream": stream})
    assert answer.status_code == 200
    assert '"token_logprobs":[null,-9999.0]' in answer.text
    assert "Infinity" not in answer.text


async def test_an_echoed_prompt_is_no_token_to_the_metrics() -> None:
    service = make_service()
    async with client_of(service) as client:
        body = {"model": "echo", "prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 0}
        assert (await client.post(TEXT, json=body)).status_code == 200
        text = (await client.get("/metrics")).text
    assert metric(text, "intserve_tokens_total", type="output") == 0
    assert metric(text, "gen_ai_server_time_to_first_token_seconds_count") == 0
    assert metric(text, "intserve_requests_total", outcome="ok") == 1
