"""`openai` for Node uses the service unmodified."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from support.environments import INTEROP, node_environment, run_checked
from support.features import CHAT, TEXT, Refused, check
from support.served import Served

pytestmark = [
    pytest.mark.interop,
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm"),
]


@pytest.fixture(scope="module")
def results(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("node")
    (folder / "key").write_text(served.key)
    output, package = folder / "results.json", node_environment() / "package.json"
    words = (served.base, served.model, folder / "key", output, package)
    run_checked(["node", INTEROP / "run_openai.mjs", *words])
    return dict(json.loads(output.read_text()))


EXPECTED: dict[str, Any] = {
    "models": ["tiny"],
    "chat_completion": CHAT,
    "history": len,
    "stream": CHAT,
    "stream_usage": True,
    "stream_helper": [CHAT, CHAT],
    "two_choices": 2,
    "logprobs": 2,
    "completion": TEXT,
    "completion_stream": TEXT,
    "completion_of_token_ids": 3,
    "raw_response": [True, CHAT],
    "crowd": [CHAT],
    "abort": [3, CHAT],
    "overload_with_retries": 40,
    "timeout": Refused("APIConnectionTimeoutError", "timed out", None),
    "wrong_key": Refused("AuthenticationError", "the API key is wrong", 401),
    "unknown_model": Refused("NotFoundError", "'another' is not served here", 404),
    "tools": Refused("BadRequestError", "'tools' is not supported"),
    "json_schema": Refused("BadRequestError", "'response_format' is not supported"),
    "embeddings": Refused("NotFoundError", "/v1/embeddings", 404),
    "responses": Refused("NotFoundError", "/v1/responses", 404),
}


@pytest.mark.parametrize("feature", EXPECTED)
def test_works_or_is_refused_by_name(
    results: dict[str, Any], answers: dict[str, str], feature: str
) -> None:
    check(results[feature], EXPECTED[feature], answers)


def test_every_feature_of_the_script_is_judged(results: dict[str, Any]) -> None:
    assert set(results) == set(EXPECTED)
