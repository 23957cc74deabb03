"""The messages of a chat, and the histories that clients feed back."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.errors import InvalidRequest
from serve_app.limits import MAX_MESSAGES, MAX_PARTS
from serve_app.openai.messages import Message, read_messages

USER = {"role": "user", "content": "hi"}


def assistant(**fields: Any) -> str:
    """What an assistant's message says."""
    _, message = read_messages([USER, {"role": "assistant"} | fields])
    return message.text


def test_parts_are_joined_by_line_breaks_and_developer_is_system() -> None:
    parts = ["a", {"type": "text", "text": "b"}, {"type": "input_text", "text": "c"}]
    (message,) = read_messages([{"role": "developer", "content": parts}])
    assert message == Message("developer", "a\nb\nc")
    assert message.template_role == "system"


def test_an_assistant_may_say_nothing_and_others_may_not() -> None:
    for fields in ({}, {"content": None}, {"content": ""}, {"content": []}):
        assert assistant(**fields) == ""
    for role in ("user", "system", "developer"):
        assert read_messages([{"role": role, "content": []}])[0].text == ""
        for fields in ({}, {"content": None}):
            with pytest.raises(InvalidRequest, match=r"messages\.0\.content"):
                read_messages([{"role": role} | fields])


def test_a_refusal_is_what_the_assistant_said() -> None:
    assert assistant(content=None, refusal="no") == "no"
    assert assistant(content=[{"type": "refusal", "refusal": "no"}]) == "no"
    assert assistant(content="yes", refusal=None) == assistant(content="yes", refusal="") == "yes"
    with pytest.raises(InvalidRequest, match=r"unknown field 'messages\.0\.refusal'"):
        read_messages([USER | {"refusal": "no"}])


@pytest.mark.parametrize(
    "fed_back",
    [
        # openai for Python, `message.model_dump()` of versions 1 to 3
        {"refusal": None, "annotations": None, "audio": None, "function_call": None}
        | {"tool_calls": None},
        {"refusal": None, "annotations": [], "tool_calls": [], "parsed": None},
        # litellm
        {"tool_calls": None, "function_call": None, "provider_specific_fields": {"refusal": None}},
        # vLLM's and SGLang's own messages
        {"reasoning_content": None, "reasoning": None, "tool_calls": []},
        {"reasoning_content": "", "hidden_states": None},
        # DeepSeek's and Mistral's
        {"prefix": False, "name": "bot"},
    ],
)
def test_an_answer_that_is_fed_back_is_a_message(fed_back: dict[str, Any]) -> None:
    assert assistant(content="yes", **fed_back) == "yes"


def test_hints_for_a_cache_are_ignored() -> None:
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    assert read_messages([{"role": "user", "content": [part]}])[0].text == "a"


@pytest.mark.parametrize(
    ("message", "param", "says"),
    [
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "role", "role 'tool' are not"),
        ({"role": "function", "content": "x", "name": "f"}, "role", "role 'function' are not"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "tool_calls", "not supported"),
        ({"role": "assistant", "content": "x", "reasoning": "y"}, "reasoning", "not supported"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content.0.type", "'image_url'"),
        ({"role": "user", "content": [{"type": "SECRET"}]}, "content.0.type", "of this type"),
        ({"role": "SECRET", "content": "x"}, "role", "one of system, developer, user, assistant"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(message: Any, param: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        read_messages([USER, message])
    assert caught.value.param == f"messages.1.{param}"
    assert "SECRET" not in str(caught.value)


def test_lists_are_counted_before_their_items_are_looked_at() -> None:
    with pytest.raises(InvalidRequest, match="holds 4097 messages; the limit is 4096"):
        read_messages([1] * (MAX_MESSAGES + 1))
    with pytest.raises(InvalidRequest, match="holds 1025 parts; the limit is 1024") as caught:
        read_messages([{"role": "user", "content": [1] * (MAX_PARTS + 1)}])
    assert caught.value.param == "messages.0.content"
    assert len(read_messages([USER] * MAX_MESSAGES)) == MAX_MESSAGES
