"""What `generate_async` returns: one object that every step mutates.

`outputs[0].token_ids` is one list that grows in place; a reader that keeps it sees it grow. A stop
token is cut off the final list by putting a new list there; its logprobs stay, as in the real one.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

from tensorrt_llm.journal import record, violate


class Logprob(NamedTuple):
    """Natural-log probability of a token, and its place among all, 1 for the likeliest."""

    logprob: float
    rank: int | None = None


@dataclass(slots=True)
class CompletionOutput:
    """The one sequence of a request, cumulative."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    generation_logits: Any = None
    additional_context_outputs: Any = None
    additional_generation_outputs: Any = None
    disaggregated_params: Any = None
    request_perf_metrics: Any = None
    _seen: tuple[int, int, int] = (0, 0, 0)

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self._seen[0] :]

    @property
    def logprobs_diff(self) -> list[Any]:
        return self.logprobs[self._seen[1] :]

    @property
    def text_diff(self) -> str:
        return self.text[self._seen[2] :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What some steps added to a request, from the step loop. `error` ends the iteration."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Any, ...] = ()
    prompt_logprobs: tuple[Any, ...] = ()
    finished: bool = False
    finish_reason: str | None = None
    stop_reason: int | None = None
    stop_tokens: int = 0
    cached_tokens: int | None = None
    timing: Any = None
    no_outputs: bool = False
    error: BaseException | None = None


class RequestOutput:
    """A request under way. Async iteration needs the loop that ran when it was made."""

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: list[int],
        sampling_params: Any,
        *,
        streaming: bool,
        abort: Callable[[int], None],
        show_text: Callable[[list[int]], str],
    ) -> None:
        self.request_id = request_id
        self.streaming = streaming
        self.prompt = None
        self.prompt_token_ids = prompt_token_ids
        self.sampling_params = sampling_params
        self.context_logits = None
        self.cached_tokens = 0
        self.decoding_iter = 0
        self.avg_decoded_tokens_per_iter: float | None = None
        self.metrics_dict: dict[str, float] = {}
        self.disaggregated_params = None
        self._output = CompletionOutput()
        self.outputs = [self._output]
        self._abort = abort
        self._show_text = show_text
        self._aborted = False
        self._done = False
        self.released = False
        self._queue: queue.SimpleQueue[Response] = queue.SimpleQueue()
        self.aqueue: asyncio.Queue[Response] | None = None
        try:
            self.loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self.loop = None
            violate("no_running_loop", "generate_async was called without a running event loop")
        else:
            self.aqueue = asyncio.Queue()

    @property
    def finished(self) -> bool:
        return self._done

    def aborted(self) -> bool:
        return self._aborted

    def abort(self) -> None:
        """Returns at once; the stream ends some steps later. The real one takes it at any time and
        any number of times; the double wants it once, of a request that is not known to be over."""
        record("abort", id=self.request_id, finished=self._done)
        if self._done:
            violate("abort_after_finish", f"request {self.request_id} was over", id=self.request_id)
        if self._aborted:
            violate("aborted_twice", f"request {self.request_id}", id=self.request_id)
        self._aborted = True
        self.released = True
        self._abort(self.request_id)

    def deliver(self, response: Response) -> None:
        """Called by the step loop's thread."""
        if self.loop is None:
            self._queue.put(response)
            return
        try:
            self.loop.call_soon_threadsafe(self.aqueue.put_nowait, response)
        except RuntimeError:
            if not self.loop.is_closed():
                raise

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end, without an event loop. Like the real one it ignores `timeout`."""
        while not self._done:
            self._take(self._queue.get())
        return self

    async def aresult(self) -> RequestOutput:
        while not self._done:
            await self.__anext__()
        return self

    def __await__(self) -> Any:
        return self.aresult().__await__()

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._done:
            raise StopAsyncIteration
        assert self.aqueue is not None, (
            "The asyncio event loop was not present during initialization, so async operations "
            "are not available."
        )
        if asyncio.get_running_loop() is not self.loop:
            violate("second_loop", f"request {self.request_id} is read on another event loop")
        self._take(await self.aqueue.get())
        return self

    def _take(self, response: Response) -> None:
        if response.error is not None:
            self._done = True
            self.released = True
            record("end", id=self.request_id, error=repr(response.error))
            raise response.error
        output = self._output
        self.outputs = [] if response.no_outputs else [output]
        output._seen = (len(output.token_ids), len(output.logprobs), len(output.text))
        output.token_ids.extend(response.token_ids)
        output.logprobs.extend(response.logprobs)
        output.prompt_logprobs.extend(response.prompt_logprobs)
        output.text = self._show_text(output.token_ids)
        if not response.no_outputs:
            self.decoding_iter += 1
        if response.cached_tokens is not None:
            self.cached_tokens = response.cached_tokens
        if not response.finished:
            return
        self._done = True
        self.released = True
        if response.stop_tokens:
            output.token_ids = output.token_ids[: -response.stop_tokens]
        output.finish_reason = response.finish_reason
        output.stop_reason = response.stop_reason
        output.request_perf_metrics = response.timing
        if response.timing is not None:
            timing: SimpleNamespace = response.timing.timing_metrics
            self.metrics_dict = {
                "ttft": (timing.first_token_time - timing.arrival_time).total_seconds(),
                "e2e": (timing.last_token_time - timing.arrival_time).total_seconds(),
            }
        record(
            "end",
            id=self.request_id,
            reason=response.finish_reason,
            tokens=len(output.token_ids),
        )
