"""Events of one stream that wait: joined where they may be, and what they cost in memory; and what
the last ones of several choices say together.

The replica joins what is ready for one message (replica/coalesce.py), the ingress what a client has
not read yet (openai/stream.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

from deepseek.engine.request import TokenLogprob
from serve_app.engines.protocol import Event, PromptLogprobs, Tokens

#: Bytes of an event or of a logprob and of each of its alternatives, of a token id, of anything
#: else: as CPython holds them, rounded up.
_EVENT, _LOGPROB, _ALTERNATIVE, _TOKEN = 200, 300, 240, 40


def merge_events(events: Iterable[Event]) -> tuple[Event, ...]:
    """Join neighboring `Tokens`; the order stays."""
    merged: list[Event] = []
    run: list[Tokens] = []
    for event in events:
        if isinstance(event, Tokens):
            run.append(event)
            continue
        merged.extend(_join(run))
        run = []
        merged.append(event)
    merged.extend(_join(run))
    return tuple(merged)


def _join(run: Sequence[Tokens]) -> list[Event]:
    if len(run) < 2:
        return list(run)
    token_ids = tuple(token for tokens in run for token in tokens.token_ids)
    logprobs = tuple(item for tokens in run for item in tokens.logprobs)
    return [Tokens(token_ids, "".join(tokens.text for tokens in run), logprobs)]


def cached_prompt_tokens(by_choice: Mapping[int, int], num_choices: int) -> int:
    """Tokens of a request's prompts that were found computed, from what each choice found; every
    prompt has `num_choices`, one after the other. Of a prompt the least counts: what its other
    choices found in addition is what this request itself had computed."""
    by_prompt: dict[int, int] = {}
    for index, found in by_choice.items():
        prompt = index // num_choices
        by_prompt[prompt] = min(found, by_prompt.get(prompt, found))
    return sum(by_prompt.values())


def event_bytes(event: object) -> int:
    """Memory that an event takes while it waits, about, in bytes. An exception is an event here."""
    if isinstance(event, Tokens):
        text = sys.getsizeof(event.text)
        return _EVENT + text + _TOKEN * len(event.token_ids) + logprob_bytes(event.logprobs)
    if isinstance(event, PromptLogprobs):
        return _EVENT + logprob_bytes(event.logprobs)
    return _EVENT


def logprob_bytes(logprobs: Sequence[TokenLogprob | None]) -> int:
    """Memory that logprobs take, about, in bytes."""
    alternatives = sum([len(item.top) for item in logprobs if item is not None])
    return _LOGPROB * len(logprobs) + _ALTERNATIVE * alternatives
