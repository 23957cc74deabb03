"""What one record of a calibration file says: text, token ids, or a conversation.

A record is a JSON object or a row of a table. The first of these keys that is present and not null
decides, in this order; all others are metadata, and are ignored:

    text            a string
    messages        a conversation: [{"role": "user", "content": "..."}, ...]
    conversations   ShareGPT's form of one: [{"from": "human", "value": "..."}, ...]
    input_ids       token ids; `attention_mask` beside them leaves out padding
    prompt          a string or a conversation, continued by `completion` or `response`

Either form of a turn may stand under either key. A conversation may have `tools`, a list of objects
(or a string that holds such JSON), which its chat template gets. Content in several parts is joined
where all of them are text. Everything else in a turn (tool calls, reasoning) goes to the template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepseek.untrusted import json_kind

#: Keys that make a record, in the order in which they are looked for.
KEYS = ("text", "messages", "conversations", "input_ids", "prompt")
#: Keys that are read beside those.
OTHER_KEYS = {
    "messages": ("tools",),
    "conversations": ("tools",),
    "input_ids": ("attention_mask",),
    "prompt": ("completion", "response", "tools"),
}
#: Deepest nesting of lists and objects in a conversation.
MAX_DEPTH = 64
_FORMS = (
    'each record must be {"text": "..."}, {"messages": [...]}, {"conversations": [...]}, '
    '{"input_ids": [...]} or {"prompt": "...", "completion": "..."}'
)
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "developer": "system",
} | {role: role for role in ("system", "user", "assistant", "tool")}


class RecordError(Exception):
    """Why a record cannot be used; the caller puts its file and place before it."""


@dataclass(frozen=True, slots=True)
class Text:
    """A document as text."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A document as token ids."""

    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and tools, plain JSON, as chat templates take them."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


Content = Text | TokenIds | Conversation


def read_record(record: Any) -> Content:
    """The content of one record.

    Raises:
        RecordError: it is no object, has none of the keys, or the value of one is wrong.
    """
    if not isinstance(record, dict):
        raise RecordError(f"{json_kind(record)} in place of an object; {_FORMS}")
    key = next((key for key in KEYS if record.get(key) is not None), None)
    if key is None:
        present = next((key for key in KEYS if key in record), None)
        if present is not None:
            raise RecordError(f"{present!r} is null; give it a value, or leave the record out")
        names = ", ".join(repr(str(name)[:40]) for name in list(record)[:8]) or "no key"
        raise RecordError(f"has {names}; {_FORMS}")
    value = record[key]
    if key == "text":
        if not isinstance(value, str):
            raise RecordError(f"'text' is {json_kind(value)}, not a string; correct it")
        return Text(_checked(value, "text"))
    if key == "input_ids":
        return TokenIds(_token_ids(value, record.get("attention_mask")))
    if key == "prompt":
        return _prompt(value, record)
    return Conversation(_messages(value, key), _tools(record.get("tools")))


def _checked(text: str, key: str) -> str:
    """Text that has a meaning in Unicode.

    Raises:
        RecordError: it holds half of a surrogate pair.
    """
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError(
                f"{key!r} holds half of a surrogate pair (character {error.start}), which is no "
                "character; correct it"
            ) from error
    return text


def _token_ids(value: Any, mask: Any) -> list[int]:
    if not isinstance(value, list):
        raise RecordError(f"'input_ids' is {json_kind(value)}, not a list of ids; correct it")
    if not value:
        raise RecordError("'input_ids' is an empty list; leave the record out")
    for index, token in enumerate(value):
        if type(token) is not int:
            kind = json_kind(token) if not isinstance(token, float) else f"{token!r}"
            raise RecordError(f"input_ids[{index}] is {kind}, not an id; ids are whole numbers")
    if mask is None:
        return value
    if not isinstance(mask, list) or len(mask) != len(value) or any(m not in (0, 1) for m in mask):
        raise RecordError(
            f"'attention_mask' must be a list of {len(value)} values 0 or 1, one for each of "
            "'input_ids'; correct it, or leave it out"
        )
    return [token for token, attended in zip(value, mask, strict=True) if attended]


def _prompt(value: Any, record: Mapping[str, Any]) -> Content:
    """`prompt`, continued by `completion` or `response`: two texts, or two conversations."""
    follows = next((key for key in ("completion", "response") if record.get(key) is not None), None)
    rest = record[follows] if follows else type(value)()
    if isinstance(value, str) and isinstance(rest, str):
        return Text(_checked(value, "prompt") + _checked(rest, str(follows)))
    if isinstance(value, list) and isinstance(rest, list):
        messages = _messages(value, "prompt") + (_messages(rest, str(follows)) if follows else [])
        return Conversation(messages, _tools(record.get("tools")))
    if not isinstance(value, str | list):
        raise RecordError(f"'prompt' is {json_kind(value)}, not a string or a list; correct it")
    raise RecordError(
        f"'prompt' is {json_kind(value)} and {follows!r} is {json_kind(rest)}; make both strings "
        "or both lists of messages"
    )


def _messages(value: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RecordError(f"{key!r} is {json_kind(value)}, not a list of messages; correct it")
    if not value:
        raise RecordError(f"{key!r} is an empty list; leave the record out")
    _check_depth(value, key)
    return [_message(turn, f"{key}[{index}]") for index, turn in enumerate(value)]


def _message(turn: Any, place: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RecordError(f"{place} is {json_kind(turn)}, not an object with role and content")
    names = ("role", "content") if turn.get("role") is not None else ("from", "value")
    role = turn.get(names[0])
    if not isinstance(role, str):
        raise RecordError(f'{place} has neither a "role" nor a "from" that is a string; name one')
    if role not in _ROLES:
        known = ", ".join(sorted(_ROLES))
        raise RecordError(f"{place} is by {role[:40]!r}, which is none of {known}")
    rest = {name: value for name, value in turn.items() if name not in names}
    message: dict[str, Any] = {"role": _ROLES[role], **rest}
    content = turn.get(names[1])
    if content is None and not turn.get("tool_calls"):
        raise RecordError(f'{place} has no "{names[1]}"; give it a string')
    if content is not None:
        message["content"] = _joined(content, f"{place}.{names[1]}")
    return message


def _joined(content: Any, place: str) -> str:
    """The text of a turn: a string, or parts of type text, joined as the server joins them."""
    if isinstance(content, str):
        return _checked(content, place)
    if not isinstance(content, list):
        raise RecordError(f"{place} is {json_kind(content)}, not a string or a list of parts")
    texts = []
    for index, part in enumerate(content):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            kind = part.get("type", "text")
            if kind == "text":
                texts.append(_checked(part["text"], f"{place}[{index}].text"))
                continue
        else:
            kind = part.get("type") if isinstance(part, dict) else None
        raise RecordError(
            f"{place}[{index}] is a part of type {str(kind)[:40]!r}; only parts of type 'text' "
            "with a string can be used"
        )
    return "".join(texts)


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RecordError("'tools' is a string that is not JSON; correct it") from error
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RecordError("'tools' must be a list of objects; correct it")
    _check_depth(value, "tools")
    return value


def _check_depth(value: list[Any], key: str) -> None:
    """Refuse nesting that would overflow a stack, and strings that are no text."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        children: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                children += item.values()
            elif isinstance(item, list):
                children += item
            elif isinstance(item, str):
                _checked(item, key)
        if not children:
            return
        level = children
    raise RecordError(f"{key!r} is nested deeper than {MAX_DEPTH} levels; correct it")
