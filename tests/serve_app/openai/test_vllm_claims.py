"""What vLLM's public tests claim of an OpenAI-compatible server, as claims of ours.

Each claim names the test of vLLM that states it (tests/entrypoints, read 2026-11). It either holds
here, for the embedded engine over HTTP, or it asks for what is not implemented and is refused with
a 400 or 404 that names the field or path. There is no third kind: a claim that is neither fails.
What is about things that are not here at all (LoRA, images, tools as such) is left out.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from support.configs import make_config
from support.engines import make_engine
from support.serving import FaultyEngine, LocalEngines, client_of, make_service

from deepseek import __version__
from serve_app.config import EchoOptions
from serve_app.engines.embedded import EmbeddedEngine
from serve_app.errors import EngineUnavailable
from serve_app.openai.ingress import load_tokenizer
from serve_app.openai.routes import make_app
from serve_app.openai.service import Service
from serve_app.telemetry.tracing import Telemetry

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.heavy]

MODEL = "tiny"
PROMPT = "What does json.dumps do?"
IDS = [5, 6, 7, 8, 9]
#: tiny-deepseek-v3's vocabulary.
VOCAB_SIZE = 2048


@dataclass(slots=True)
class Served:
    """A service over a real engine, as the SDK sees it and as plain HTTP."""

    sdk: AsyncOpenAI
    http: httpx.AsyncClient
    tokenizer: Any

    async def text(self, prompt: Any = PROMPT, **fields: Any) -> Any:
        given = {"max_tokens": 5, "temperature": 0.0} | fields
        return await self.sdk.completions.create(model=MODEL, prompt=prompt, **given)

    async def chat(self, messages: Any = None, **fields: Any) -> Any:
        given = {"max_completion_tokens": 5, "temperature": 0.0} | fields
        return await self.sdk.chat.completions.create(
            model=MODEL, messages=messages or CONVERSATION, **given
        )

    async def chunks(self, stream: Any) -> list[Any]:
        return [chunk async for chunk in stream]


CONVERSATION = [
    {"role": "system", "content": "you are a helpful assistant"},
    {"role": "user", "content": "what is 1+1?"},
]

Check = Callable[[Served], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Claim:
    source: str
    says: str
    outcome: str
    check: Check


CLAIMS: list[Claim] = []


def holds(source: str, says: str) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        CLAIMS.append(Claim(source, says, "holds", check))
        return check

    return add


def refused(source: str, says: str, names: str, *, chat: bool = True, **fields: Any) -> None:
    """The claim asks for a field that is not implemented; `names` is what the 400 must name."""

    async def check(served: Served) -> None:
        body: dict[str, Any] = {"model": MODEL}
        body |= {"messages": CONVERSATION} if chat else {"prompt": PROMPT}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        answer = await served.http.post(path, json=body | fields)
        error = answer.json()["error"]
        assert answer.status_code == 400, answer.text
        assert error["param"] == names, error
        assert names in error["message"], error

    CLAIMS.append(Claim(source, says, "refused", check))


def absent(source: str, says: str, method: str, path: str) -> None:
    """The claim asks for an endpoint that is not here; the 404 must name it."""

    async def check(served: Served) -> None:
        answer = await served.http.request(method, path, json={})
        assert answer.status_code == 404, answer.text
        assert path in answer.json()["error"]["message"]

    CLAIMS.append(Claim(source, says, "refused", check))


def rejects(source: str, says: str, *, chat: bool = True, **fields: Any) -> None:
    """vLLM answers 400 here, and so do we."""

    async def check(served: Served) -> None:
        ask = served.chat if chat else served.text
        with pytest.raises(openai.BadRequestError) as raised:
            await ask(extra_body=fields)
        assert raised.value.body["param"], raised.value

    CLAIMS.append(Claim(source, says, "holds", check))


# Completions.

COMPLETION = "completion/test_completion.py::"


@holds(f"{COMPLETION}test_single_completion", "usage adds up and cached tokens are told")
async def _(served: Served) -> None:
    answer = await served.text()
    assert answer.id
    (choice,) = answer.choices
    assert choice.text
    assert choice.finish_reason == "length"
    num_prompt = len(served.tokenizer.encode(PROMPT))
    assert answer.usage.completion_tokens == 5
    assert answer.usage.prompt_tokens == num_prompt
    assert answer.usage.total_tokens == num_prompt + 5
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


@holds(f"{COMPLETION}test_single_completion", "a prompt of token ids is taken as it is")
async def _(served: Served) -> None:
    answer = await served.text(IDS)
    assert answer.usage.prompt_tokens == len(IDS)
    assert getattr(answer.choices[0], "prompt_logprobs", None) is None


refused(
    f"{COMPLETION}test_completion_truncation_side_controls_prompt_truncation",
    "prompts are cut to truncate_prompt_tokens",
    "truncate_prompt_tokens",
    chat=False,
    truncate_prompt_tokens=4,
)


@holds(f"{COMPLETION}test_no_logprobs", "logprobs null gives none")
async def _(served: Served) -> None:
    assert (await served.text(IDS, logprobs=None)).choices[0].logprobs is None


@holds(f"{COMPLETION}test_zero_logprobs", "logprobs 0 gives the sampled token alone")
async def _(served: Served) -> None:
    told = (await served.text(IDS, logprobs=0)).choices[0].logprobs
    assert told.token_logprobs is not None
    assert [len(top) for top in told.top_logprobs] == [1] * 5


@holds(f"{COMPLETION}test_some_logprobs", "logprobs 5 gives five, or six with the sampled token")
async def _(served: Served) -> None:
    told = (await served.text(IDS, logprobs=5, temperature=1.0, seed=1)).choices[0].logprobs
    assert all(5 <= len(top) <= 6 for top in told.top_logprobs)
    assert all(t in top for t, top in zip(told.tokens, told.top_logprobs, strict=True))


rejects(f"{COMPLETION}test_too_many_completion_logprobs", "21 are too many", chat=False,
        logprobs=21)  # fmt: skip
rejects(
    f"{COMPLETION}test_too_many_completion_logprobs",
    "30 are too many in a stream",
    chat=False,
    logprobs=30,
    stream=True,
)


@holds(f"{COMPLETION}test_too_many_completion_logprobs", "the server works after a refusal")
async def _(served: Served) -> None:
    with pytest.raises(openai.BadRequestError):
        await served.text(logprobs=21)
    assert (await served.text()).choices


rejects(f"{COMPLETION}test_prompt_logprobs_completion[-1]", "-1 is refused", chat=False,
        prompt_logprobs=-1)  # fmt: skip


@holds(f"{COMPLETION}test_prompt_logprobs_completion[0]", "each prompt's logprobs are told")
async def _(served: Served) -> None:
    prompts = ["A robot may not injure another robot", "My name is"]
    answer = await served.text(prompts, extra_body={"prompt_logprobs": 0})
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        assert len(choice.prompt_logprobs) == len(served.tokenizer.encode(prompt))
        assert choice.prompt_logprobs[0] is None
        assert all(len(entry) == 1 for entry in choice.prompt_logprobs[1:])


@holds(f"{COMPLETION}test_prompt_logprobs_completion[1]", "with the best alternative")
async def _(served: Served) -> None:
    answer = await served.text("My name is", extra_body={"prompt_logprobs": 1})
    assert all(1 <= len(entry) <= 2 for entry in answer.choices[0].prompt_logprobs[1:])


@holds(f"{COMPLETION}test_prompt_logprobs_completion[None]", "and none unless asked for")
async def _(served: Served) -> None:
    assert getattr((await served.text()).choices[0], "prompt_logprobs", None) is None


@holds(f"{COMPLETION}test_completion_streaming", "the chunks together are the whole answer")
async def _(served: Served) -> None:
    whole = (await served.text()).choices[0].text
    chunks = await served.chunks(await served.text(stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole


@holds(f"{COMPLETION}test_completion_streaming", "one finish reason, on the last chunk")
async def _(served: Served) -> None:
    chunks = await served.chunks(await served.text(stream=True))
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]


@holds(f"{COMPLETION}test_completion_streaming", "the last chunk has text")
async def _(served: Served) -> None:
    chunks = await served.chunks(await served.text(stream=True))
    assert chunks[-1].choices[0].text


@holds(f"{COMPLETION}test_parallel_no_streaming", "n = 3 gives three different answers in order")
async def _(served: Served) -> None:
    answer = await served.text(n=3, max_tokens=50, temperature=1.0, logprobs=0, seed=42)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(choice.finish_reason for choice in answer.choices)
    assert len({choice.text for choice in answer.choices}) == 3


@holds(f"{COMPLETION}test_parallel_streaming", "n = 3 streams carry their index")
async def _(served: Served) -> None:
    stream = await served.text(n=3, max_tokens=50, temperature=1.0, seed=42, stream=True)
    texts, ended = ["", "", ""], 0
    async for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        ended += choice.finish_reason is not None
    assert ended == 3
    assert len(set(texts)) == 3


def _usage_claims(source: str, ask: str) -> None:
    @holds(source, f"{ask}: include_usage false sends no usage")
    async def _(served: Served) -> None:
        for options in (
            {"include_usage": False, "continuous_usage_stats": False},
            {"include_usage": False, "continuous_usage_stats": True},
            {},
        ):
            stream = await getattr(served, ask)(stream=True, stream_options=options)
            assert all(chunk.usage is None for chunk in await served.chunks(stream)), options

    @holds(source, f"{ask}: include_usage sends it after the last choice, without choices")
    async def _(served: Served) -> None:
        options = {"include_usage": True, "continuous_usage_stats": False}
        stream = await getattr(served, ask)(stream=True, stream_options=options)
        *chunks, last = await served.chunks(stream)
        assert all(chunk.usage is None for chunk in chunks)
        assert last.choices == []
        assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
        assert last.usage.completion_tokens == 5

    @holds(source, f"{ask}: continuous_usage_stats sends it on every chunk, growing")
    async def _(served: Served) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        stream = await getattr(served, ask)(stream=True, stream_options=options)
        chunks = await served.chunks(stream)
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == 5
        assert chunks[-1].choices == []
        assert all(
            c.usage.total_tokens == c.usage.prompt_tokens + c.usage.completion_tokens
            for c in chunks
        )

    for options in (
        {"include_usage": None},
        {"include_usage": True},
        {"continuous_usage_stats": None},
        {"continuous_usage_stats": True},
    ):
        rejects(
            source,
            f"{ask}: {options} needs a stream",
            chat=ask == "chat",
            stream=False,
            stream_options=options,
        )


_usage_claims(f"{COMPLETION}test_completion_stream_options", "text")


@holds(f"{COMPLETION}test_batch_completions", "equal prompts give equal greedy answers")
async def _(served: Served) -> None:
    for prompts in ([PROMPT] * 2, [IDS] * 2):
        answer = await served.text(prompts)
        assert answer.choices[0].text == answer.choices[1].text


refused(f"{COMPLETION}test_batch_completions", "beam search", "use_beam_search", chat=False,
        use_beam_search=True, n=2)  # fmt: skip


@holds(f"{COMPLETION}test_batch_completions", "two prompts stream one choice to a chunk")
async def _(served: Served) -> None:
    texts = ["", ""]
    async for chunk in await served.text([PROMPT] * 2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
    assert texts[0] == texts[1] != ""


def _echo_claim(logprobs: int, prompt: Any, kind: str) -> None:
    @holds(f"{COMPLETION}test_echo_logprob_completion[{logprobs}]", f"echo of {kind}")
    async def _(served: Served) -> None:
        choice = (await served.text(prompt, echo=True, logprobs=logprobs)).choices[0]
        said = prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt)
        assert choice.text.startswith(said)
        told = choice.logprobs
        assert told.token_logprobs[0] is None
        assert told.top_logprobs[0] is None
        num_prompt = len(served.tokenizer.encode(said) if isinstance(prompt, str) else prompt)
        assert len(told.tokens) == len(told.text_offset) == num_prompt + 5
        assert all(max(logprobs, 1) <= len(top) <= logprobs + 1 for top in told.top_logprobs[1:])


for _num in (0, 1):
    _echo_claim(_num, PROMPT, "a text")
    _echo_claim(_num, IDS, "token ids")

for _kind, _value in (("json", {"type": "object", "properties": {"a": "b"}}), ("regex", "[.*"),
                      ("grammar", "root ::= invalidsyntax")):  # fmt: skip
    refused(
        f"{COMPLETION}test_invalid_{_kind}",
        f"a broken {_kind} is a 400",
        "structured_outputs",
        chat=False,
        structured_outputs={_kind: _value},
    )

rejects("completion/test_prompt_validation.py::test_empty_prompt", "prompt null", chat=False,
        prompt=None)  # fmt: skip
rejects("completion/test_empty_prompt_list.py", "an empty list of prompts", chat=False, prompt=[])


@holds("completion/test_prompt_validation.py::test_out_of_vocab_token_ids", "named in a 400")
async def _(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match=r"out of vocabulary|outside the vocabulary"):
        await served.text([999_999])


@holds("completion/test_completion_text_offset.py", "streamed and whole offsets agree")
async def _(served: Served) -> None:
    fields = {"logprobs": 0, "max_tokens": 20, "stop": ["\n\n\n\n"]}
    whole = (await served.text(**fields)).choices[0].logprobs
    chunks = await served.chunks(await served.text(**fields, stream=True))
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [offset for part in told for offset in part.text_offset] == whole.text_offset


# Token ids in answers.

IDS_SOURCE = "basic/test_return_token_ids.py::"
refused(f"{IDS_SOURCE}test_basic_completion_with_emoji", "ids of prompt and answer",
        "return_token_ids", chat=False, return_token_ids=True)  # fmt: skip
refused(f"{IDS_SOURCE}test_chat_completion_with_emoji_and_token_ids", "the same in chat",
        "return_token_ids", return_token_ids=True)  # fmt: skip


@holds(f"{IDS_SOURCE}test_basic_completion_with_emoji", "return_token_ids false gives none")
async def _(served: Served) -> None:
    answer = await served.text(logprobs=1, extra_body={"return_token_ids": False})
    assert answer.choices[0].model_dump().get("token_ids") is None


@holds(f"{IDS_SOURCE}test_comparison_with_prompt_logprobs_and_logprobs", "token_id:N strings")
async def _(served: Served) -> None:
    extra = {"return_tokens_as_token_ids": True, "prompt_logprobs": 1}
    choice = (await served.text(IDS, echo=True, logprobs=1, extra_body=extra)).choices[0]
    ids = [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]
    assert ids[: len(IDS)] == IDS
    assert [str(i) in e for i, e in zip(IDS[1:], choice.prompt_logprobs[1:], strict=True)] == [
        True
    ] * (len(IDS) - 1)


# Chat.

CHAT = "chat_completion/test_chat.py::"


@holds(f"{CHAT}test_no_logprobs_chat", "logprobs false gives none")
async def _(served: Served) -> None:
    assert (await served.chat(logprobs=False)).choices[0].logprobs is None


@holds(f"{CHAT}test_zero_logprobs_chat", "top_logprobs 0 gives no alternatives")
async def _(served: Served) -> None:
    told = (await served.chat(logprobs=True, top_logprobs=0)).choices[0].logprobs
    assert [len(entry.top_logprobs) for entry in told.content] == [0] * 5


@holds(f"{CHAT}test_some_logprobs_chat", "top_logprobs 5 gives five")
async def _(served: Served) -> None:
    told = (await served.chat(logprobs=True, top_logprobs=5)).choices[0].logprobs
    assert [len(entry.top_logprobs) for entry in told.content] == [5] * 5


for _fields in ({"top_logprobs": 21, "stream": True}, {"top_logprobs": 30, "stream": False}):
    rejects(f"{CHAT}test_too_many_chat_logprobs", f"{_fields}", logprobs=True, **_fields)


@holds(f"{CHAT}test_too_many_chat_logprobs", "the server works after a refusal")
async def _(served: Served) -> None:
    with pytest.raises(openai.BadRequestError):
        await served.chat(logprobs=True, top_logprobs=30)
    assert (await served.chat()).choices[0].message.content is not None


rejects(f"{CHAT}test_prompt_logprobs_chat[-1]", "-1 is refused", prompt_logprobs=-1)


def _chat_prompt_logprobs(count: int) -> None:
    @holds(f"{CHAT}test_prompt_logprobs_chat[{count}]", "told beside the choices")
    async def _(served: Served) -> None:
        answer = await served.chat(extra_body={"prompt_logprobs": count})
        assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens
        assert answer.prompt_logprobs[0] is None
        assert all(max(count, 1) <= len(entry) <= count + 1 for entry in answer.prompt_logprobs[1:])


for _num in (0, 1, 2):
    _chat_prompt_logprobs(_num)


@holds(f"{CHAT}test_prompt_logprobs_chat[None]", "none unless asked for")
async def _(served: Served) -> None:
    assert getattr(await served.chat(), "prompt_logprobs", None) is None


@holds(f"{CHAT}test_single_chat_session", "an answer goes back as a message")
async def _(served: Served) -> None:
    first = await served.chat(logprobs=True, top_logprobs=5)
    assert first.choices[0].finish_reason == "length"
    assert first.usage.completion_tokens == 5
    message = first.choices[0].message
    assert message.role == "assistant"
    again = [
        *CONVERSATION,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": "express your result in json"},
    ]
    assert (await served.chat(again)).choices[0].message.content is not None


@holds(f"{CHAT}test_chat_streaming", "the deltas together are the whole answer")
async def _(served: Served) -> None:
    whole = (await served.chat(max_completion_tokens=10)).choices[0]
    chunks = await served.chunks(await served.chat(max_completion_tokens=10, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert {delta.role for delta in deltas} <= {"assistant", None}
    assert "".join(delta.content or "" for delta in deltas) == whole.message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole.finish_reason]


@holds(f"{CHAT}test_chat_streaming", "the last delta has content")
async def _(served: Served) -> None:
    chunks = await served.chunks(await served.chat(stream=True))
    assert chunks[-1].choices[0].delta.content


_usage_claims(f"{CHAT}test_chat_completion_stream_options", "chat")
refused(f"{CHAT}test_chat_completion_stream_options", "min_tokens", "min_tokens", min_tokens=10)
refused(f"{CHAT}test_chat_completion_stream_options", "min_characters", "min_characters",
        min_characters=10)  # fmt: skip

for _name, _value in (
    ("choice_chat", {"choice": ["a", "b"]}),
    ("json_chat", {"json": {"type": "object"}}),
    ("regex_chat", {"regex": "[0-9]+"}),
    ("type_error", {"regex": {"1": "Python"}}),
):
    refused(f"{CHAT}test_structured_outputs_{_name}", "structured output", "structured_outputs",
            structured_outputs=_value)  # fmt: skip

refused(f"{CHAT}test_response_format_json_object", "JSON mode", "response_format",
        response_format={"type": "json_object"})  # fmt: skip
refused(f"{CHAT}test_response_format_json_schema", "a schema", "response_format",
        response_format={"type": "json_schema", "json_schema": {"name": "a"}})  # fmt: skip
refused("chat_completion/test_chat_error.py::test_json_schema_response_format_missing_schema",
        "a schema that is missing", "response_format",
        response_format={"type": "json_schema"})  # fmt: skip


@holds(f"{CHAT}test_response_format_text", "text is what there is anyway")
async def _(served: Served) -> None:
    answer = await served.chat(response_format={"type": "text"})
    assert answer.choices[0].message.content is not None


refused(f"{CHAT}test_extra_fields_allowed", "fields of a message that nobody knows",
        "messages.0.extra_field",
        messages=[{"role": "user", "content": "what is 1+1?", "extra_field": "0"}])  # fmt: skip
refused(f"{CHAT}test_custom_role", "roles that nobody knows", "messages.0.role",
        messages=[{"role": "my-custom-role", "content": "what is 1+1?"}])  # fmt: skip


@holds(f"{CHAT}test_complex_message_content", "text parts are the text")
async def _(served: Served) -> None:
    text = "what is 1+1?"
    plain = await served.chat([{"role": "user", "content": text}])
    parts = await served.chat([{"role": "user", "content": [{"type": "text", "text": text}]}])
    assert plain.choices[0].message.content == parts.choices[0].message.content


for _seed in (-(2**63) - 1, 2**63):
    rejects(f"{CHAT}test_long_seed", f"seed {_seed} has no 64 bits", seed=_seed)

absent(f"{CHAT}test_invocations", "SageMaker's path", "POST", "/invocations")


def _choices_claim(source: str, num: int, **fields: Any) -> None:
    @holds(f"{CHAT}{source}", f"n = {num} gives {num} choices")
    async def _(served: Served) -> None:
        answer = await served.chat(n=num, max_completion_tokens=20, temperature=0.8, **fields)
        assert [choice.index for choice in answer.choices] == list(range(num))
        texts = [choice.message.content for choice in answer.choices]
        assert all(texts)
        assert num == 1 or len(set(texts)) > 1


_choices_claim("test_chat_completion_n_parameter_non_streaming", 3)
_choices_claim("test_chat_completion_n_with_seed", 2, seed=42)
_choices_claim("test_chat_completion_n_equals_1", 1)


@holds(f"{CHAT}test_chat_completion_n_parameter_streaming", "both choices stream content")
async def _(served: Served) -> None:
    texts = ["", ""]
    async for chunk in await served.chat(n=2, temperature=0.7, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert all(texts)


# Errors.

ERROR = "chat_completion/test_chat_error.py::"


def _faulty(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "prompt": prompt, **fields}


@holds(f"{ERROR}test_chat_error_non_stream", "an engine that fails is a 500")
async def _(served: Served) -> None:
    async with client_of(make_service(FaultyEngine(EchoOptions()))) as client:
        answer = await client.post("/v1/completions", json=_faulty("failed"))
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_failed"


@holds(f"{ERROR}test_chat_error_stream", "a failure after the first token is told in the stream")
async def _(served: Served) -> None:
    async with client_of(make_service(FaultyEngine(EchoOptions()))) as client:
        answer = await client.post("/v1/completions", json=_faulty("late-failed", stream=True))
    assert answer.status_code == 200
    assert '"code":"engine_failed"' in answer.text


for _content in ("be brief", [{"type": "text", "text": "be brief"}]):

    @holds(f"{ERROR}test_system_message_accepts_text", "as a string and as an array")
    async def _(served: Served, content: Any = _content) -> None:
        messages = [{"role": "system", "content": content}, CONVERSATION[1]]
        assert (await served.chat(messages)).choices


refused(f"{ERROR}test_user_message_accepts_image", "images", "messages.0.content.0.type",
        messages=[{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "https://e.com/a"}}]}])  # fmt: skip

STOP = "chat_completion/test_chat_stop_token_ids_validation.py::"


@holds(f"{STOP}test_chat_stop_token_ids_valid", "the last id of the vocabulary is one")
async def _(served: Served) -> None:
    extra = {"stop_token_ids": [VOCAB_SIZE - 1]}
    assert (await served.chat(extra_body=extra)).choices[0].message.content is not None


@holds(f"{STOP}test_chat_stop_token_ids_out_of_vocab", "the 400 names the id and the size")
async def _(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await served.chat(extra_body={"stop_token_ids": [VOCAB_SIZE + 1]})
    assert str(VOCAB_SIZE + 1) in str(raised.value)
    assert re.search(rf"\b{VOCAB_SIZE}\b", str(raised.value))


rejects(f"{STOP}test_chat_stop_token_ids_negative", "-1 is refused", stop_token_ids=[-1])

TOOLS = "chat_completion/test_tool_choice_null.py::"
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@holds(f"{TOOLS}test_null_tool_choice_without_tools_matches_an_absent_one", "null is absent")
async def _(served: Served) -> None:
    absent_one = await served.chat()
    null = await served.chat(extra_body={"tool_choice": None, "tools": None})
    assert null.choices[0].message.content == absent_one.choices[0].message.content


rejects(f"{TOOLS}test_invalid_tool_choice_is_still_rejected[bogus]", "bogus", tool_choice="bogus")
refused(f"{TOOLS}test_null_tool_choice_defaults_to_auto_like_an_absent_one", "tools", "tools",
        tools=[_TOOL])  # fmt: skip

for _body in (b'"this is no object"', b'["not", "an", "object"]', b"42", b"null"):

    @holds("chat_completion/test_non_object_body_validation.py", f"{_body!r} is a 400")
    async def _(served: Served, body: bytes = _body) -> None:
        answer = await served.http.post(
            "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


rejects("chat_completion/test_non_object_body_validation.py", "an empty cache_salt", cache_salt="")
BIAS = "chat_completion/test_chat_logit_bias_validation.py::"
refused(f"{BIAS}test_chat_logit_bias_valid", "logit_bias", "logit_bias", logit_bias={"5": 1.0})
refused(f"{BIAS}test_chat_logit_bias_invalid", "logit_bias out of range", "logit_bias",
        logit_bias={"999999": 1.0})  # fmt: skip
refused("chat_completion/test_chat_echo.py", "echo in chat", "echo", echo=True)

# Around the generation.


@holds("serve/instrumentator/test_basic.py::test_show_version", "the package's version")
async def _(served: Served) -> None:
    assert (await served.http.get("/version")).json() == {"version": __version__}


@holds("serve/instrumentator/test_basic.py::test_check_health", "200 while an engine is up")
async def _(served: Served) -> None:
    assert (await served.http.get("/health")).status_code == 200


@holds("serve/instrumentator/test_basic.py::test_request_wrong_content_type", "refused")
async def _(served: Served) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    with pytest.raises(openai.APIStatusError):
        await served.chat(extra_headers=headers)


absent("serve/instrumentator/test_basic.py::test_server_load", "load", "GET", "/load")


@holds("instrumentator/test_basic.py::test_health_check_engine_dead_error", "dead is a 503")
async def _(served: Served) -> None:
    class Dead(LocalEngines):
        async def statuses(self) -> Any:
            raise EngineUnavailable("no engine replica is ready; retry later")

    service = make_service()
    service.engines = Dead(FaultyEngine(EchoOptions()))
    async with client_of(service) as client:
        assert (await client.get("/health")).status_code == 503


MIDDLEWARE = "serve/middleware/test_optional_middleware.py::"
KEYED: dict[str, Any] = {"api_keys": ["test"]}


def _key_claim(name: str, says: str, path: str, status: int, **settings: Any) -> None:
    headers = settings.pop("headers", {})

    @holds(f"{MIDDLEWARE}{name}", says)
    async def _(served: Served) -> None:
        async with client_of(make_service(**settings)) as client:
            answer = await client.get(path, headers=headers, follow_redirects=True)
        assert answer.status_code == status
        assert "x-request-id" not in answer.headers


_GOOD = {"Authorization": "Bearer test"}
_key_claim("test_no_api_token", "no key configured, none needed", "/v1/models", 200)
_key_claim("test_missing_api_token", "a missing key is a 401", "/v1/models", 401, **KEYED)
_key_claim("test_passed_api_token", "a right key", "/v1/models", 200, **KEYED, headers=_GOOD)
_key_claim("test_not_v1_api_token", "health needs no key", "/health", 200, **KEYED)

AUTH = "serve/middleware/test_authentication_middleware.py::"


@holds(f"{AUTH}test_trailing_slash_does_not_unguard_a_protected_path", "still a 401")
async def _(served: Served) -> None:
    async with client_of(make_service(**KEYED)) as client:
        answer = await client.get("/v1/models/", follow_redirects=True)
    assert answer.status_code in (401, 404)
    assert "data" not in answer.json()


@holds(f"{AUTH}test_cors_preflight_needs_no_token_and_returns_no_data", "answered by CORS")
async def _(served: Served) -> None:
    service = make_service(**KEYED, allowed_origins=["http://dashboard.example"])
    async with client_of(service) as client:
        answer = await client.options(
            "/v1/completions",
            headers={
                "Origin": "http://dashboard.example",
                "Access-Control-Request-Method": "POST",
            },
        )
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "http://dashboard.example"


@holds(f"{AUTH}test_bare_options_on_a_guarded_mount_needs_a_token", "and shows no data")
async def _(served: Served) -> None:
    async with client_of(make_service(**KEYED)) as client:
        answer = await client.options("/metrics")
    assert answer.status_code in (401, 405)
    assert "intserve_" not in answer.text


# Tokenizing.

TOKENIZE = "serve/tokenize/test_tokenization.py::"


@holds(f"{TOKENIZE}test_tokenize_completions", "with and without special tokens")
async def _(served: Served) -> None:
    for special in (False, True):
        body = {"model": MODEL, "prompt": PROMPT, "add_special_tokens": special}
        told = (await served.http.post("/tokenize", json=body)).json()
        ids = served.tokenizer.encode(PROMPT, add_special_tokens=special)
        assert told["tokens"] == ids
        assert told["count"] == len(ids)
        assert told["max_model_len"] == 512
        assert told["token_strs"] is None


@holds(f"{TOKENIZE}test_tokenize_chat", "as the chat template renders it")
async def _(served: Served) -> None:
    for generation in (False, True):
        for special in (False, True):
            flags = {"add_generation_prompt": generation, "add_special_tokens": special}
            body = {"model": MODEL, "messages": CONVERSATION, **flags}
            told = (await served.http.post("/tokenize", json=body)).json()
            text = served.tokenizer.apply_chat_template(
                CONVERSATION, add_generation_prompt=generation, tokenize=False
            )
            assert told["tokens"] == served.tokenizer.encode(text, add_special_tokens=special)


async def _refuses(served: Served, names: str, **fields: Any) -> None:
    body = {"model": MODEL, "messages": CONVERSATION, **fields}
    answer = await served.http.post("/tokenize", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == names


async def _refuses_tools(served: Served) -> None:
    await _refuses(served, "tools", tools=[_TOOL])


async def _refuses_continuing(served: Served) -> None:
    await _refuses(
        served, "continue_final_message", continue_final_message=True, add_generation_prompt=False
    )


CLAIMS.append(Claim(f"{TOKENIZE}test_tokenize_chat_with_tools", "tools", "refused", _refuses_tools))
CLAIMS.append(
    Claim(f"{TOKENIZE}test_tokenize_chat", "a message continued", "refused", _refuses_continuing)
)


@holds(f"{TOKENIZE}test_tokenize_with_return_token_strs", "the vocabulary's own strings")
async def _(served: Served) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "return_token_strs": True}
    told = (await served.http.post("/tokenize", json=body)).json()
    ids = served.tokenizer.encode(PROMPT)
    assert told["token_strs"] == served.tokenizer.convert_ids_to_tokens(ids)


@holds(f"{TOKENIZE}test_detokenize", "the text again")
async def _(served: Served) -> None:
    ids = served.tokenizer.encode(PROMPT, add_special_tokens=False)
    answer = await served.http.post("/detokenize", json={"model": MODEL, "tokens": ids})
    assert answer.json() == {"prompt": PROMPT}


absent(f"{TOKENIZE}test_tokenizer_info_basic", "tokenizer_info", "GET", "/tokenizer_info")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    from transformers import AutoTokenizer

    directory = make_engine(tiny_model, "int8", tmp_path_factory.getbasetemp())
    config = make_config(
        engine=directory, model_name=MODEL, allow_ungated=True, max_model_len=512, kv_tokens=4096
    )
    engines = LocalEngines(EmbeddedEngine(config.pool.engine))
    service = Service(config, load_tokenizer(config), engines, Telemetry(None))
    transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://test") as http,
        AsyncOpenAI(base_url="http://test/v1", api_key="-", max_retries=0, http_client=http) as sdk,
    ):
        yield Served(sdk, http, AutoTokenizer.from_pretrained(tiny_model))
        await engines.engine.shutdown()


@pytest.mark.parametrize(
    "claim", [pytest.param(c, id=f"{n:03}-{c.source}") for n, c in enumerate(CLAIMS)]
)
async def test_a_claim_of_vllms_tests_holds_or_is_refused_by_name(
    claim: Claim, served: Served
) -> None:
    await claim.check(served)


async def test_the_number_of_claims_is_the_one_that_the_documentation_gives(root: Path) -> None:
    told = (root / "docs" / "clients.md").read_text(encoding="utf-8")
    counts = {kind: sum(c.outcome == kind for c in CLAIMS) for kind in ("holds", "refused")}
    assert (
        f"{len(CLAIMS)} claims of vLLM's public tests: {counts['holds']} hold, "
        f"{counts['refused']} are refused by name" in told
    )
