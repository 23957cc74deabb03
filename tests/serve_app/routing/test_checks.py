"""What can never be admitted is a 400 that names the field at fault."""

from __future__ import annotations

from typing import Any

import pytest
from support.serving import client_of, make_service

from serve_app.config import EchoOptions

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
SMALL = {"max_ongoing_requests": 2, "max_queued_requests": 3}


@pytest.mark.parametrize(
    ("path", "content", "settings", "param", "sentence"),
    [
        (TEXT, {"prompt": "a", "n": 6}, SMALL, "n", "n 6 is more than the 5 choices"),
        (CHAT, {"messages": MESSAGES, "n": 6}, SMALL, "n", "n 6 is more than the 5 choices"),
        (TEXT, {"prompt": ["a"] * 6}, SMALL, "prompt", "6 prompts with n 1 are more than the 5"),
        (TEXT, {"prompt": ["a"] * 3, "n": 2}, SMALL, "n", "3 prompts with n 2 are more than the"),
        (TEXT, {"prompt": ["a"] * 65, "n": 2}, {}, "n", "2 for 65 prompts makes 130 choices"),
        (TEXT, {"prompt": "a", "stop_token_ids": [3, 256]}, {}, "stop_token_ids", "token id 256"),
        (CHAT, {"messages": MESSAGES, "stop_token_ids": [999]}, {}, "stop_token_ids", "999 is out"),
        (TEXT, {"prompt": [97, 256]}, {}, "prompt", "prompt: token id 256 is outside the voc"),
        (TEXT, {"prompt": [[97], [300]]}, {}, "prompt.1", "prompt.1: token id 300 is outside"),
        (TEXT, {"prompt": ["a", ""]}, {}, "prompt.1", "prompt.1: the prompt is empty"),
        (TEXT, {"prompt": ""}, {}, "prompt", "prompt: the prompt is empty; give a token"),
        (TEXT, {"prompt": "a" * 40, "max_tokens": 30}, {}, "max_tokens", "max_tokens asks for 30"),
        (
            *(CHAT, {"messages": MESSAGES, "max_completion_tokens": 60}, {}),
            *("max_completion_tokens", "max_completion_tokens asks for 60 more, but the model's"),
        ),
        (TEXT, {"prompt": "a" * 50, "max_tokens": 1}, {}, "prompt", "the prompt has 50 tokens and"),
    ],
)
async def test_what_can_never_be_admitted_is_a_400_that_names_the_field(
    path: str, content: dict[str, Any], settings: dict[str, int], param: str, sentence: str
) -> None:
    service = make_service(echo=EchoOptions(max_model_len=50), **settings)
    async with client_of(service) as client:
        answer = await client.post(path, json={"model": "echo", **content})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert sentence in error["message"]


async def test_as_many_choices_as_the_service_holds_are_admitted() -> None:
    async with client_of(make_service(**SMALL)) as client:
        answer = await client.post(TEXT, json={"model": "echo", "prompt": "a", "n": 5})
    assert (answer.status_code, len(answer.json()["choices"])) == (200, 5)
