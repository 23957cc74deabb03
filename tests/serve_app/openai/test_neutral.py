"""Fields that are known and not implemented: what asks for nothing passes, the rest is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve_app.errors import InvalidRequest
from serve_app.limits import MAX_LABEL
from serve_app.openai.neutral import BODY, MESSAGE, PART, Label, Neutral
from serve_app.openai.requests import ChatRequest, CompletionRequest, parse

USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"messages": [USER]} | fields).encode())


def text(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"prompt": "hi"} | fields).encode())


def message(**fields: Any) -> ChatRequest:
    return chat(messages=[USER, {"role": "assistant", "content": "yes"} | fields])


def part(**fields: Any) -> ChatRequest:
    return chat(messages=[{"role": "user", "content": [{"type": "text", "text": "hi"} | fields]}])


#: Each table with the functions that put one of its fields into a body.
TABLES = pytest.mark.parametrize(
    ("table", "place", "parsers"),
    [
        pytest.param(BODY, "", [chat, text], id="body"),
        pytest.param(MESSAGE, "messages.1.", [message], id="message"),
        pytest.param(PART, "messages.0.content.0.", [part], id="part"),
    ],
)


@TABLES
def test_a_field_that_asks_for_nothing_changes_nothing(
    table: Any, place: str, parsers: list[Any]
) -> None:
    for parse_body in parsers:
        plain = parse_body()
        for name, rule in table.items():
            for value in (None, *(rule.values if isinstance(rule, Neutral) else ())):
                assert parse_body(**{name: value}) == plain, (name, value)


@TABLES
def test_a_field_that_asks_for_something_is_refused_by_name(
    table: Any, place: str, parsers: list[Any]
) -> None:
    for parse_body in parsers:
        for name, rule in table.items():
            for value in ("something else", 7, {"a": 1}, [1]):
                if isinstance(rule, Label) and type(value) in rule.kinds:
                    continue
                with pytest.raises(InvalidRequest) as caught:
                    parse_body(**{name: value})
                assert caught.value.param == f"{place}{name}"
                assert f"'{place}{name}'" in str(caught.value)


@TABLES
def test_a_label_is_ignored_and_bounded(table: Any, place: str, parsers: list[Any]) -> None:
    labels = {name: rule for name, rule in table.items() if isinstance(rule, Label)}
    assert labels
    long = "x" * (MAX_LABEL + 1)
    for parse_body in parsers:
        plain = parse_body()
        for name, rule in labels.items():
            for kind in rule.kinds:
                value, too_long = ("me", long) if kind is str else ({"a": ["me"]}, {"a": [long]})
                assert parse_body(**{name: value}) == plain, name
                with pytest.raises(InvalidRequest, match="more than 16384 characters") as caught:
                    parse_body(**{name: too_long})
                assert caught.value.param == f"{place}{name}"
                assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 0.0},
        {"repetition_penalty": 1},
        {"length_penalty": 1.0},
        {"response_format": {"type": "text", "json_schema": None}},
        {"structured_outputs": {"json": None, "regex": None}},
        {"logit_bias": {"50256": 0, "1": 0.0}},
        {"best_of": 1},
        {"best_of": 3, "n": 3},
        {"chat_template_kwargs": {}},
        {"chat_template_kwargs": {"thinking": False, "enable_thinking": None}},
        {"min_tokens": 9, "max_tokens": 9, "ignore_eos": True},
        {"min_tokens": 9, "max_completion_tokens": 10, "ignore_eos": True, "stop": []},
        {"thinking": {"type": "disabled"}},
        {"stream": True, "stream_options": {"include_usage": None, "continuous_usage_stats": None}},
        {"stream_options": None},
        {"stream_options": {}},
        {"top_logprobs": 0, "logprobs": None},
    ],
)
def test_a_neutral_value_may_be_written_in_several_ways(fields: Any) -> None:
    for parse_body in (chat,) if "top_logprobs" in fields else (chat, text):
        parse_body(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": False},
        {"repetition_penalty": True},
        {"store": 0},
        {"skip_special_tokens": 1},
        {"skip_special_tokens": False},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "text", "strict": True}},
        {"structured_outputs": {"regex": "a"}},
        {"logit_bias": {"1": 1}},
        {"logit_bias": {"1": False}},
        {"best_of": 2},
        {"best_of": 1, "n": 3},
        {"chat_template_kwargs": {"thinking": True}},
        {"chat_template_kwargs": {"custom": None}},
        {"min_tokens": 1},
        {"min_tokens": 9, "max_tokens": 8, "ignore_eos": True},
        {"min_tokens": 9, "max_tokens": 9, "ignore_eos": True, "stop": "a"},
        {"min_tokens": 9, "max_tokens": 9, "ignore_eos": True, "stop_token_ids": [1]},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"allowed_token_ids": []},
        {"service_tier": "flex"},
        {"priority": -1},
    ],
)
def test_what_only_looks_neutral_is_refused(fields: Any) -> None:
    for parse_body in (chat, text):
        with pytest.raises(InvalidRequest, match="is not supported") as caught:
            parse_body(**fields)
        assert (caught.value.param, caught.value.code) == (next(iter(fields)), "unsupported_field")


def test_a_field_of_the_other_endpoint_is_told_where_it_belongs() -> None:
    with pytest.raises(InvalidRequest, match="'messages' belongs to /v1/chat/completions"):
        text(messages=[USER])
    with pytest.raises(InvalidRequest, match="'prompt' belongs to /v1/completions"):
        chat(prompt="hi")


@pytest.mark.parametrize(
    ("parse_body", "name", "guess"),
    [
        (chat, "temprature", "temperature"),
        (text, "max_token", "max_tokens"),
        (message, "contnet", "content"),
        (message, "tool_call", "tool_calls"),
        (part, "txt", "text"),
        (chat, "logit_bais", "logit_bias"),
    ],
)
def test_a_typo_gets_a_suggestion_at_any_depth(parse_body: Any, name: str, guess: str) -> None:
    for value in (1, None):
        with pytest.raises(InvalidRequest, match=f"did you mean '{guess}'") as caught:
            parse_body(**{name: value})
        assert caught.value.code == "unknown_field"
        assert str(caught.value.param).endswith(name)


@pytest.mark.parametrize("parse_body", [chat, text, message, part])
@pytest.mark.parametrize("name", ["x" * 2**20, "\x1b[2J\n\u202e", "", "a.b", "'" * 9999, "\x00"])
def test_a_name_that_a_client_makes_up_is_cut_and_printable(parse_body: Any, name: str) -> None:
    with pytest.raises(InvalidRequest, match="unknown field") as caught:
        parse_body(**{name: 1})
    for said in (str(caught.value), str(caught.value.param)):
        assert len(said) < 400
        assert said.isprintable()
