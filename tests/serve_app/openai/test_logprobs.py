"""Logprobs in the answers' own shapes: vLLM's conventions, and JSON that is JSON."""

from __future__ import annotations

import json
import math

import pytest

from deepseek.engine.request import TokenLogprob, TopLogprob
from serve_app.openai.echoed import EchoedPrompt
from serve_app.openai.json_text import SLICE, dumps
from serve_app.openai.logprobs import LogprobStyle, TextLogprobs

#: A token that is not among the two best.
THIRD = TokenLogprob(
    7, "c", -2.0, (TopLogprob(5, "a", -0.5, b"a"), TopLogprob(6, "b", -1.5, b"b")), b"c", rank=3
)


def text_fields(style: LogprobStyle, *items: TokenLogprob) -> dict[str, object]:
    logprobs = TextLogprobs(style)
    logprobs.add_all(items, 0)
    fields = logprobs.fields()
    assert fields is not None
    return fields


@pytest.mark.parametrize(
    ("count", "top"),
    [(0, {"c": -2.0}), (1, {"c": -2.0, "a": -0.5}), (2, {"c": -2.0, "a": -0.5, "b": -1.5})],
)
def test_a_completions_alternatives_include_the_token_itself(
    count: int, top: dict[str, float]
) -> None:
    assert text_fields(LogprobStyle(count), THIRD)["top_logprobs"] == [top]


def test_a_chats_alternatives_are_the_best_ones_and_none_at_zero() -> None:
    [entry] = LogprobStyle().chat([THIRD])["content"]
    assert [top["token"] for top in entry["top_logprobs"]] == ["a", "b"]
    alone = TokenLogprob(7, "c", -2.0, (), b"\xe4")
    assert LogprobStyle().chat([alone]) == {
        "content": [{"token": "c", "logprob": -2.0, "bytes": [0xE4], "top_logprobs": []}],
        "refusal": None,
    }
    assert LogprobStyle().chat([]) is None


def test_of_tokens_with_the_same_text_the_more_likely_stays() -> None:
    """Three tokens that are parts of characters: all have the empty text."""
    best = (TopLogprob(1, "", -0.5), TopLogprob(2, "", -0.9))
    chosen_best = TokenLogprob(1, "", -0.5, best)
    chosen_third = TokenLogprob(3, "", -3.0, best)
    fields = text_fields(LogprobStyle(2), chosen_best, chosen_third)
    assert fields["top_logprobs"] == [{"": -0.5}, {"": -0.5}]
    assert fields["token_logprobs"] == [-0.5, -3.0]  # the second is seen not to be the best
    by_id = text_fields(LogprobStyle(2, as_token_ids=True), chosen_third)
    assert by_id["tokens"] == ["token_id:3"]
    assert by_id["top_logprobs"] == [{"token_id:3": -3.0, "token_id:1": -0.5, "token_id:2": -0.9}]


def test_what_is_impossible_is_written_as_a_number() -> None:
    never = TokenLogprob(7, "c", -math.inf, (TopLogprob(5, "a", -math.inf),), rank=9)
    style = LogprobStyle(1, 1)
    for value in (text_fields(style, never), style.chat([never]), style.prompt([never])):
        text = dumps(value)
        assert "-9999.0" in text
        json.loads(text, parse_constant=pytest.fail)


def test_prompt_logprobs_are_keyed_by_id_and_ranked() -> None:
    best = (TopLogprob(5, "a", -0.5), TopLogprob(6, "b", -1.5))
    second = TokenLogprob(6, "b", -1.5, best, rank=2)
    told = json.loads(dumps(LogprobStyle(None, 2).prompt((None, THIRD, second))))
    assert told == [
        None,
        {
            "7": {"logprob": -2.0, "rank": 3, "decoded_token": "c"},
            "5": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
            "6": {"logprob": -1.5, "rank": 2, "decoded_token": "b"},
        },
        {
            "6": {"logprob": -1.5, "rank": 2, "decoded_token": "b"},
            "5": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
        },
    ]
    assert list(told[1]) == ["7", "5", "6"]
    [own] = LogprobStyle(2, 0).prompt((THIRD,)) or []
    assert own == {7: {"logprob": -2.0, "rank": 3, "decoded_token": "c"}}
    assert LogprobStyle(2, 0).prompt(None) is None


def at(text: str, first: str, *tokens: str) -> list[int]:
    items = [TokenLogprob(0, token, 0.0) for token in tokens]
    return list(EchoedPrompt(text, 0, first).offsets((None, *items)))


def test_offsets_point_at_the_tokens_in_the_text() -> None:
    assert at("abcde", "ab", "c", "de") == [0, 2, 3]
    # A token that is in no text takes no room: in front, and between.
    assert at("abcde", "<bos>", "ab", "c", "de") == [0, 0, 2, 3]
    assert at("abcde", "ab", "<sep>", "cde") == [0, 2, 2]
    # Parts of characters are empty, and the last part has the character.
    assert at("a世b", "a", "", "", "世", "b") == [0, 1, 1, 1, 2]
    # A space that the tokenizer does not keep.
    assert at("a  b", "a", "b") == [0, 3]


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"a": [], "b": {}, "c": None, 'é"': "\u2028"},
        {"choices": [{"logprobs": {"tokens": ["x"] * (3 * SLICE + 1), "top": [{"y": 1.5}] * 3}}]},
        {"prompt_logprobs": [None, *({token: {"rank": 1}} for token in range(2 * SLICE))]},
        {"usage": {"n": 1}, "list": [[1, 2], [3]], "flag": True},
    ],
)
def test_json_in_slices_is_the_same_json(value: dict[str, object]) -> None:
    assert dumps(value) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def test_a_number_that_json_does_not_have_is_no_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        dumps({"a": {"b": [math.nan]}})
