"""OpenAI's request bodies: read strictly, and translated to the engine's nouns.

`parse` reads a body in three steps, each at a bounded cost: json_body.py counts its values and
makes objects of it; neutral.py drops the fields that ask for nothing and refuses those that are not
implemented or not known; what is left is validated here, up to the first error. Types are strict
(`"n": "2"` is an error), and null is the same as absent. service.py parses with a `BodyParser`,
which keeps long bodies off the event loop.

Only this file knows both vocabularies. A new sampling parameter is one field of `SamplingParams`
and one field of `_Generation` of the same name. What depends on the model (lengths, the vocabulary)
is checked in routing/checks.py. docs/openai.md lists every field.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)

from deepseek.engine.request import MAX_LOGPROBS, SamplingParams
from serve_app.limits import (
    INLINE_BODY_BYTES,
    MAX_CHOICES,
    MAX_INT,
    MAX_LABEL,
    MAX_PROMPTS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MIN_INT,
    PARSER_THREADS,
)
from serve_app.openai.explain import explain, misplaced_field, wrong_value
from serve_app.openai.json_body import read_json_object
from serve_app.openai.messages import Message, read_messages
from serve_app.openai.neutral import BODY, STREAM_OPTIONS, drop_neutral

_SAMPLING_FIELDS = {field.name for field in fields(SamplingParams)}

_PROMPT = (
    "must be a string, a list of strings, a list of token ids or a list of such lists, "
    "none of the lists empty"
)
_STOP = f"must be a string or a list of strings, each of 1 to {MAX_STOP_LENGTH} characters"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Body):
    #: A last chunk with the usage of the whole request.
    include_usage: bool = False
    #: Every chunk has the usage so far; it needs `include_usage`, as in vLLM.
    continuous_usage_stats: bool = False
    #: Every chunk has a field of random text that hides how long the chunk's own text is.
    include_obfuscation: bool = False


def _read_stream_options(value: Any) -> Any:
    if not isinstance(value, dict):
        raise wrong_value("stream_options", "must be an object")
    if not value:
        return None
    return drop_neutral(value, StreamOptions.model_fields, STREAM_OPTIONS, "stream_options")


def _check_length(values: list[Any], limit: int, name: str, what: str) -> None:
    """Count a list before its items are looked at."""
    if len(values) > limit:
        raise wrong_value(name, f"holds {len(values)} {what}; the limit is {limit}")


def _read_stop(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise wrong_value("stop", _STOP)
    _check_length(strings, MAX_STOP_STRINGS, "stop", "strings")
    if not all(isinstance(item, str) and 1 <= len(item) <= MAX_STOP_LENGTH for item in strings):
        raise wrong_value("stop", _STOP)
    return tuple(strings)


def _read_stop_token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise wrong_value("stop_token_ids", "must be a list of token ids")
    _check_length(value, MAX_STOP_TOKEN_IDS, "stop_token_ids", "token ids")
    if not are_token_ids(value):
        raise wrong_value("stop_token_ids", "must be a list of token ids, which are integers")
    return tuple(dict.fromkeys(value))


def _read_prompt(value: Any) -> list[str | list[int]]:
    """The prompts one by one, each as text or as token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise wrong_value("prompt", _PROMPT)
    if isinstance(value[0], int):
        if not are_token_ids(value):
            raise wrong_value("prompt", _PROMPT)
        return [value]
    _check_length(value, MAX_PROMPTS, "prompt", "prompts")
    if all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) and item and are_token_ids(item) for item in value):
        return value
    raise wrong_value("prompt", _PROMPT)


def are_token_ids(values: list[Any]) -> bool:
    """Whether all are integers that could be token ids; which ids there are the model says."""
    if not values:
        return True
    return set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= MAX_INT


