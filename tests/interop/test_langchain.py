"""langchain-openai uses the service unmodified."""

from __future__ import annotations

from typing import Any

import pytest
from support.features import CHAT, TEXT, Refused, check, run_features
from support.served import Served

pytestmark = [pytest.mark.interop, pytest.mark.ray, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def results(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("langchain") / "results.json"
    return run_features("langchain", "run_langchain.py", served, output)


EXPECTED: dict[str, Any] = {
    "defaults": True,
    "invoke": CHAT,
    "history": len,
    "system_and_named_messages": len,
    "stream": CHAT,
    "stream_usage": lambda value: len(value) == 1 and value[0] > 0,
    "astream": CHAT,
    "batch": [CHAT, CHAT, CHAT],
    "logprobs": len,
    "stop": CHAT,
    "two_choices": 2,
    "text_invoke": TEXT,
    "text_stream": TEXT,
    "text_batch": [TEXT, TEXT],
    "text_defaults": True,
    "bind_tools": Refused("OpenAIInvalidRequestError", "'tools' is not supported"),
    "structured_output": Refused("OpenAIInvalidRequestError", "'response_format' is not supported"),
    "structured_output_by_tools": Refused("OpenAIInvalidRequestError", "'tools' is not supported"),
    "json_mode": Refused("OpenAIInvalidRequestError", "'response_format' is not supported"),
    "responses_api": Refused("OpenAIModelNotFoundError", "/v1/responses", 404),
    "embeddings": Refused("NotFoundError", "/v1/embeddings", 404),
    "wrong_key": Refused("OpenAIAuthenticationError", "the API key is wrong", 401),
    "unknown_model": Refused("OpenAIModelNotFoundError", "'another' is not served here", 404),
}


@pytest.mark.parametrize("feature", EXPECTED)
def test_works_or_is_refused_by_name(
    results: dict[str, Any], answers: dict[str, str], feature: str
) -> None:
    check(results[feature], EXPECTED[feature], answers)


def test_every_feature_of_the_script_is_judged(results: dict[str, Any]) -> None:
    assert set(results) == set(EXPECTED)
