"""Admission checks: for which model, and whether a request can ever be served.

Pure functions, called by openai/service.py: values in, values or errors out. Nothing here waits. It
checks the model's name, that token ids exist, and that prompt and completion fit the
context and the KV cache at all. Whether there is room *now* is decided by the engine and by Serve's
queue, and a client sees that as a 429.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from deepseek.engine.request import SamplingParams
from serve_app.engines.protocol import EngineInfo, GenerateRequest
from serve_app.errors import InvalidRequest, ModelNotFound
from serve_app.limits import MAX_CHOICES


class GenerationBody(Protocol):
    """What admission asks of a request body, of whichever API."""

    @property
    def num_choices(self) -> int:
        """Choices per prompt."""
        ...

    @property
    def completion_limit(self) -> int | None:
        """Tokens asked for at most; None leaves it to the server."""
        ...

    def sampling(self, *, max_tokens: int, choice: int) -> SamplingParams:
        """Parameters of one choice."""
        ...


def check_model(requested: str, served: str) -> None:
    """Raises ModelNotFound unless the request names the model that is served."""
    if requested != served:
        raise ModelNotFound(f"model {requested[:200]!r} is not served here; use {served!r}")


def choose_max_tokens(
    num_prompt_tokens: int, requested: int | None, default: int, info: EngineInfo
) -> int:
    """Tokens to generate at most: as requested, or the default cut to what the context leaves.

    Raises:
        InvalidRequest: prompt and completion cannot fit, whatever else is running.
    """
    limit = min(info.max_model_len, info.kv_tokens_total)
    holder = info.context_name if info.max_model_len <= info.kv_tokens_total else "KV cache"
    room = limit - num_prompt_tokens
    if room < (0 if requested == 0 else 1):
        raise InvalidRequest(
            f"the prompt has {num_prompt_tokens} tokens and the {holder} holds {limit}, completion "
            "included; shorten the prompt",
            code="context_length_exceeded",
        )
    if requested is None:
        return min(default, room)
    if requested > room:
        raise InvalidRequest(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens asks for {requested} more, "
            f"but the {holder} holds {limit}; shorten the prompt or ask for at most {room}",
            code="context_length_exceeded",
        )
    return requested


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest for an id that the vocabulary does not have."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequest(
            f"token id {largest} is outside the vocabulary of {vocab_size}", param=param
        )


def admit(
    body: GenerationBody,
    prompts: Sequence[Sequence[int]],
    *,
    request_id: str,
    info: EngineInfo,
    vocab_size: int,
    default_max_tokens: int,
    trace_context: dict[str, str],
) -> list[GenerateRequest]:
    """The engine requests of a body: one per prompt and choice, in the order of the answer's
    indices. `prompts` are token ids.

    Raises:
        InvalidRequest: a prompt is empty, too long, or holds an id outside the vocabulary; or the
            body asks for more choices in total than MAX_CHOICES.
    """
    if len(prompts) * body.num_choices > MAX_CHOICES and len(prompts) > 1:
        raise InvalidRequest(
            f"{len(prompts)} prompts with n {body.num_choices} are more than {MAX_CHOICES} "
            "choices; send several requests",
            param="n",
        )
    requests: list[GenerateRequest] = []
    for prompt in prompts:
        if not prompt:
            raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
        check_token_ids(prompt, vocab_size, "prompt")
        max_tokens = choose_max_tokens(len(prompt), body.completion_limit, default_max_tokens, info)
        for choice in range(body.num_choices):
            requests.append(
                GenerateRequest(
                    request_id=f"{request_id}-{len(requests)}",
                    prompt_ids=tuple(prompt),
                    sampling=body.sampling(max_tokens=max_tokens, choice=choice),
                    trace_context=trace_context,
                )
            )
    return requests


def check_prompt_logprobs(requests: Sequence[GenerateRequest], limit: int) -> None:
    """Check that the prompts' logprobs make no answer larger than the service allows: every prompt
    token has an entry for itself and one for each alternative, in every choice.

    Raises:
        InvalidRequest: they are more than `limit`.
    """
    counts = [(len(r.prompt_ids), r.sampling.prompt_logprobs) for r in requests]
    total = sum(length * (1 + count) for length, count in counts if count is not None)
    if total > limit:
        raise InvalidRequest(
            f"the logprobs of these prompts are {total} entries (prompt tokens times alternatives "
            f"and one, over all choices), and one answer holds {limit}; ask for fewer alternatives "
            "or send fewer or shorter prompts",
            param="logprobs",
            code="too_many_logprobs",
        )
