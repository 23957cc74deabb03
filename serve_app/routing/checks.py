"""Admission checks: for which model, and whether a request can ever be served.

Pure functions, called by openai/service.py: values in, values or errors out. Nothing here waits. It
checks the model's name, that the service can hold so many choices, that token ids exist,
and that prompt and completion fit the context and the KV cache at all. Whether there is room *now*
is decided by the owner of admission (admission.py), and a client sees that as a 429.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deepseek.engine.request import SamplingParams
from serve_app.config import ServeConfig
from serve_app.engines.protocol import EngineInfo, GenerateRequest
from serve_app.errors import InvalidRequest, ModelNotAllowed, ModelNotFound
from serve_app.limits import MAX_CHOICES
from serve_app.routing.tenants import ANYONE, Tenant
from serve_app.routing.tickets import Ask, Enter, Terms
from serve_app.sections import AdmissionSection


class GenerationBody(Protocol):
    """What admission asks of a request body, of whichever API."""

    @property
    def num_choices(self) -> int:
        """Choices per prompt."""
        ...

    @property
    def num_prompts(self) -> int: ...

    @property
    def prompt_field(self) -> str:
        """The field that the prompts are in."""
        ...

    @property
    def completion_limit(self) -> int | None:
        """Tokens asked for at most; None leaves it to the server."""
        ...

    @property
    def limit_field(self) -> str:
        """The field that `completion_limit` is from."""
        ...

    def sampling(self, *, max_tokens: int, choice: int) -> SamplingParams:
        """Parameters of one choice."""
        ...


def check_model(requested: str, served: str, tenant: Tenant = ANYONE) -> None:
    """Check that the request names the model that is served, and that its key may use it.

    A key is told nothing of models that it may not use, not even whether there are such.

    Raises:
        ModelNotAllowed: the key may not use a model of this name.
        ModelNotFound: it may, but none is served under this name.
    """
    if not tenant.may_use(requested):
        # Without the name: a body that gave none has got that of the served model.
        raise ModelNotAllowed(
            "this API key may not use the model that is asked for; /v1/models lists what it may use"
        )
    if requested != served:
        hint = f"; use {served!r}" if tenant.may_use(served) else ""
        raise ModelNotFound(f"model {requested[:200]!r} is not served here{hint}")


@dataclass(frozen=True, slots=True)
class ContextLimit:
    """Tokens of prompt and completion together that fit at all, and what it is that holds them."""

    tokens: int
    holder: str

    @classmethod
    def of(cls, info: EngineInfo) -> ContextLimit:
        if info.max_model_len <= info.kv_tokens_total:
            return cls(info.max_model_len, info.context_name)
        return cls(info.kv_tokens_total, "KV cache")


def too_long(limit: ContextLimit, param: str, num_tokens: int | None = None) -> InvalidRequest:
    """The refusal of a prompt that can never fit; `num_tokens` None where they were not counted to
    the end."""
    has = f"more than {limit.tokens}" if num_tokens is None else f"{num_tokens}"
    return InvalidRequest(
        f"the prompt has {has} tokens and the {limit.holder} holds {limit.tokens}, completion "
        "included; shorten the prompt",
        param=param,
        code="context_length_exceeded",
    )


def never_fits(limit: ContextLimit, num_tokens: int) -> InvalidRequest:
    """The refusal of a request that no pool can ever hold."""
    return InvalidRequest(
        f"prompt and completion limit are {num_tokens} tokens together, and the {limit.holder} "
        f"holds {limit.tokens}; shorten the prompt or ask for fewer tokens",
        code="context_length_exceeded",
    )


def most_requests(config: ServeConfig, admission: AdmissionSection) -> int:
    """Sequences that the service can hold at one time of requests with one home, running and
    waiting."""
    running = {
        name: pool.most_replicas * pool.max_ongoing_requests for name, pool in config.pools.items()
    }
    most = max(
        running[name] + sum(running[other] for other in pool.spill_over)
        for name, pool in config.pools.items()
    )
    return most + admission.max_queued_requests


def check_choices(body: GenerationBody, most: int) -> None:
    """Raises InvalidRequest if the body asks for more choices, over all of its prompts, than one
    request may, or than the `most` that the service can ever hold."""
    num_prompts, limit = body.num_prompts, min(most, MAX_CHOICES)
    if num_prompts * body.num_choices <= limit:
        return
    if num_prompts == 1:
        raise InvalidRequest(
            f"n {body.num_choices} is more than the {limit} choices that a request may have here; "
            "ask for fewer",
            param="n",
        )
    raise InvalidRequest(
        f"{num_prompts} prompts with n {body.num_choices} are more than the {limit} choices that a "
        "request may have here; send several requests",
        param="n" if num_prompts <= limit else body.prompt_field,
    )


def choose_max_tokens(
    num_prompt_tokens: int, body: GenerationBody, default: int, limit: ContextLimit
) -> int:
    """Tokens to generate at most: as requested, or the default cut to what the context leaves.

    Raises:
        InvalidRequest: prompt and completion cannot fit, whatever else is running.
    """
    requested = body.completion_limit
    room = limit.tokens - num_prompt_tokens
    if room < (1 if requested != 0 else 0):
        raise too_long(limit, body.prompt_field, num_prompt_tokens)
    if requested is None:
        return min(default, room)
    if requested > room:
        raise InvalidRequest(
            f"the prompt has {num_prompt_tokens} tokens and {body.limit_field} asks for "
            f"{requested} more, but the {limit.holder} holds {limit.tokens}; shorten the prompt or "
            f"ask for at most {room}",
            param=body.limit_field,
            code="context_length_exceeded",
        )
    return requested


def to_sequences(
    body: GenerationBody,
    prompts: Sequence[Sequence[int]],
    *,
    request_id: str,
    limit: ContextLimit,
    vocab_size: int,
    default_max_tokens: int,
    trace_context: dict[str, str],
    cache_salt: str = "",
) -> list[GenerateRequest]:
    """The engine requests of a body: one per prompt and choice, in the order of the answer's
    indices. `prompts` are token ids. Takes time in proportion to them.

    Raises:
        InvalidRequest: a prompt is empty, too long, or holds an id outside the vocabulary; or a
            stop token does not exist.
    """
    requests: list[GenerateRequest] = []
    for index, prompt in enumerate(prompts):
        field = body.prompt_field if len(prompts) == 1 else f"{body.prompt_field}.{index}"
        if not prompt:
            raise InvalidRequest(f"{field}: the prompt is empty; give a token", param=field)
        # The length first: it costs nothing, and bounds what the rest costs.
        max_tokens = choose_max_tokens(len(prompt), body, default_max_tokens, limit)
        check_token_ids(prompt, vocab_size, field)
        prompt_ids = tuple(prompt)
        for choice in range(body.num_choices):
            sampling = body.sampling(max_tokens=max_tokens, choice=choice)
            if not requests:
                check_token_ids(sampling.stop_token_ids, vocab_size, "stop_token_ids")
            requests.append(
                GenerateRequest(
                    request_id=f"{request_id}-{len(requests)}",
                    prompt_ids=prompt_ids,
                    sampling=sampling,
                    trace_context=trace_context,
                    cache_salt=cache_salt,
                )
            )
    return requests


def entry(
    request_id: str,
    terms: Terms,
    requests: Sequence[GenerateRequest],
    *,
    reserved_output: float,
    page_tokens: int,
    seconds_left: float,
    own_deadline: bool = False,
) -> Enter:
    """What the owner of admission is asked for: the KV of each sequence in whole pages, with
    `reserved_output` of its completion limit set aside."""
    asks = []
    for request in requests:
        prompt, limit = len(request.prompt_ids), request.sampling.max_tokens
        whole = -(-(prompt + math.ceil(limit * reserved_output)) // page_tokens) * page_tokens
        asks.append(
            Ask(
                sequence_id=request.request_id,
                prompt_tokens=prompt,
                output_tokens=whole - prompt,
                charge=prompt + limit,
                pools=request.pools,
                affinity=request.affinity,
            )
        )
    return Enter(
        request_id=request_id,
        terms=terms,
        asks=tuple(asks),
        seconds_left=seconds_left,
        own_deadline=own_deadline,
    )


def check_token_ids(ids: Sequence[int], vocab_size: int, field: str) -> None:
    """Raises InvalidRequest for an id that the vocabulary does not have."""
    if not ids:
        return
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"{field}: token id {token} is outside the vocabulary of {vocab_size}; give ids of "
                f"0 to {vocab_size - 1}",
                param=field,
            )


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
