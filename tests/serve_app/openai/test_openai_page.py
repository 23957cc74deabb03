"""docs/openai.md lists every field of the bodies as the tables of the code have it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from serve_app import limits
from serve_app.openai.messages import OTHER_PARTS, ROLES, TEXT_PARTS, TOOL_ROLES
from serve_app.openai.neutral import BODY, MESSAGE, PART, Label, Neutral
from serve_app.openai.requests import ChatRequest, CompletionRequest, StreamOptions

TABLES: dict[str, Mapping[str, Neutral | Label]] = {
    "Of the body": BODY,
    "Of a message": MESSAGE,
    "Of a text part": PART,
}


def row(name: str, rule: Neutral | Label) -> str:
    """A field's row of the page."""
    if isinstance(rule, Label):
        kind = "an object" if dict in rule.kinds else "a string"
        kind = kind if rule.may_be_empty else "a string that is not empty"
        return f"| `{name}` | label: {kind}, ignored |"
    values = [f"`{json.dumps(value)}`" for value in rule.values] + [rule.words] * bool(rule.words)
    return f"| `{name}` | {', '.join(values) or 'only null'} |"


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "openai.md").read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    """The text under a heading, up to the next one."""
    _, _, rest = page.partition(f"# {title}\n")
    assert rest, f"the page has no section {title!r}"
    return re.split(r"(?m)^#", rest)[0]


@pytest.mark.parametrize("title", TABLES)
def test_the_page_lists_every_field_that_asks_for_nothing(page: str, title: str) -> None:
    rows = [line for line in section(page, title).splitlines() if line.startswith("| `")]
    expected = [row(name, rule) for name, rule in sorted(TABLES[title].items())]
    assert rows == expected, "\n".join(expected)


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("Both endpoints", ChatRequest.model_fields.keys() & CompletionRequest.model_fields.keys()),
        ("Chat", ChatRequest.model_fields.keys() - CompletionRequest.model_fields.keys()),
        ("Completions", CompletionRequest.model_fields.keys() - ChatRequest.model_fields.keys()),
        ("Stream options", StreamOptions.model_fields.keys()),
    ],
)
def test_the_page_lists_every_field_that_is_implemented(
    page: str, title: str, names: set[str]
) -> None:
    listed = re.findall(r"(?m)^\| `(\w+)`", section(page, title))
    # logprobs is of two kinds, one for each endpoint, so both sections have it
    assert set(listed) - {"logprobs"} == names - {"logprobs"}
    assert len(listed) == len(set(listed))


def test_the_page_lists_roles_and_parts(page: str) -> None:
    text = section(page, "Messages")
    for name in (*ROLES, *TOOL_ROLES, *TEXT_PARTS, *OTHER_PARTS):
        assert f"`{name}`" in text, name


def test_the_page_states_the_limits_of_the_code(page: str) -> None:
    listed = dict(re.findall(r"(?m)^\| `(\w+)` \| ([\d,]+) \|", section(page, "Limits")))
    stated = {name: int(value.replace(",", "")) for name, value in listed.items()}
    assert stated == {
        name: value
        for name, value in vars(limits).items()
        if name.startswith("MAX_") and name != "MAX_INT"
    }
