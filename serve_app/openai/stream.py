"""From the event streams of a request's choices to its answer; one path for streamed and whole.

`open_stream` starts every choice and awaits the first event of any of them, so that a refusal, an
overload or a dead engine before it is still an HTTP status: all choices or none. What is wrong with
a choice later is reported in the stream, because a choice that waits for a place in the batch must
not hold back the text of those that have one. `MergedStream` yields the events of all choices in
order of arrival; each choice ends in exactly one `Done`, whatever happens to its engine or to the
deadline. `Answer.sse` makes events of them, `Answer.collect` one object.
service.py calls both. OpenAI's words are in answers.py; which replica answers is not known here.

Engines are never held back: what a client has not read yet waits here, counted (`unread.py`). Above
JOIN_ABOVE bytes the tokens of a choice that neighbor each other are joined.

Cleaning up is synchronous: `close` only cancels the pump tasks, and each pump closes its own engine
stream. A disconnect arrives as a cancellation, under which it is not reliable to await anything.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from serve_app.engines.events import event_bytes, logprob_bytes, merge_events
from serve_app.engines.protocol import Done, Event, GenerateRequest, Placed, PromptLogprobs, Tokens
from serve_app.errors import ApiError, DeadlineExceeded, to_api_error
from serve_app.openai.answers import ChoiceState, Format, usage
from serve_app.openai.json_text import make_text

log = logging.getLogger(__name__)

#: Engine's finish reason -> OpenAI's. OpenAI has none for "abort" and "error".
FINISH_REASONS = {"stop": "stop", "length": "length"}

#: Unread bytes of a request above which its tokens are joined, and events that one joins at most:
#: a message of them stays small.
JOIN_ABOVE = 64 * 1024
_MAX_JOINED = 64

#: The running pumps: the event loop itself holds only weak references to tasks.
_pumps: set[asyncio.Task[None]] = set()


class Source(Protocol):
    """Where events come from: the actor hop in service, an engine itself in tests. `generate` is an
    async generator; its `aclose` aborts the request."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]: ...


@dataclass(slots=True)
class _Arrived:
    """Of the choice `index`, unread: an event, several `Tokens` to be joined, or an exception."""

    index: int
    events: list[Any]
    num_bytes: int


