"""Why admission refuses: a code, a sentence, and when to come back."""

from __future__ import annotations


class Refused(Exception):
    """A request is refused; becomes a `Refusal` (tickets.py)."""

    def __init__(self, code: str, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.code, self.message, self.retry_after_s = code, message, retry_after_s


def too_long(tokens: int) -> Refused:
    return Refused(
        "context_length_exceeded",
        f"prompt and completion limit are {tokens} tokens together, and no engine here holds so "
        "many; shorten the prompt or ask for fewer tokens",
    )


def too_many_choices(name: str, count: int, limit: int) -> Refused:
    return Refused(
        "invalid_value",
        f"the request has {count} choices and key {name!r} may have {limit} at a time; ask for "
        "fewer",
    )


def too_many_requests(name: str, count: int, limit: int) -> Refused:
    return Refused(
        "too_many_requests",
        f"key {name!r} has {count} choices under way and may have {limit}; retry when some of them "
        "have ended",
    )


def rate_limited(name: str, per_minute: int, unit: str, retry_after_s: int) -> Refused:
    return Refused(
        "rate_limited",
        f"key {name!r} may use {per_minute} {unit} per minute; retry in {retry_after_s} s",
        retry_after_s,
    )


def queue_full(retry_after_s: int) -> Refused:
    return Refused(
        "queue_full",
        f"all engines are busy and the queue is full; retry in {retry_after_s} s",
        retry_after_s,
    )


def waited_too_long(max_wait_s: float, retry_after_s: int) -> Refused:
    return Refused(
        "waited_too_long",
        f"no engine had room for the request within {max_wait_s:g} s; retry in {retry_after_s} s",
        retry_after_s,
    )


def pool_empty(pool: str, retry_after_s: int) -> Refused:
    return Refused(
        "engine_unavailable",
        f"no engine of pool {pool} is ready; retry in {retry_after_s} s",
        retry_after_s,
    )


def too_late() -> Refused:
    return Refused(
        "deadline_exceeded", "the request's deadline passed before an engine had room for it"
    )


def unknown() -> Refused:
    return Refused("engine_unavailable", "the request's place is no longer known; retry", 1)
