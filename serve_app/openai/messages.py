"""The messages of a chat: read strictly, to a role and one text each. requests.py calls it.

A conversation holds answers that a client feeds back, with fields of features that were not used:
they are neutral (neutral.py). An assistant's message without content says nothing, as in vLLM, and
a refusal is what it said. Text parts are joined by line breaks, as vLLM joins them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve_app.errors import InvalidRequest
from serve_app.limits import MAX_MESSAGES, MAX_PARTS
from serve_app.openai.explain import missing_field, wrong_value
from serve_app.openai.neutral import MESSAGE, PART, drop_neutral

#: Role as clients name it -> as templates do. `developer` is OpenAI's newer name for system.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
#: Roles of features that are not implemented.
TOOL_ROLES = frozenset({"tool", "function"})

#: Type of a part that is text -> the field that holds the text.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}

#: Types of parts that clients send elsewhere, for a sentence; another type is not repeated there.
OTHER_PARTS = frozenset(
    (
        *("audio", "document", "file", "image", "image_embeds", "image_pil", "image_url"),
        *("input_audio", "input_file", "input_image", "reasoning", "thinking"),
        *("tool_call", "tool_result", "tool_use", "video", "video_url"),
    )
)


_CONTENT = "must be a string or a list of text parts"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` as the client gave it."""

    role: str
    text: str

    @property
    def template_role(self) -> str:
        return ROLES[self.role]


def read_messages(value: Any) -> tuple[Message, ...]:
    """The messages of a body.

    Raises:
        InvalidRequest: it is no list of messages, or too long; the first wrong field is named.
    """
    if not isinstance(value, list) or not value:
        raise wrong_value("messages", "must be a list of at least one message")
    if len(value) > MAX_MESSAGES:
        raise wrong_value(
            "messages", f"holds {len(value)} messages; the limit is {MAX_MESSAGES}, so join some"
        )
    return tuple(_read_message(item, f"messages.{index}") for index, item in enumerate(value))


def _read_message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise wrong_value(place, "must be an object with role and content")
    role = _read_role(value.get("role"), f"{place}.role")
    spoken = role == "assistant"
    known = ("role", "content", "refusal") if spoken else ("role", "content")
    fields = drop_neutral(_without_null(value, "refusal"), known, MESSAGE, place)
    content = fields.get("content")
    refusal = fields.get("refusal", "")
    if not isinstance(refusal, str):
        raise wrong_value(f"{place}.refusal", "must be a string or null")
    if content is None and not spoken:
        if "content" not in value:
            raise missing_field(f"{place}.content")
        raise wrong_value(f"{place}.content", _CONTENT)
    texts = _read_content(content, f"{place}.content")
    return Message(role, "\n".join(texts + [refusal] if refusal else texts))


def _without_null(value: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key != name or item is not None}


def _read_role(role: Any, place: str) -> str:
    if role is None:
        raise missing_field(place)
    if isinstance(role, str) and role in ROLES:
        return role
    if isinstance(role, str) and role in TOOL_ROLES:
        raise InvalidRequest(
            f"{place}: messages of role {role!r} are not supported by this server, which calls no "
            "tools; remove them",
            param=place,
            code="unsupported_field",
        )
    raise wrong_value(place, f"must be one of {', '.join(ROLES)}")


def _read_content(content: Any, place: str) -> list[str]:
    """The texts of a content, to be joined."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise wrong_value(place, _CONTENT)
    if len(content) > MAX_PARTS:
        raise wrong_value(
            place, f"holds {len(content)} parts; the limit is {MAX_PARTS}, so join some"
        )
    return [_read_part(part, f"{place}.{index}") for index, part in enumerate(content)]


def _read_part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise wrong_value(place, 'must be a text part, like {"type": "text", "text": "..."}')
    kind = part.get("type")
    if not isinstance(kind, str):
        raise missing_field(f"{place}.type")
    if kind not in TEXT_PARTS:
        named = f"of type {kind!r}" if kind in OTHER_PARTS else "of this type"
        raise InvalidRequest(
            f"{place}.type: parts {named} are not supported by this server; send text",
            param=f"{place}.type",
            code="unsupported_field",
        )
    name = TEXT_PARTS[kind]
    fields = drop_neutral(part, ("type", name), PART, place)
    if name not in fields:
        raise missing_field(f"{place}.{name}")
    text = fields[name]
    if not isinstance(text, str):
        raise wrong_value(f"{place}.{name}", "must be a string")
    return text
