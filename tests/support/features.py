"""What a client of the service did, feature by feature, and what it should have done.

A script of `tests/interop/` runs in the client's own environment and writes a JSON object: for each
feature `{"value": ...}`, or `{"error": CLASS, "status": ..., "message": ...}` where the client
raised. A test holds a table of what to expect of each, and `check` compares.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.environments import run_in
from support.served import Served


@dataclass(frozen=True)
class Refused:
    """The client raised this class, and what it says holds the words: the refused field's name."""

    error: str
    words: str
    status: int | None = 400


#: In a table: the answers that the service gives without a client, `ask_plainly`'s.
CHAT, TEXT = "<the chat's answer>", "<the completion's text>"
#: A value to be equal to, a condition on the value, or a refusal.
Expected = Any
#: What the scripts ask.
QUESTION = {"role": "user", "content": "What does json.dumps do?"}
PROMPT = "json.dumps("
SHORT: dict[str, Any] = {"max_tokens": 12, "temperature": 0}


def ask_plainly(served: Served) -> dict[str, str]:
    """The service's answers to QUESTION and PROMPT, asked for without any client."""
    chat = served.post("/v1/chat/completions", messages=[QUESTION], **SHORT)
    text = served.post("/v1/completions", prompt=PROMPT, **SHORT)
    return {CHAT: chat["choices"][0]["message"]["content"], TEXT: text["choices"][0]["text"]}


def run_features(
    tool: str, script: str, served: Served, output: Path, **variables: str
) -> dict[str, Any]:
    """Run the script against the service in the tool's environment, and read what it wrote. It is
    called with the base URL, the model, the key's file and the output's name."""
    key_file = output.with_suffix(".key")
    key_file.write_text(served.key)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(output.parent / "hf")}
    words = (served.base, served.model, key_file, output)
    run_in(tool, script, *words, **{**offline, **variables})
    return dict(json.loads(output.read_text()))


def check(done: dict[str, Any], expected: Expected, answers: dict[str, str]) -> None:
    """One feature; `answers` are `ask_plainly`'s.

    Raises:
        AssertionError: the client did something else.
    """
    if isinstance(expected, Refused):
        assert done.get("error") == expected.error, done
        assert done.get("status") == expected.status, done
        assert expected.words in done["message"], done
        return
    assert "error" not in done, done
    if callable(expected):
        assert expected(done["value"]), done["value"]
    else:
        assert done["value"] == _filled(expected, answers)


def _filled(expected: Any, answers: dict[str, str]) -> Any:
    if isinstance(expected, list):
        return [_filled(item, answers) for item in expected]
    return answers.get(expected, expected) if isinstance(expected, str) else expected
