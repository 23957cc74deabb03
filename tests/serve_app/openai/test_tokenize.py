"""`/tokenize` and `/detokenize`, as vLLM answers them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.chat_templates import write_tokenizer
from support.serving import client_of, make_service
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from serve_app.openai.service import Service
from serve_app.openai.tokenizer import HfTokenizer, PromptText

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} w9{% endif %}"
)


def make_tokenizer(directory: Path) -> HfTokenizer:
    """Puts `w1` in front of a text."""
    write_tokenizer(directory, chat_template=TEMPLATE)
    file = str(directory / "tokenizer.json")
    plain = Tokenizer.from_file(file)
    plain.post_processor = TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    plain.save(file)
    return HfTokenizer(directory, {p.name: p.read_bytes() for p in directory.iterdir()})


async def post(service: Service, path: str, body: Any, status: int = 200) -> Any:
    async with client_of(service) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_a_text_becomes_ids_and_back() -> None:
    service = make_service()
    told = await post(service, "/tokenize", {"model": "echo", "prompt": "hé"})
    ids = list("hé".encode())
    assert told == {"count": 3, "max_model_len": 4096, "tokens": ids, "token_strs": None}
    assert await post(service, "/detokenize", {"tokens": ids}) == {"prompt": "hé"}
    assert await post(service, "/detokenize", {"tokens": []}) == {"prompt": ""}


async def test_special_tokens_pieces_and_templates_are_the_tokenizers(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    service = make_service(tokenizer=tokenizer)

    async def ids(**body: Any) -> list[int]:
        return list((await post(service, "/tokenize", body))["tokens"])

    with_special = tokenizer.encode(PromptText("w5 w6", special_tokens=True))
    assert await ids(prompt="w5 w6") == with_special
    plain = await ids(prompt="w5 w6", add_special_tokens=False)
    assert plain == tokenizer.encode(PromptText("w5 w6"))
    assert plain != with_special
    messages = [{"role": "user", "content": "w5"}]
    rendered = tokenizer.render(messages)
    assert await ids(messages=messages) == tokenizer.encode(rendered)
    without = await ids(messages=messages, add_generation_prompt=False)
    assert without == tokenizer.encode(tokenizer.render(messages, add_generation_prompt=False))
    assert len(without) < len(await ids(messages=messages))
    both = await ids(messages=messages, add_special_tokens=True)
    assert both == tokenizer.encode(replace(rendered, special_tokens=True))
    assert both != tokenizer.encode(rendered)
    told = await post(service, "/tokenize", {"prompt": "w5 w6", "return_token_strs": True})
    assert told["token_strs"][-2:] == ["w5", "w6"]
    assert len(told["token_strs"]) == told["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "prompt": "x"}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "x", "promt": "x"}, "promt"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "x"}], "continue_final_message": True},
            "continue_final_message",
        ),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2**63]}, "tokens"),
        ("/detokenize", {"tokens": [256]}, "tokens"),
    ],
)
async def test_a_wrong_body_is_refused_by_the_fields_name(path: str, body: Any, param: str) -> None:
    error = (await post(make_service(), path, body, 400))["error"]
    assert error["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_they_need_the_key_the_model_and_a_bounded_body(path: str) -> None:
    body = {"prompt": "x" * 300} if path == "/tokenize" else {"tokens": [1] * 300}
    service = make_service(api_keys=("one",), max_body_bytes=200)
    async with client_of(service) as client:
        assert (await client.post(path, json=body)).status_code == 401
        key = {"Authorization": "Bearer one"}
        assert (await client.post(path, json=body, headers=key)).status_code == 413
        small = {"model": "nope"} | ({"prompt": "x"} if path == "/tokenize" else {"tokens": [1]})
        assert (await client.post(path, json=small, headers=key)).status_code == 404
        assert (await client.get(path)).status_code == 405


async def test_tokenizing_ends_at_the_deadline(tmp_path: Path) -> None:
    class Slow(HfTokenizer):
        def encode(self, prompt: PromptText) -> list[int]:
            time.sleep(0.5)
            return super().encode(prompt)

    write_tokenizer(tmp_path, chat_template=TEMPLATE)
    slow = Slow(tmp_path, {p.name: p.read_bytes() for p in tmp_path.iterdir()})
    service = make_service(tokenizer=slow, timeout_s=0.05)
    error = (await post(service, "/tokenize", {"prompt": "w5"}, 504))["error"]
    assert "deadline" in error["message"]