class MergedStream:
    """The events of several choices in order of arrival. Each choice ends in exactly one `Done`."""

    def __init__(
        self,
        source: Source,
        requests: Sequence[GenerateRequest],
        deadline: float,
        *,
        on_close: Callable[[str, int], None] = lambda request_id, used_tokens: None,
        on_placed: Callable[[int, Placed, int], None] = lambda index, placed, num_tokens: None,
        note_unread: Callable[[int], None] = lambda num_bytes: None,
    ):
        """`deadline` is on the running loop's clock. `on_close` is called once for each request
        when nothing of it is wanted any more, whether or not it has ended, with the tokens of its
        prompt and completion so far, 0 where it never ran; `on_placed` as soon as a choice has a
        replica, with the tokens that have come of it; `note_unread` with every change of the bytes
        that wait here."""
        self._on_close = on_close
        self._on_placed = on_placed
        self._note_unread = note_unread
        self._requests = requests
        self._deadline = deadline
        self._open = set(range(len(requests)))
        self._closed = False
        self._produced = [0] * len(requests)  # of what was passed on
        self._used = [0] * len(requests)
        #: Errors of choices that failed, by index; complete once iteration has ended.
        self.errors: dict[int, ApiError] = {}
        self._arrived: deque[_Arrived] = deque()
        self._news = asyncio.Event()
        #: The last of each choice in `_arrived`, if it is of tokens.
        self._tails: dict[int, _Arrived] = {}
        self._num_bytes = 0
        self._tasks = [
            asyncio.create_task(self._pump(source, index, request))
            for index, request in enumerate(requests)
        ]
        for task in self._tasks:
            _pumps.add(task)
            task.add_done_callback(_pumps.discard)

    @property
    def num_tokens(self) -> int:
        """Tokens that all choices have generated so far."""
        return sum(self._produced)

    async def _pump(self, source: Source, index: int, request: GenerateRequest) -> None:
        try:
            async with aclosing(source.generate(request)) as events:
                async for event in events:
                    if isinstance(event, Placed):
                        num_tokens = max(0, self._used[index] - len(request.prompt_ids))
                        self._on_placed(index, event, num_tokens)
                    self._put(index, event)
                    if isinstance(event, Done):
                        return
            raise RuntimeError("the engine's stream ended without a final event")
        except Exception as error:
            self._put(index, error)

    def _put(self, index: int, event: Event | BaseException) -> None:
        if self._closed:
            return
        if not isinstance(event, BaseException):
            self._used[index] = self._used[index] or len(self._requests[index].prompt_ids)
        if isinstance(event, Tokens):
            self._used[index] += len(event.token_ids)
        size = event_bytes(event)
        self._count(size)
        tail = self._tails.get(index) if isinstance(event, Tokens) else None
        if tail is not None and self._num_bytes > JOIN_ABOVE and len(tail.events) < _MAX_JOINED:
            tail.events.append(event)
            tail.num_bytes += size
            return
        arrived = _Arrived(index, [event], size)
        if isinstance(event, Tokens):
            self._tails[index] = arrived
        else:
            self._tails.pop(index, None)
        self._arrived.append(arrived)
        self._news.set()

    def _take(self) -> tuple[int, Event | BaseException]:
        """The next event, which is there."""
        arrived = self._arrived.popleft()
        if self._tails.get(arrived.index) is arrived:
            del self._tails[arrived.index]
        self._count(-arrived.num_bytes)
        events = arrived.events
        return arrived.index, events[0] if len(events) == 1 else merge_events(events)[0]

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._note_unread(num_bytes)

    async def _more(self) -> None:
        """Await an event beyond those that are there."""
        self._news.clear()
        async with asyncio.timeout_at(self._deadline):
            await self._news.wait()

    async def open(self) -> None:
        """Await the first event of any choice. Events that are there by then are looked at too, so
        that a refusal which came together with the first event refuses the request.

        Raises:
            ApiError: a choice was refused or its engine failed before that, or the deadline passed.
        """
        try:
            while all(isinstance(arrived.events[0], Placed) for arrived in self._arrived):
                await self._more()
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed before any token") from None
        started: set[int] = set()
        for index, event in [(arrived.index, arrived.events[0]) for arrived in self._arrived]:
            if index not in started and not isinstance(event, Placed):
                if isinstance(event, BaseException):
                    raise _logged(event)
                if isinstance(event, Done) and event.reason not in FINISH_REASONS:
                    raise _engine_failed(event)
            if not isinstance(event, Placed):
                started.add(index)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while self._open:
            if not self._arrived:
                try:
                    await self._more()
                except TimeoutError:
                    self._end_late(min(self._open))
            index, event = self._take()
            reported = self._reported(index, event)
            if index in self._open:
                yield index, self._noted(index, reported)

    def _end_late(self, index: int) -> None:
        self._tasks[index].cancel()
        late = DeadlineExceeded("the request's deadline passed; the answer is incomplete")
        self._put(index, late)

    def ends_next(self, index: int) -> bool:
        """Whether the next event is there already and is the normal end of this choice."""
        if not self._arrived or self._arrived[0].index != index:
            return False
        event = self._arrived[0].events[0]
        return isinstance(event, Done) and event.reason in FINISH_REASONS

    def _reported(self, index: int, event: Event | BaseException) -> Event:
        """The event; for an exception, the final event of a choice that failed."""
        if isinstance(event, BaseException):
            return self._failed(index, _logged(event))
        return event

    def _noted(self, index: int, event: Event) -> Event:
        if isinstance(event, Done):
            self._open.discard(index)
            if event.reason not in FINISH_REASONS:
                self.errors.setdefault(index, _engine_failed(event))
        elif isinstance(event, Tokens):
            self._produced[index] += len(event.token_ids)
        return event

    def _failed(self, index: int, error: ApiError) -> Done:
        self.errors[index] = error
        prompt_tokens = len(self._requests[index].prompt_ids)
        return Done("error", prompt_tokens, self._produced[index], error=str(error))

    def close(self) -> None:
        """Abort the choices that still run. Idempotent; safe after a normal end."""
        for task in self._tasks:
            task.cancel()
        if self._closed:
            return
        self._closed = True
        self._arrived.clear()
        self._tails.clear()
        self._count(-self._num_bytes)
        for request, used_tokens in zip(self._requests, self._used, strict=True):
            self._on_close(request.request_id, used_tokens)


def _engine_failed(done: Done) -> ApiError:
    return ApiError(done.error or "the engine gave up this request", code="engine_failed")


def _logged(error: BaseException) -> ApiError:
    """The error as an ApiError; the traceback of an unforeseen one goes to the log."""
    known = to_api_error(error)
    if type(known) is ApiError and known is not error:
        log.error("generation failed", exc_info=error)
    return known


async def open_stream(
    source: Source, requests: Sequence[GenerateRequest], deadline: float, **hooks: Any
) -> MergedStream:
    """Start every choice and await the first event; see `MergedStream` for the hooks, and its
    `open` for the errors."""
    merged = MergedStream(source, requests, deadline, **hooks)
    try:
        await merged.open()
    except BaseException:
        merged.close()
        raise
    return merged


