"""From the event streams of a request's choices to its answer; one path for streamed and whole.

`open_stream` starts every choice and awaits the first event of any of them, so that a refusal, an
overload or a dead engine before it is still an HTTP status: all choices or none. What is wrong with
a choice later is reported in the stream, because a choice that waits for a place in the batch must
not hold back the text of those that have one. `MergedStream` yields the events of all choices in
order of arrival; each choice ends in exactly one `Done`, whatever happens to its engine or to the
deadline. `Answer.sse` makes events of them, `Answer.collect` one object.
service.py calls both. OpenAI's words are in answers.py; which replica answers is not known here.

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
from typing import Any, Protocol

from serve_app.engines.protocol import Done, Event, GenerateRequest, Placed, PromptLogprobs, Tokens
from serve_app.errors import ApiError, DeadlineExceeded, to_api_error
from serve_app.openai.answers import ChoiceState, Format, usage
from serve_app.openai.json_text import make_text

log = logging.getLogger(__name__)

#: Engine's finish reason -> OpenAI's. OpenAI has none for "abort" and "error".
FINISH_REASONS = {"stop": "stop", "length": "length"}

#: The running pumps: the event loop itself holds only weak references to tasks.
_pumps: set[asyncio.Task[None]] = set()


class Source(Protocol):
    """Where events come from: the actor hop in service, an engine itself in tests. `generate` is an
    async generator; its `aclose` aborts the request."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]: ...


class MergedStream:
    """The events of several choices in order of arrival. Each choice ends in exactly one `Done`."""

    def __init__(
        self,
        source: Source,
        requests: Sequence[GenerateRequest],
        deadline: float,
        on_close: Callable[[str], None] = lambda request_id: None,
    ):
        """`deadline` is on the running loop's clock. `on_close` is called once for each request
        when nothing of it is wanted any more, whether or not it has ended."""
        self._on_close = on_close
        self._queue: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()
        self._requests = requests
        self._deadline = deadline
        self._open = set(range(len(requests)))
        self._closed = False
        self._produced = [0] * len(requests)
        #: Errors of choices that failed, by index; complete once iteration has ended.
        self.errors: dict[int, ApiError] = {}
        #: Taken from the queue and not yet passed on.
        self._arrived: deque[tuple[int, Event | BaseException]] = deque()
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
                    self._queue.put_nowait((index, event))
                    if isinstance(event, Done):
                        return
            raise RuntimeError("the engine's stream ended without a final event")
        except Exception as error:
            self._queue.put_nowait((index, error))

    async def open(self) -> None:
        """Await the first event of any choice. Events that are there by then are looked at too, so
        that a refusal which came together with the first event refuses the request.

        Raises:
            ApiError: a choice was refused or its engine failed before that, or the deadline passed.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                while True:
                    self._arrived.append(await self._queue.get())
                    if not isinstance(self._arrived[-1][1], Placed):
                        break
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed before any token") from None
        self._take_arrived()
        started: set[int] = set()
        for index, event in self._arrived:
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
                await self._wait()
            index, event = self._arrived.popleft()
            reported = self._reported(index, event)
            if index in self._open:
                yield index, self._noted(index, reported)

    async def _wait(self) -> None:
        """Await an event, and take what else is there."""
        try:
            async with asyncio.timeout_at(self._deadline):
                self._arrived.append(await self._queue.get())
        except TimeoutError:
            index = min(self._open)
            self._tasks[index].cancel()
            late = DeadlineExceeded("the request's deadline passed; the answer is incomplete")
            self._arrived.append((index, late))
        self._take_arrived()

    def _take_arrived(self) -> None:
        while not self._queue.empty():
            self._arrived.append(self._queue.get_nowait())

    def ends_next(self, index: int) -> bool:
        """Whether the next event is there already and is the normal end of this choice."""
        if not self._arrived:
            self._take_arrived()
        if not self._arrived or self._arrived[0][0] != index:
            return False
        event = self._arrived[0][1]
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
        for request in self._requests if not self._closed else ():
            self._on_close(request.request_id)
        self._closed = True


def _engine_failed(done: Done) -> ApiError:
    return ApiError(done.error or "the engine gave up this request", code="engine_failed")


def _logged(error: BaseException) -> ApiError:
    """The error as an ApiError; the traceback of an unforeseen one goes to the log."""
    known = to_api_error(error)
    if type(known) is ApiError and known is not error:
        log.error("generation failed", exc_info=error)
    return known


async def open_stream(
    source: Source,
    requests: Sequence[GenerateRequest],
    deadline: float,
    on_close: Callable[[str], None] = lambda request_id: None,
) -> MergedStream:
    """Start every choice and await the first event; see `MergedStream.open` for the errors."""
    merged = MergedStream(source, requests, deadline, on_close)
    try:
        await merged.open()
    except BaseException:
        merged.close()
        raise
    return merged


class Answer:
    """The answer of one request: passes every event to `observe`, once, and into its choice."""

    def __init__(
        self, merged: MergedStream, form: Format, num_choices: int, observe: Callable[[Event], None]
    ) -> None:
        self.merged = merged
        self.form = form
        self.choices = [form.choice(index) for index in range(num_choices)]
        self._observe = observe

    async def _events(self) -> AsyncIterator[tuple[ChoiceState, Event]]:
        async for index, event in self.merged:
            self._observe(event)
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
            "usage": usage(self.choices, prompt_tokens),
            **self.form.extras(self.choices),
        }

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
            if isinstance(event, PromptLogprobs):
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
            yield _frame({**envelope, "choices": [], "usage": usage(self.choices, prompt_tokens)})
        yield b"data: [DONE]\n\n"


def _frame(payload: dict[str, Any]) -> bytes:
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
