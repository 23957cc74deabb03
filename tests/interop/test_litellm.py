"""litellm uses the service unmodified."""

from __future__ import annotations

from typing import Any

import pytest
from support.features import CHAT, TEXT, Refused, check, run_features
from support.served import Served

pytestmark = [pytest.mark.interop, pytest.mark.ray, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def results(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("litellm") / "litellm.json"
    return run_features("litellm", "run_litellm.py", served, output)


EXPECTED: dict[str, Any] = {
    "completion": CHAT,
    "history": len,
    "stream": CHAT,
    "stream_usage": lambda value: all(value),
    "text_completion": TEXT,
    "text_completion_stream": TEXT,
    "text_completion_echo": lambda value: value[0].startswith("json.dumps(") and value[1] > 12,
    "acompletion": [[CHAT], CHAT],
    "hosted_vllm_provider": CHAT,
    "two_choices_with_stop_and_seed": 2,
    "logprobs": len,
    "labels": CHAT,
    "additional_drop_params": CHAT,
    "router": CHAT,
    "retries": [CHAT],
    "timeout": Refused("Timeout", "timed out", 408),
    "tools": Refused("BadRequestError", "'tools' is not supported"),
    # litellm drops what its table says that OpenAI lacks, and OpenAI has tools.
    "drop_params_keeps_tools": Refused("BadRequestError", "'tools' is not supported"),
    "presence_penalty": Refused("BadRequestError", "'presence_penalty' is not supported"),
    "json_object": Refused("BadRequestError", "'response_format' is not supported"),
    "wrong_key": Refused("AuthenticationError", "the API key is wrong", 401),
    "unknown_model": Refused("NotFoundError", "'another' is not served here", 404),
    "prompt_too_long": Refused("BadRequestError", "shorten the prompt"),
    "embedding": Refused("NotFoundError", "/v1/embeddings", 404),
    "responses": Refused("NotFoundError", "/v1/responses", 404),
}


@pytest.mark.parametrize("feature", EXPECTED)
def test_works_or_is_refused_by_name(
    results: dict[str, Any], answers: dict[str, str], feature: str
) -> None:
    check(results[feature], EXPECTED[feature], answers)


def test_every_feature_of_the_script_is_judged(results: dict[str, Any]) -> None:
    assert set(results) == set(EXPECTED)
