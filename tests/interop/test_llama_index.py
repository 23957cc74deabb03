"""llama-index's OpenAILike uses the service unmodified."""

from __future__ import annotations

from typing import Any

import pytest
from support.features import CHAT, TEXT, Refused, check, run_features
from support.served import Served

pytestmark = [pytest.mark.interop, pytest.mark.ray, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def results(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("llama_index") / "results.json"
    return run_features("llama_index", "run_llama_index.py", served, output)


EXPECTED: dict[str, Any] = {
    "complete": TEXT,
    "stream_complete": TEXT,
    "complete_with_logprobs": lambda value: value > 0,
    "chat_of_a_text_model": True,
    "chat_completion": CHAT,
    "complete_of_a_chat_model": CHAT,
    "history": len,
    "stream_chat": CHAT,
    "asynchronous": [CHAT, CHAT, TEXT],
    "chat_with_logprobs": len,
    "seed_and_extra_body": CHAT,
    "defaults": True,
    "tools": Refused("BadRequestError", "'tools' is not supported"),
    "structured_output": Refused("BadRequestError", "'response_format' is not supported"),
    "wrong_key": Refused("AuthenticationError", "the API key is wrong", 401),
    "unknown_model": Refused("NotFoundError", "'another' is not served here", 404),
}


@pytest.mark.parametrize("feature", EXPECTED)
def test_works_or_is_refused_by_name(
    results: dict[str, Any], answers: dict[str, str], feature: str
) -> None:
    check(results[feature], EXPECTED[feature], answers)


def test_every_feature_of_the_script_is_judged(results: dict[str, Any]) -> None:
    assert set(results) == set(EXPECTED)
