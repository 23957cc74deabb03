"""Chat templates in the service: what they refuse is the client's to see, and they stop nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.chat_templates import ATTACKS, ENDLESS, write_tokenizer
from support.serving import client_of, make_service

from deepseek.errors import ArtifactError
from serve_app.openai.prompts import CHAT_THREADS
from serve_app.openai.tokenizer import RENDERERS, HfTokenizer

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
#: Writes `w5` unless the first message says which attack to run.
GUARDED = "".join(
    "{% if messages[0].content == '" + name + "' %}" + source + "{% endif %}"
    for name, (source, _) in {"loops": ENDLESS["loops"], **ATTACKS}.items()
    if name in ("loops", "long string", "output", "class")
)
TEMPLATE = "{{ bos_token }} " + GUARDED + "{% if messages[0].content == 'refuse' %}"
TEMPLATE += "{{ raise_exception('roles must alternate') }}{% endif %} w5 w6"


def chat(content: str) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": content}], "max_tokens": 4}


def make_tokenizer(directory: Path, **options: Any) -> HfTokenizer:
    documents = {path.name: path.read_bytes() for path in directory.iterdir()}
    return HfTokenizer(directory, documents, **options)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path, chat_template=TEMPLATE)
    return tmp_path


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("refuse", "the model's chat template refuses these messages: roles must alternate"),
        ("class", "the model's chat template refuses these messages: access to attribute"),
        ("long string", "the model's chat template needs more than 1024 MiB of memory"),
        ("output", "the model's chat template writes more than 64 MiB for one conversation"),
    ],
)
async def test_what_a_template_does_not_render_is_a_400_with_one_sentence(
    directory: Path, content: str, sentence: str
) -> None:
    tokenizer = make_tokenizer(directory, max_seconds=20)
    async with client_of(make_service(tokenizer=tokenizer)) as client:
        answer = await client.post(CHAT, json=chat(content))
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", "messages")
        assert error["message"].startswith(sentence)
        fine = await client.post(CHAT, json=chat("hi"))
    assert fine.status_code == 200
    assert fine.json()["usage"]["prompt_tokens"] == 3


@pytest.mark.heavy
async def test_conversations_that_loop_stop_no_other_request(directory: Path) -> None:
    """While one overruns another is answered, and prompts are while there is no helper left."""
    tokenizer = make_tokenizer(directory, max_seconds=3)
    async with client_of(make_service(tokenizer=tokenizer)) as client:
        await client.post(CHAT, json=chat("hi"))  # starts a helper
        looping = asyncio.create_task(client.post(CHAT, json=chat("loops")))
        await asyncio.sleep(0.1)
        fine = await client.post(CHAT, json=chat("hi"))
        second = asyncio.create_task(client.post(CHAT, json=chat("loops")))
        prompts = [
            await client.post(TEXT, json={"model": "echo", "prompt": "w7 w8"}) for _ in range(3)
        ]
        health = await client.get("/health")
        assert not looping.done()
        ended = await asyncio.gather(looping, second)
    assert fine.status_code == health.status_code == 200
    assert [answer.status_code for answer in prompts] == [200] * 3
    assert [answer.status_code for answer in ended] == [400] * 2
    sentence = "the model's chat template takes more than 3 s for one conversation"
    assert [answer.json()["error"]["message"] for answer in ended] == [sentence] * 2
    assert CHAT_THREADS > RENDERERS


async def test_a_conversation_that_waits_past_the_deadline_is_told_so(directory: Path) -> None:
    tokenizer = make_tokenizer(directory, max_seconds=2)
    async with client_of(make_service(tokenizer=tokenizer, timeout_s=0.2)) as client:
        answer = await client.post(CHAT, json=chat("loops"))
    assert answer.status_code == 504
    assert "waited to be tokenized until its deadline" in answer.json()["error"]["message"]


def test_malformed_template_files_are_told_when_the_server_starts(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja is not UTF-8 text \(byte 0\)"):
        make_tokenizer(tmp_path)
