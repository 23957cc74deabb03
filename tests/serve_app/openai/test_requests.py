"""Request bodies: what is accepted, what reaches the engine, and one sentence for each refusal."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

import pytest

from deepseek.engine.request import MAX_LOGPROBS, SamplingParams
from serve_app.errors import InvalidRequest
from serve_app.openai.requests import ChatRequest, CompletionRequest, parse

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
USER = CHAT["messages"][0]
TEXT: dict[str, Any] = {"model": "m", "prompt": "hi"}


def parse_chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps(CHAT | fields).encode())


def parse_text(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps(TEXT | fields).encode())


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "must be greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"n": "2"}, "n", "valid integer"),
        ({"n": True}, "n", "valid integer"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ""}, "stop", "a string or a list of strings"),
        ({"stop": ["a", 1]}, "stop", "a string or a list of strings"),
        ({"stop": ["a"] * 17}, "stop", "17 strings; the limit is 16"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
        ({"model": 1}, "model", "valid string"),
        ({"seed": -(2**63) - 1}, "seed", "greater than"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"top_k": 2**63}, "top_k", "less than"),
        ({"max_tokens": 10**100}, "max_tokens", "less than"),
        ({"temperature": 10**100}, "temperature", "less than"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids", "129 token ids; the limit is 128"),
        ({"stop_token_ids": [2**63]}, "stop_token_ids", "token ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids", "token ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "token ids"),
        ({"stop": "x" * 257}, "stop", "1 to 256 characters"),
        ({"stop": {"a": "b"}}, "stop", "a string or a list"),
        ({"stream_options": []}, "stream_options", "an object"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "valid boolean",
        ),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "differs from"),
        ({"ignore_eos": 1}, "ignore_eos", "valid boolean"),
    ],
)
def test_a_wrong_value_is_refused_by_name(fields: Any, param: str | None, says: str) -> None:
    for parse_body in (parse_chat, parse_text):
        with pytest.raises(InvalidRequest, match=says) as caught:
            parse_body(**fields)
        assert caught.value.param == param
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": {}}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [1]}, "messages.0"),
        ({"messages": [USER, {"content": "x"}]}, "messages.1.role"),
        ({"messages": [USER, {"role": 1, "content": "x"}]}, "messages.1.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": ["a", {}]}]}, "messages.0.content.1.type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages.0.content.0.text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
        ),
        ({"messages": [{"role": "assistant", "refusal": 1}]}, "messages.0.refusal"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_a_wrong_chat_field_is_refused(fields: Any, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(**fields)
    assert param is None or caught.value.param == param


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [[]],
        ["a", 1],
        [-1],
        {"a": 1},
        None,
        ["a"] * 129,
        [1.0],
        [1, "a"],
        [1, True],
        [[1], [2, None]],
        [2**63],
        [["a"]],
        [[1]] * 129,
    ],
)
def test_a_prompt_of_no_known_form_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="prompt") as caught:
        parse_text(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_every_form_of_prompt_becomes_a_list_of_prompts(prompt: Any, prompts: Any) -> None:
    assert parse_text(prompt=prompt).prompts() == prompts


def test_a_neutral_field_does_not_hide_a_wrong_one() -> None:
    with pytest.raises(InvalidRequest, match="temprature"):
        parse_chat(frequency_penalty=0, temprature=0.5)
    with pytest.raises(InvalidRequest, match="max_tokens"):
        parse_chat(frequency_penalty=0, max_tokens=-1)


def test_a_misspelled_field_gets_a_suggestion() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'temperature'") as caught:
        parse_chat(temprature=0.5)
    assert caught.value.code == "unknown_field"


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"a":}', b"{]"])
def test_a_body_that_is_no_json_object_says_so(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"JSON") as caught:
        parse(ChatRequest, raw)
    assert caught.value.code == "invalid_json"


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidRequest, match="'messages' is required"):
        parse(ChatRequest, b'{"model": "m"}')
    with pytest.raises(InvalidRequest, match="'prompt' is required"):
        parse(CompletionRequest, b'{"model": "m"}')


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": "SECRET", "extra": "SECRET"}]},
        {"messages": [{"role": "SECRET", "content": "SECRET"}]},
        {"messages": "SECRET"},
        {"stop": ["SECRET", 1]},
        {"temperature": "SECRET"},
    ],
)
def test_no_error_repeats_what_was_sent(fields: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(**fields)
    assert "SECRET" not in str(caught.value)


def test_choices_of_a_seeded_request_have_different_reproducible_seeds() -> None:
    body = parse_chat(seed=2**63 - 1, n=2)
    seeds = [body.sampling(max_tokens=1, choice=choice).seed for choice in range(2)]
    assert seeds == [2**63 - 1, -(2**63)]
    for body in (parse_chat(), parse_chat(seed=-1)):
        assert body.sampling(max_tokens=1, choice=1).seed is None


#: Every sampling parameter as a client writes it, none at its default, and as the engine gets it.
SAMPLING: dict[str, tuple[Any, Any]] = {
    "max_tokens": (7, 7),
    "temperature": (0.25, 0.25),
    "top_p": (0.5, 0.5),
    "top_k": (3, 3),
    "seed": (11, 11),
    "stop": (["a", "b"], ("a", "b")),
    "stop_token_ids": ([4, 5], (4, 5)),
    "ignore_eos": (True, True),
    "logprobs": (2, 2),
    "prompt_logprobs": (4, 4),
}


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_every_sampling_parameter_is_a_field_of_both_bodies(model: Any) -> None:
    names = {field.name for field in fields(SamplingParams)}
    assert names <= set(model.model_fields)
    assert names == set(SAMPLING)


def test_every_sampling_parameter_reaches_the_engine() -> None:
    given = {name: value for name, (value, _) in SAMPLING.items()}
    expected = {name: value for name, (_, value) in SAMPLING.items()}
    plain = asdict(SamplingParams(max_tokens=1))
    assert all(plain[name] != value for name, value in expected.items())
    chat = given | {"logprobs": True, "top_logprobs": given["logprobs"]}
    for body in (parse_text(**given), parse_chat(**chat)):
        assert body.completion_limit == given["max_tokens"]
        assert asdict(body.sampling(max_tokens=7, choice=0)) == expected


def test_a_parameter_that_is_absent_or_null_has_the_engines_default() -> None:
    null = dict.fromkeys(SAMPLING)
    for body in (parse_text(), parse_chat(), parse_text(**null), parse_chat(**null)):
        assert body.sampling(max_tokens=3, choice=0) == SamplingParams(max_tokens=3)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 2},
        {"top_p": 1e-300},
        {"top_p": 1},
        {"top_k": 0},
        {"top_k": 2**63 - 1},
        {"top_k": -1},
        {"seed": -(2**63)},
        {"stop": ["x"] * 16},
        {"stop_token_ids": list(range(2**63 - 128, 2**63))},
        {"logprobs": 0},
        {"logprobs": MAX_LOGPROBS},
    ],
)
def test_the_engine_refuses_no_value_that_the_body_accepts(fields: Any) -> None:
    parse_text(**fields).sampling(max_tokens=1, choice=0)


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("value", ["1e999", "-1e999"])
def test_a_number_that_is_not_finite_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(CompletionRequest, f'{{"model": "m", "prompt": "hi", "{name}": {value}}}'.encode())
    assert caught.value.param == name


def test_logprobs_mean_the_same_in_both_endpoints() -> None:
    assert parse_chat().num_logprobs is None
    assert parse_chat(logprobs=True).num_logprobs == 0
    assert parse_chat(logprobs=True, top_logprobs=5).num_logprobs == 5
    assert parse_text(logprobs=0).num_logprobs == 0
    assert parse_text().num_logprobs is None


def test_zero_temperature_is_kept_and_not_taken_for_unset() -> None:
    assert parse_chat(temperature=0).sampling(max_tokens=1, choice=0).temperature == 0.0
    assert parse_chat().sampling(max_tokens=1, choice=0).temperature == 1.0


def test_no_new_token_is_asked_for_only_where_the_prompt_comes_back() -> None:
    assert parse_text(max_tokens=0, echo=True).completion_limit == 0
    assert parse_text(max_tokens=0, prompt_logprobs=1).completion_limit == 0
    for echo in ({"echo": False}, {"echo": None}, {}):
        with pytest.raises(InvalidRequest, match="needs echo"):
            parse_text(max_tokens=0, **echo)
    with pytest.raises(InvalidRequest, match="needs echo"):
        parse_chat(max_tokens=0, prompt_logprobs=1)


def test_the_limit_of_new_tokens_has_two_names() -> None:
    older, newer = {"max_tokens": 3}, {"max_completion_tokens": 3}
    for limit in (older, newer, older | newer):
        for body in (parse_chat(**limit), parse_text(**limit)):
            assert body.completion_limit == 3


def test_top_k_of_minus_one_keeps_every_token() -> None:
    for top_k in (-1, 0, None):
        assert parse_text(top_k=top_k).sampling(max_tokens=1, choice=0).top_k == 0


@pytest.mark.parametrize("model", [{"model": None}, {"model": ""}])
def test_a_body_without_a_model_means_the_one_that_is_served(model: Any) -> None:
    assert not parse_chat(**model).model
    assert parse(CompletionRequest, b'{"prompt": "hi"}').model == ""


def test_prompts_are_counted_before_they_are_looked_at() -> None:
    for prompt in (["a"] * 129, [[1]] * 129, [None] * 129):
        with pytest.raises(InvalidRequest, match="prompt: holds 129 prompts; the limit is 128"):
            parse_text(prompt=prompt)


def test_prompts_and_n_share_one_limit() -> None:
    assert len(parse_text(prompt=["a"] * 64, n=2).prompts()) == 64
    with pytest.raises(InvalidRequest, match="130 choices; the limit is 128") as caught:
        parse_text(prompt=["a"] * 65, n=2)
    assert caught.value.param == "n"
