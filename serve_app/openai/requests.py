"""OpenAI's request bodies: read strictly, and translated to the engine's nouns.

Only this file knows both vocabularies; service.py parses with it. Types are strict (`"n": "2"` is
an error). A field of OpenAI's that this server does not implement is accepted at its neutral value,
where it changes nothing, and refused by name otherwise. A field that nobody knows is refused as a
likely typo. Extensions beyond OpenAI: `top_k`, `ignore_eos`, `stop_token_ids`.

A new sampling parameter is one field of `SamplingParams` and one field of `_Generation` of the same
name. What depends on the model (lengths, the vocabulary) is checked in routing/checks.py.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deepseek.engine.request import MAX_LOGPROBS, SamplingParams
from serve_app.errors import InvalidRequest
from serve_app.routing.checks import MAX_CHOICES

MAX_PROMPTS = 64

#: OpenAI's fields that are not implemented, with the values at which they change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "prompt_cache_key": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "safety_identifier": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}


_SAMPLING_FIELDS = {field.name for field in fields(SamplingParams)}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Body):
    include_usage: bool = False


StopString = Annotated[str, Field(min_length=1, max_length=256)]


class _Generation(_Body):
    """The fields that chat and text completions share."""

    model: str
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0, description="0 keeps every token")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopString | list[StopString] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    #: OpenAI's free-form end-user label: nothing depends on it, and it is not recorded.
    user: str | None = None

    @model_validator(mode="after")
    def _check_common(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if isinstance(self.stop, list) and len(self.stop) > 16:
            raise ValueError("stop holds more than 16 strings")
        return self

    @property
    def num_choices(self) -> int:
        return self.n if self.n is not None else 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def completion_limit(self) -> int | None:
        """Tokens to generate at most; None leaves the limit to the server."""
        return self.max_tokens

    @property
    def limit_field(self) -> str:
        """The field that `completion_limit` is from."""
        return "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report per token; None for no logprobs."""
        raise NotImplementedError

    def sampling(self, *, max_tokens: int, choice: int) -> SamplingParams:
        """Sampling parameters of one choice.

        A field passes through under its own name unless it is rewritten below; null leaves it at
        the default of `SamplingParams`. With a seed, choice i gets seed + i, so that the choices
        of one request differ and each of them is reproducible.
        """
        passed: dict[str, Any] = self.model_dump(include=_SAMPLING_FIELDS, exclude_none=True)
        rewritten = {
            "max_tokens": max_tokens,
            "seed": None if self.seed is None else _wrap(self.seed + choice),
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "logprobs": self.num_logprobs,
        }
        return SamplingParams(**passed | rewritten)


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(_Generation):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        return self

    @property
    def completion_limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def limit_field(self) -> str:
        return "max_tokens" if self.max_tokens is not None else "max_completion_tokens"

    @property
    def prompt_field(self) -> str:
        return "messages"

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> list[dict[str, str]]:
        """Messages as chat templates take them; `developer` is OpenAI's newer name for system."""
        roles = {"developer": "system"}
        return [{"role": roles.get(m.role, m.role), "content": m.text} for m in self.messages]


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(_Generation):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: Literal[False] | None = None

    @property
    def prompt_field(self) -> str:
        return "prompt"

    @property
    def num_prompts(self) -> int:
        """Of this body; see `prompts`."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return 1
        return len(self.prompt)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, each as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


AnyRequest = ChatRequest | CompletionRequest
Body = TypeVar("Body", bound=_Generation)


def parse(model: type[Body], raw: bytes) -> Body:
    """Validate a request body.

    Raises:
        InvalidRequest: not JSON, or a field is missing, wrong, unsupported or unknown; named.
    """
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
    # Neutral unsupported fields are dropped and the rest is validated again.
    neutral = {
        item["loc"][0] for item in errors if item["type"] == "extra_forbidden" and _is_neutral(item)
    }
    rest = [item for item in errors if not (len(item["loc"]) == 1 and item["loc"][0] in neutral)]
    if rest:
        raise _explain(model, rest[0])
    return cast(Body, _TOLERANT[model].model_validate_json(raw))


def _is_neutral(item: Any) -> bool:
    name = item["loc"][0]
    return len(item["loc"]) == 1 and any(
        item["input"] == value and isinstance(item["input"], bool) == isinstance(value, bool)
        for value in UNSUPPORTED.get(name, ())
    )


class _TolerantChat(ChatRequest):
    """Validates the rest of a body whose extra fields are all neutral."""

    model_config = ConfigDict(extra="ignore")


class _TolerantCompletion(CompletionRequest):
    model_config = ConfigDict(extra="ignore")


_TOLERANT: dict[type[_Generation], type[_Generation]] = {
    ChatRequest: _TolerantChat,
    CompletionRequest: _TolerantCompletion,
}


def _explain(model: type[_Generation], item: Any) -> InvalidRequest:
    """One sentence for the first of pydantic's errors. It never repeats the value, which may be
    part of a prompt."""
    place = _place(item["loc"])
    kind = item["type"]
    if kind == "json_invalid":
        reason = item["msg"].removeprefix("Invalid JSON: ")
        return InvalidRequest(f"the body is not valid JSON: {reason}", code="invalid_json")
    if kind == "model_type" or not place and kind != "value_error":
        return InvalidRequest("the body must be a JSON object", code="invalid_json")
    if kind == "extra_forbidden":
        return _explain_extra(model, item["loc"], place)
    if kind == "missing":
        return InvalidRequest(f"field {place!r} is required", param=place, code="missing_field")
    message = _EXPECTED.get(place.partition(".")[0]) or item["msg"].removeprefix("Value error, ")
    if place.startswith("messages.") and place.endswith(".content"):
        message = "must be a string or a list of text parts"
    return InvalidRequest(f"{place}: {message}" if place else message, param=place or None)


def _explain_extra(model: type[_Generation], loc: tuple[Any, ...], place: str) -> InvalidRequest:
    name = str(loc[-1])
    if name in UNSUPPORTED or name in ("tool_calls", "tool_call_id", "name", "image_url"):
        return InvalidRequest(
            f"field {place!r} is not supported by this server; remove it",
            param=place,
            code="unsupported_field",
        )
    known = model.model_fields if len(loc) == 1 else {}
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; remove it"
    return InvalidRequest(f"unknown field {place!r}{hint}", param=place, code="unknown_field")


def _place(loc: tuple[Any, ...]) -> str:
    """The field's path, like `messages.0.content`, without pydantic's names of union branches."""
    parts: list[str] = []
    for part in loc:
        if isinstance(part, str) and ("[" in part or part in _BRANCHES):
            continue
        parts.append(str(part))
    return ".".join(parts)


#: Messages for fields of several types, where pydantic's error of one branch would mislead.
_EXPECTED = {
    "prompt": "must be a string, a list of strings, a list of token ids or a list of such lists, "
    f"none of the lists empty, at most {MAX_PROMPTS} prompts",
    "stop": "must be a string or a list of strings, each of 1 to 256 characters",
}

_BRANCHES = {"str", "int", "constrained-str"}


def _wrap(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63
