"""haystack uses the service unmodified."""

from __future__ import annotations

from typing import Any

import pytest
from support.features import CHAT, Refused, check, run_features
from support.served import Served

pytestmark = [pytest.mark.interop, pytest.mark.ray, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def results(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("haystack") / "results.json"
    return run_features("haystack", "run_haystack.py", served, output)


EXPECTED: dict[str, Any] = {
    "run": CHAT,
    "history": len,
    "streaming_callback": CHAT,
    "run_async": CHAT,
    "tools": Refused("BadRequestError", "'tools' is not supported"),
    "json_object": Refused("BadRequestError", "'response_format' is not supported"),
    "wrong_key": Refused("AuthenticationError", "the API key is wrong", 401),
}


@pytest.mark.parametrize("feature", EXPECTED)
def test_works_or_is_refused_by_name(
    results: dict[str, Any], answers: dict[str, str], feature: str
) -> None:
    check(results[feature], EXPECTED[feature], answers)


def test_every_feature_of_the_script_is_judged(results: dict[str, Any]) -> None:
    assert set(results) == set(EXPECTED)
