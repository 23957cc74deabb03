"""The bodies that real clients sent, recorded from the scripts of `tests/interop/`, parse as they
did: what they need is accepted, and what is refused is refused by the same name.

So that a change of the schema that breaks a client fails here, and not only in `make interop`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import InvalidRequest
from serve_app.openai.requests import ChatRequest, CompletionRequest, parse

MODELS: dict[str, type[ChatRequest] | type[CompletionRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}
RECORDED: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("client_bodies.json").read_text(encoding="utf-8")
)
CLIENTS = sorted({row["client"] for row in RECORDED})


@pytest.mark.parametrize("client", CLIENTS)
def test_what_a_client_sends_is_accepted_or_refused_by_name(client: str) -> None:
    rows = [row for row in RECORDED if row["client"] == client]
    assert any(row["refused"] is None for row in rows)
    for row in rows:
        raw = json.dumps(row["body"]).encode()
        if row["refused"] is None:
            parse(MODELS[row["path"]], raw)
        else:
            with pytest.raises(InvalidRequest) as caught:
                parse(MODELS[row["path"]], raw)
            assert caught.value.param == row["refused"], row["body"]
            assert row["refused"] in str(caught.value)
