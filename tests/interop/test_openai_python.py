"""`openai` for Python, its oldest and its newest release, uses the service unmodified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.environments import run_in
from support.features import (
    CHAT,
    PROMPT,
    QUESTION,
    SHORT,
    TEXT,
    Refused,
    check,
    run_features,
)
from support.served import Served, serving_command

pytestmark = [pytest.mark.interop, pytest.mark.ray, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def results(
    served: Served, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """What a release did; each runs once."""
    folder = tmp_path_factory.mktemp("openai")
    done: dict[str, dict[str, Any]] = {}

    def of(release: str) -> dict[str, Any]:
        if release not in done:
            tool = f"openai_{release}"
            done[release] = run_features(tool, "run_openai.py", served, folder / f"{tool}.json")
        return done[release]

    return of


def logprobs_are_whole(content: list[dict[str, Any]]) -> bool:
    """Every entry has its bytes, two alternatives, and itself at their head: it was greedy."""
    return all(
        bytes(entry["bytes"]).decode() == entry["token"]
        and len(entry["top_logprobs"]) == 2
        and entry["top_logprobs"][0]["token"] == entry["token"]
        for entry in content
    )


def prompt_is_scored(value: Any) -> bool:
    text, logprobs = value
    numbers = logprobs["token_logprobs"]
    return (
        text == "".join(logprobs["tokens"][1:]) == PROMPT  # the first token is the BOS
        and numbers[0] is None
        and all(number < 0 for number in numbers[1:])
    )


WORKS: dict[str, Any] = {
    "models": [["tiny"], "tiny"],
    "history": len,
    "history_as_dict": len,
    "three_turns": 6,
    "system_and_developer": lambda value: value[0] == value[1],
    "text_parts": len,
    "two_choices": lambda value: value[0] == value[1] and value[0][0] != value[0][1],
    "logprobs": logprobs_are_whole,
    "max_completion_tokens": 3,
    "completion_of_token_ids": [2, 5],
    "completion_echo": prompt_is_scored,
    "overload": ["RateLimitError", "answered"],
    "overload_with_retries": ["answered"],
    "chat_completion": CHAT,
    "stream": CHAT,
    "labels": CHAT,
    "neutral_values": CHAT,
    "crowd": [CHAT],
    "raw_response": [True, CHAT],
    "cancellation": [3, "CancelledError", CHAT],
    "completion": TEXT,
    "completion_stream": TEXT,
}
REFUSED = {
    "timeout": Refused("APITimeoutError", "timed out", None),
    "wrong_key": Refused("AuthenticationError", "the API key is wrong", 401),
    "unknown_model": Refused("NotFoundError", "'another' is not served here; use 'tiny'", 404),
    "prompt_too_long": Refused("BadRequestError", "shorten the prompt"),
    "value_out_of_range": Refused("BadRequestError", "temperature"),
    "tools": Refused("BadRequestError", "'tools' is not supported"),
    "json_schema": Refused("BadRequestError", "'response_format' is not supported"),
    "presence_penalty": Refused("BadRequestError", "'presence_penalty' is not supported"),
    "embeddings": Refused("NotFoundError", "/v1/embeddings", 404),
}
ONLY_NEWEST = {
    "responses": Refused("NotFoundError", "/v1/responses", 404),
    "parse_helper": Refused("BadRequestError", "'response_format' is not supported"),
    "stream_helper": [["chunk", "content.delta", "content.done"], CHAT],
}
RELEASES = ("oldest", "newest")


Results = Callable[[str], dict[str, Any]]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("feature", [*WORKS, *REFUSED])
def test_works_or_is_refused_by_name(
    results: Results, answers: dict[str, str], release: str, feature: str
) -> None:
    check(results(release)[feature], (WORKS | REFUSED)[feature], answers)


@pytest.mark.parametrize("feature", ONLY_NEWEST)
def test_what_only_the_newest_has_works_or_is_refused_by_name(
    results: Results, answers: dict[str, str], feature: str
) -> None:
    check(results("newest")[feature], ONLY_NEWEST[feature], answers)


@pytest.mark.parametrize("release", RELEASES)
def test_usage_ends_a_stream(results: Results, served: Served, release: str) -> None:
    usage = served.post("/v1/chat/completions", messages=[QUESTION], **SHORT)["usage"]
    expected = [usage["prompt_tokens"], usage["completion_tokens"], 0]
    check(results(release)["stream_usage"], expected, {})


@pytest.mark.parametrize("release", RELEASES)
def test_a_stop_string_ends_the_answer_before_it(
    results: Results, answers: dict[str, str], release: str
) -> None:
    assert " of" in answers[CHAT], "choose a stop string that the answer holds"
    check(results(release)["stop"], [answers[CHAT].partition(" of")[0], "stop"], {})


def test_every_feature_of_the_script_is_judged(results: Results) -> None:
    judged = {*WORKS, *REFUSED, "stream_usage", "stop"}
    assert set(results("oldest")) == judged
    assert set(results("newest")) == judged | set(ONLY_NEWEST)


def test_while_the_service_drains_a_newcomer_gets_internal_server_error(tmp_path: Path) -> None:
    """With the number of seconds after which to come back; what streams ends as it would have."""
    echo = {"echo": {"itl_s": 0.02}}
    with serving_command(tmp_path, echo) as served:
        (tmp_path / "key").write_text(served.key)
        output = tmp_path / "drain.json"
        words = (served.base, served.model, tmp_path / "key", output, served.pid)
        run_in("openai_newest", "run_openai_drain.py", *words)
    done = json.loads(output.read_text())
    assert done["newcomer"][:2] == ["InternalServerError", 503]
    assert done["newcomer"][2] == "draining"
    assert int(done["newcomer"][3]) > 0
    assert done["streamed"] == done["expected"]