class Answer:
    """The answer of one request: passes every event to `observe`, once, with the index of its
    choice, and into that."""

    def __init__(
        self,
        merged: MergedStream,
        form: Format,
        num_choices: int,
        observe: Callable[[int, Event], None],
        note_unread: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """`note_unread` gets every change of the bytes that an event stream holds back here."""
        self.merged = merged
        self.form = form
        self.choices = [form.choice(index) for index in range(num_choices)]
        self._observe = observe
        self._note_unread = note_unread

    async def _events(self) -> AsyncIterator[tuple[ChoiceState, Event]]:
        async for index, event in self.merged:
            self._observe(index, event)
            choice = self.choices[index]
            if isinstance(event, Done):
                choice.done = event
            elif isinstance(event, PromptLogprobs):
                choice.prompt_logprobs = event.logprobs
            yield choice, event

    async def collect(self, prompt_tokens: int) -> bytes:
        """The unstreamed answer, as JSON.

        Raises:
            ApiError: a choice ended in an error or was aborted.
        """
        async for choice, event in self._events():
            if isinstance(event, Done):
                if choice.index in self.merged.errors:
                    raise self.merged.errors[choice.index]
            elif isinstance(event, Tokens):
                choice.text.append(event.text)
                choice.logprobs.extend(event.logprobs)
        size = sum(choice.num_logprobs for choice in self.choices)
        return await make_text(lambda: self._whole(prompt_tokens), size)

    def _whole(self, prompt_tokens: int) -> dict[str, Any]:
        done = [(c, FINISH_REASONS[c.done.reason]) for c in self.choices if c.done is not None]
        return {
            **self.form.envelope(streamed=False),
            "choices": [self.form.whole(choice, reason) for choice, reason in done],
            "usage": usage(self.choices, prompt_tokens, self.form.num_choices),
            **self.form.extras(self.choices),
        }

    def _drop_prompt(self, choice: ChoiceState) -> None:
        """Of a prompt's logprobs, which may be many, nothing more is to be written."""
        if choice.prompt_logprobs is not None:
            self._note_unread(-logprob_bytes(choice.prompt_logprobs))
            choice.prompt_logprobs = None

    def _usage_so_far(self, prompt_tokens: int) -> dict[str, Any]:
        completion = self.merged.num_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": prompt_tokens + completion,
        }

    async def sse(
        self, prompt_tokens: int, *, include_usage: bool, continuous_usage: bool = False
    ) -> AsyncIterator[bytes]:
        """Yield server-sent events, the last one `[DONE]`; or, after a failure, the error. With
        `continuous_usage` every event has the usage of the request up to it."""
        envelope = self.form.envelope(streamed=True)
        if include_usage:  # OpenAI: the field is there, and null, on all chunks but the last
            envelope["usage"] = None
        final: dict[str, Any] | None = None
        async for choice, event in self._events():
            if isinstance(event, Placed):
                continue
            if continuous_usage:
                envelope["usage"] = self._usage_so_far(prompt_tokens)
            failed = isinstance(event, Done) and event.reason not in FINISH_REASONS
            if choice.echo is not None and not choice.started and not failed:
                for piece in self.form.prompt_pieces(choice):
                    yield _frame({**envelope, "choices": [piece]})
                    await asyncio.sleep(0)  # a prompt may be long, and other streams wait
                choice.started = True
                self._drop_prompt(choice)
            if isinstance(event, PromptLogprobs):
                self._note_unread(logprob_bytes(event.logprobs))
                if choice.echo is None:
                    self._drop_prompt(choice)  # nothing of an event stream tells it
                continue
            if isinstance(event, Tokens):
                if not event.text and not event.logprobs and choice.started:
                    continue  # held back: the text may yet become a stop string
                piece = self.form.piece(choice, event)
                choice.started = True
                if self.merged.ends_next(choice.index):  # one chunk has the last text and the end
                    final = piece
                    continue
            elif event.reason in FINISH_REASONS:
                reason = FINISH_REASONS[event.reason]
                piece = final or self.form.last(choice, reason)
                piece["finish_reason"], final = reason, None
            else:
                yield _frame(self.merged.errors[choice.index].body())
                return
            yield _frame({**envelope, "choices": [piece]})
        if include_usage:
            counts = usage(self.choices, prompt_tokens, self.form.num_choices)
            yield _frame({**envelope, "choices": [], "usage": counts})
        yield b"data: [DONE]\n\n"


def _frame(payload: dict[str, Any]) -> bytes:
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