class _Generation(_Body):
    """The fields that chat and text completions share."""

    #: Absent, null or empty: the model that is served, as in vLLM; a `BodyParser` puts its name in.
    model: str = ""
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_INT)
    #: OpenAI's newer name for max_tokens.
    max_completion_tokens: int | None = Field(default=None, ge=0, le=MAX_INT)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    #: 0 and, as in vLLM, -1 keep every token.
    top_k: Annotated[int | None, AfterValidator(lambda k: 0 if k == -1 else k)] = Field(
        default=None, ge=-1, le=MAX_INT
    )
    #: -1 draws one, as in vLLM.
    seed: int | None = Field(default=None, ge=MIN_INT, le=MAX_INT)
    stop: Annotated[tuple[str, ...], PlainValidator(_read_stop)] = ()
    stop_token_ids: Annotated[tuple[int, ...], PlainValidator(_read_stop_token_ids)] = ()
    ignore_eos: bool = False
    #: Alternatives to report for each token of the prompt; None for none (vLLM's extension).
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    #: Tokens in logprobs are written as `token_id:N` (vLLM's extension).
    return_tokens_as_token_ids: bool | None = None
    #: Whether the model's own special tokens are put around the text (vLLM's extension).
    add_special_tokens: bool | None = None
    #: Prefixes are shared only among requests of equal salt (vLLM's extension): a client separates
    #: its own users; routing/tenants.py separates clients.
    cache_salt: str | None = Field(default=None, min_length=1, max_length=MAX_LABEL)
    stream: bool | None = None
    stream_options: Annotated[StreamOptions | None, BeforeValidator(_read_stream_options)] = None

    def check(self) -> None:
        """Check what depends on several fields.

        Raises:
            InvalidRequest: two fields contradict each other.
        """
        if self.stream_options is not None and not self.stream:
            raise wrong_value("stream_options", "needs stream: true")
        asked, newer = self.max_tokens, self.max_completion_tokens
        if asked is not None and newer is not None and asked != newer:
            raise wrong_value(
                "max_completion_tokens",
                "differs from max_tokens, which is its older name; give one of them",
            )
        if self.stream and self.prompt_logprobs is not None:
            raise wrong_value("prompt_logprobs", "is not available with stream: true; remove one")
        if self.completion_limit == 0 and not self.may_generate_nothing:
            name = "max_tokens" if asked is not None else "max_completion_tokens"
            raise wrong_value(name, "must be greater than or equal to 1; 0 needs echo: true")

    @property
    def may_generate_nothing(self) -> bool:
        """Whether an answer without any new token makes sense."""
        return False

    @property
    def num_choices(self) -> int:
        return self.n if self.n is not None else 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk tells the usage so far."""
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats

    @property
    def include_obfuscation(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_obfuscation

    @property
    def completion_limit(self) -> int | None:
        """Tokens to generate at most; None leaves the limit to the server."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def limit_field(self) -> str:
        """The field that `completion_limit` is from."""
        return "max_tokens" if self.max_tokens is not None else "max_completion_tokens"

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report per token; None for no logprobs."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives that the engine reports per token of the prompt; None for no logprobs."""
        return self.prompt_logprobs

    def sampling(self, *, max_tokens: int, choice: int) -> SamplingParams:
        """Sampling parameters of one choice.

        A field passes through under its own name unless it is rewritten below; null leaves it at
        the default of `SamplingParams`. With a seed, choice i gets seed + i, so that the choices
        of one request differ and each of them is reproducible.
        """
        passed: dict[str, Any] = self.model_dump(include=_SAMPLING_FIELDS, exclude_none=True)
        rewritten = {
            "max_tokens": max_tokens,
            "seed": None if self.seed in (None, -1) else _wrap(self.seed + choice),
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "logprobs": self.num_logprobs,
            "prompt_logprobs": self.num_prompt_logprobs,
        }
        return SamplingParams(**passed | rewritten)


#: Characters of a message by which a conversation is known.
_OPENING = 16_384


class ChatRequest(_Generation):
    messages: Annotated[tuple[Message, ...], PlainValidator(read_messages)]
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise wrong_value("top_logprobs", "needs logprobs: true")

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
        """Messages as chat templates take them."""
        return [{"role": m.template_role, "content": m.text} for m in self.messages]

    def opening(self) -> str:
        """What every later turn of this conversation begins with, and seldom another one: its
        messages up to the first of the user, each cut to what is quick to hash."""
        opening = []
        for message in self.messages:
            opening.append([message.template_role, message.text[:_OPENING]])
            if message.template_role == "user":
                break
        return json.dumps(opening)


class CompletionRequest(_Generation):
    prompt: Annotated[list[str | list[int]], PlainValidator(_read_prompt)]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    #: The prompt comes back in front of the completion, with its logprobs if `logprobs` is given.
    echo: bool | None = None

    def check(self) -> None:
        super().check()
        if (total := len(self.prompt) * self.num_choices) > MAX_CHOICES:
            raise wrong_value(
                "n",
                f"{self.num_choices} for {len(self.prompt)} prompts makes {total} choices; the "
                f"limit is {MAX_CHOICES}, so send several requests",
            )

    @property
    def may_generate_nothing(self) -> bool:
        return bool(self.echo) or self.prompt_logprobs is not None

    @property
    def prompt_field(self) -> str:
        return "prompt"

    @property
    def num_prompts(self) -> int:
        return len(self.prompt)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        echoed = self.logprobs if self.echo else None
        counts = [count for count in (self.prompt_logprobs, echoed) if count is not None]
        return max(counts, default=None)

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, each as text or as token ids."""
        return self.prompt


AnyRequest = ChatRequest | CompletionRequest
Body = TypeVar("Body", bound=_Generation)
Result = TypeVar("Result")

#: Field of one endpoint only -> the endpoint.
_ENDPOINTS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}


def parse(model: type[Body], raw: bytes) -> Body:
    """Validate a request body.

    Raises:
        InvalidRequest: not JSON, or a field is missing, wrong, unsupported or unknown; named.
    """
    given = read_json_object(raw)
    for name, endpoint in _ENDPOINTS.items():
        if given.get(name) is not None and name not in model.model_fields:
            raise misplaced_field(name, endpoint)
    try:
        body = model.model_validate(drop_neutral(given, model.model_fields, BODY))
    except ValidationError as error:
        raise explain(error.errors(include_url=False, include_context=False)[0]) from None
    body.check()
    return body


class BodyParser:
    """`parse` for an event loop: a long body is parsed in one of a few threads. A body that names
    no model gets the name of the one that is served."""

    def __init__(self, served_name: str) -> None:
        self._served_name = served_name
        self._threads = ThreadPoolExecutor(PARSER_THREADS, "parse-body")

    async def parse(self, model: type[Body], raw: bytes) -> Body:
        """`parse`, with its errors."""
        body = await self.run(functools.partial(parse, model), raw)
        return body if body.model else body.model_copy(update={"model": self._served_name})

    async def run(self, parse_bytes: Callable[[bytes], Result], raw: bytes) -> Result:
        """Another parser of a body, with its errors."""
        if len(raw) <= INLINE_BODY_BYTES:
            return parse_bytes(raw)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, parse_bytes, raw)


def _wrap(seed: int) -> int:
    return (seed - MIN_INT) % 2**64 + MIN_INT
