"""Prompts to token ids: what cannot fit is not encoded, what may fit keeps its ids, bytes are
bounded, and the deadline holds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest
from support.serving import client_of, make_service
from support.tokenizers_of_others import KINDS, TEXT

from serve_app.config import EchoOptions
from serve_app.errors import DeadlineExceeded, InvalidRequest
from serve_app.openai.prompts import INLINE_BYTES, MAX_BYTES, SHORT_BYTES, Budget, PromptEncoder
from serve_app.openai.tokenizer import ByteTokenizer, HfTokenizer, PromptText
from serve_app.routing.checks import ContextLimit

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LIMIT = ContextLimit(100_000, "model's context")


def deadline(seconds: float = 20.0) -> float:
    return asyncio.get_running_loop().time() + seconds


class Watched(ByteTokenizer):
    """Records what is encoded as a whole, and waits there until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.lock = threading.Lock()
        self.encoding = self.most = 0
        self.encoded: list[int] = []

    def encode(self, prompt: PromptText) -> list[int]:
        size = len(prompt.text)
        with self.lock:
            self.encoding += size
            self.most = max(self.most, self.encoding)
        assert self.go.wait(20)
        with self.lock:
            self.encoding -= size
            self.encoded.append(size)
        return super().encode(prompt)[:10]

    def exceeds(self, prompt: PromptText, limit: int, abandoned: Callable[[], bool]) -> bool:
        return prompt.text.startswith("long") and len(prompt.text) > limit


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("kind", ["v3", "unigram_first", "llama_legacy"])
async def test_a_long_prompt_that_may_fit_has_the_ids_of_the_plain_encoding(
    tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    plain = KINDS[kind]()
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = HfTokenizer(directory, {"tokenizer.json": plain.to_str().encode()})
    text = "".join(f"{text} {number} " for number in range(120) for text in TEXT[:8])
    texts = [text, text * 3, "short"]
    assert len(texts[1].encode()) > SHORT_BYTES
    expected = [plain.encode(text).ids for text in texts]
    limit = ContextLimit(len(expected[1]), "KV cache")
    assert await PromptEncoder(tokenizer).encode(texts, limit, deadline()) == expected


@pytest.mark.parametrize("kind", ["v3", "words"])
@pytest.mark.parametrize("text", ["a", " x", "\n", "😀", "ab c", "<｜User｜> "])
def test_counting_in_pieces_finds_what_is_too_long_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, kind: str, text: str
) -> None:
    plain = KINDS[kind]()
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = HfTokenizer(directory, {"tokenizer.json": plain.to_str().encode()})
    long = text * (100_000 // len(text))
    count = len(plain.encode(long).ids)
    prompt = PromptText(long, special_tokens=True)
    assert not tokenizer.exceeds(prompt, count, lambda: False)
    if count > 2000:  # a word of 100,000 letters is one unknown token
        assert tokenizer.exceeds(prompt, count // 2, lambda: False)
        assert not tokenizer.exceeds(prompt, count // 2, lambda: True)


async def test_a_text_that_cannot_fit_is_never_encoded_whole() -> None:
    tokenizer = Watched()
    encoder = PromptEncoder(tokenizer)
    long = "long" * 50_000
    sentence = "the prompt has more than 100000 tokens and the model's context holds 100000"
    with pytest.raises(InvalidRequest, match=sentence) as error:
        await encoder.encode(["short", long], LIMIT, deadline())
    assert (error.value.param, error.value.code) == ("prompt", "context_length_exceeded")
    conversation = [{"role": "long", "content": long}]
    with pytest.raises(InvalidRequest, match=sentence) as error:
        await encoder.encode_chat(conversation, LIMIT, deadline())
    assert error.value.param == "messages"
    assert tokenizer.encoded == []


async def test_texts_of_a_bounded_number_of_bytes_are_encoded_at_one_time() -> None:
    tokenizer = Watched()
    encoder = PromptEncoder(tokenizer)
    size = MAX_BYTES // 2 + 1
    calls = [encoder.encode(["x" * size], LIMIT, deadline()) for _ in range(3)]
    got = await asyncio.gather(*calls, encoder.encode(["y" * (MAX_BYTES + 1)], LIMIT, deadline()))
    assert sorted(tokenizer.encoded) == [size, size, size, MAX_BYTES + 1]
    assert tokenizer.most == MAX_BYTES + 1
    assert got[0] == [[120] * 10]


async def test_a_short_prompt_waits_for_no_long_one() -> None:
    tokenizer = Watched()
    encoder = PromptEncoder(tokenizer)
    tokenizer.go.clear()
    long = [asyncio.create_task(encoder.encode(["x" * MAX_BYTES], LIMIT, deadline()))]
    long += [asyncio.create_task(encoder.encode(["x" * MAX_BYTES], LIMIT, deadline()))]
    await eventually(lambda: tokenizer.encoding == MAX_BYTES)
    size = INLINE_BYTES + 1
    short = asyncio.create_task(encoder.encode(["x" * size], LIMIT, deadline()))
    await eventually(lambda: tokenizer.encoding == MAX_BYTES + size)
    tokenizer.go.set()
    assert await short == [[120] * 10]
    await asyncio.gather(*long)


async def test_a_prompt_of_a_line_is_encoded_before_anything_else_runs() -> None:
    encoding = asyncio.create_task(PromptEncoder(Watched()).encode(["hi"], LIMIT, deadline()))
    await asyncio.sleep(0)
    assert encoding.done(), "no thread had to get Python's lock for it"
    assert encoding.result() == [[104, 105]]


async def test_the_deadline_answers_at_once_and_the_text_counts_until_its_thread_ends() -> None:
    tokenizer = Watched()
    encoder = PromptEncoder(tokenizer)
    tokenizer.go.clear()
    with pytest.raises(DeadlineExceeded, match="waited to be tokenized until its deadline"):
        await encoder.encode(["x" * MAX_BYTES], LIMIT, deadline(0.1))
    assert tokenizer.encoding == MAX_BYTES
    with pytest.raises(DeadlineExceeded):
        await encoder.encode(["y" * MAX_BYTES], LIMIT, deadline(0.1))
    assert tokenizer.most == MAX_BYTES
    tokenizer.go.set()
    await encoder.encode(["z" * MAX_BYTES], LIMIT, deadline())
    assert tokenizer.encoded == [MAX_BYTES, MAX_BYTES]


async def test_a_budget_serves_in_order_and_forgets_who_gave_up() -> None:
    budget = Budget(10)
    assert await budget.acquire(6) == 6
    order: list[str] = []

    async def use(name: str, size: int) -> None:
        held = await budget.acquire(size)
        order.append(name)
        budget.release(held)

    first = asyncio.create_task(use("large", 25))
    second = asyncio.create_task(use("small", 1))
    given_up = asyncio.create_task(use("given up", 10))
    third = asyncio.create_task(use("last", 4))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.sleep(0)
    assert order == []  # the small one is not let past the large one
    budget.release(6)
    await asyncio.gather(first, second, third)
    assert order == ["large", "small", "last"]
    assert await budget.acquire(11) == 10


async def test_a_budget_is_whole_again_when_its_user_is_cancelled_at_the_moment_of_its_turn() -> (
    None
):
    budget = Budget(10)
    held = await budget.acquire(10)
    waiting = asyncio.create_task(budget.acquire(10))
    await asyncio.sleep(0)
    budget.release(held)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await budget.acquire(10) == 10


@pytest.mark.parametrize(
    ("path", "content", "param"),
    [
        (COMPLETIONS, {"prompt": "x" * 3_000_000}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", "x" * 3_000_000]}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 3_000_000}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
        (COMPLETIONS, {"prompt": [1] * 5000}, "prompt"),
    ],
)
async def test_a_prompt_beyond_the_context_is_a_400_that_says_the_limit(
    path: str, content: dict[str, object], param: str
) -> None:
    async with client_of(make_service()) as client:
        answer = await client.post(path, json={"model": "echo", **content})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["code"] == "context_length_exceeded"
    assert "and the model's context holds 4096, completion included; shorten" in error["message"]


@pytest.mark.parametrize("content", ["\ud800", "x\udfff" * 40_000])
async def test_half_a_surrogate_pair_is_refused(content: str) -> None:
    encoder = PromptEncoder(ByteTokenizer())
    with pytest.raises(InvalidRequest, match="holds half of a surrogate pair"):
        await encoder.encode([content], LIMIT, deadline())


async def test_the_deadline_covers_the_arrival_of_the_body() -> None:
    async def slowly() -> AsyncIterator[bytes]:
        yield b'{"model": '
        await asyncio.sleep(30)

    service = make_service(echo=EchoOptions(), timeout_s=0.2)
    async with client_of(service) as client:
        headers = {"content-type": "application/json"}
        answer = await client.post(COMPLETIONS, content=slowly(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "body_timeout")
