"""The adapter of the embedded engine: its step loop runs in a thread, its clients in asyncio.

The two sides share only an inbox of commands, and callbacks posted to the event loop. The thread
alone touches the engine and the event loop alone touches the mailboxes, so neither needs a lock. A
step that fails ends every request in `Done("error")`; `check` raises from then on, and the replica
is replaced. A step that does not end shows in `stalled_s`. Batching, KV pages and sampling are in
deepseek/engine, not here.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineLoad, EngineOptions
from deepseek.engine.process import num_cores, share_of_cores
from deepseek.errors import RequestError
from serve_app.config import EmbeddedOptions
from serve_app.engines.protocol import (
    Done,
    EngineInfo,
    Event,
    GenerateRequest,
    LoadProgress,
    PromptLogprobs,
    Tokens,
)
from serve_app.engines.stall import StallClock
from serve_app.engines.steps import to_engine, to_events
from serve_app.errors import EngineUnavailable

log = logging.getLogger("ray.serve")

#: `EngineInfo.context_name` where the engine's context ends before the model's.
DENSE_CONTEXT = "dense context (index_topk; this engine has no sparse attention)"
#: Seconds that `shutdown` waits for the step under way. The thread is a daemon: one that hangs does
#: not keep the process.
JOIN_S = 5.0


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


class _Stop:
    """Ends the step loop."""


@dataclass(slots=True)
class _Mailbox:
    """The events of one request, on the event loop. `produced` counts its tokens so far, those of
    another replica included."""

    prompt_tokens: int
    produced: int = 0
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    ended: bool = False

    def put(self, item: Event | Exception) -> None:
        """Add an event, unless the request has ended: an abort may overtake the tokens of the step
        under way."""
        if self.ended:
            return
        self.ended = not isinstance(item, PromptLogprobs | Tokens)
        if isinstance(item, Tokens):
            self.produced += len(item.token_ids)
        self.events.put_nowait(item)


class EmbeddedEngine:
    """Implements `Engine`. `start` must be awaited on the event loop that later generates.

    `cpus` are what the replica has reserved: where the options say no number of threads, they do.
    `load` opens the engine directory; tests pass the `load` of an engine that fails.
    """

    def __init__(
        self,
        options: EmbeddedOptions,
        load: Callable[[Path, EngineOptions], LLMEngine] = LLMEngine.load,
        join_s: float = JOIN_S,
        *,
        cpus: float | None = None,
    ) -> None:
        self._options = options
        self._cpus = cpus
        self._open = load
        self._join_s = join_s
        self._directory = options.directory
        self._mailboxes: dict[str, _Mailbox] = {}
        self._inbox: queue.SimpleQueue[GenerateRequest | _Abort | _Stop] = queue.SimpleQueue()
        self._stall = StallClock()
        self._failed = False
        self._stopped = False

    async def start(self) -> EngineInfo:
        self._loop = asyncio.get_running_loop()
        options = _engine_options(self._options, self._cpus)
        self._engine = await asyncio.to_thread(self._open, self._directory, options)
        self._load = self._engine.current_load()
        self._thread = threading.Thread(target=self._run_steps, name="engine-steps", daemon=True)
        self._thread.start()
        identity = self._engine.identity
        named: dict[str, Any] = {}
        if self._engine.is_cut_to_dense:
            named["context_name"] = DENSE_CONTEXT
            log.warning(
                "this engine serves at most %d tokens of context, not the model's %d: beyond "
                "index_topk tokens attention is sparse, which it does not compute",
                self._engine.max_model_len, self._engine.config.max_position_embeddings,
            )  # fmt: skip
        cached_tokens = self._load.kv_tokens_total + identity.page_tokens  # with the page of zeros
        return EngineInfo(
            max_model_len=self._engine.max_model_len,
            kv_tokens_total=self._load.kv_tokens_total,
            recipe=identity.recipe,
            artifact_digest=identity.artifact_digest,
            engine="embedded",
            **named,
            engine_digest=identity.engine_digest,
            kv_cache=identity.kv_cache,
            max_running=options.max_batch_size,
            page_tokens=identity.page_tokens,
            continues=True,
            kv_bytes_per_token=self._engine.allocated_bytes()["kv_cache"] / cached_tokens,
        )

    def loading(self) -> LoadProgress | None:
        return LoadProgress("loading the weights")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self._raise_if_failed()
        mailbox = _Mailbox(len(request.prompt_ids), produced=len(request.output_ids))
        self._mailboxes[request.request_id] = mailbox
        self._submit(request)
        try:
            while True:
                item = await mailbox.events.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, Done):
                    return
        finally:
            del self._mailboxes[request.request_id]
            if not mailbox.ended:
                self._submit(_Abort(request.request_id))

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            mailbox = self._mailboxes.get(request_id)
            if mailbox is not None and not mailbox.ended:
                self._submit(_Abort(request_id))
                mailbox.put(Done("abort", mailbox.prompt_tokens, mailbox.produced))

    def load(self) -> EngineLoad:
        return self._load

    async def check(self) -> None:
        self._raise_if_failed()

    def stalled_s(self) -> float:
        return self._stall.stalled_s()

    async def shutdown(self) -> None:
        self._stopped = True
        for mailbox in self._mailboxes.values():
            mailbox.put(EngineUnavailable("the engine that held this request is stopping; retry"))
        if hasattr(self, "_thread"):
            self._submit(_Stop())
            await asyncio.to_thread(self._thread.join, self._join_s)
            if self._thread.is_alive():
                log.error("the engine's step has not ended in %g s; left behind", self._join_s)

    def _submit(self, command: GenerateRequest | _Abort | _Stop) -> None:
        self._stall.submitted()
        self._inbox.put(command)

    def _raise_if_failed(self) -> None:
        if self._stopped:
            raise EngineUnavailable("the engine is stopping; retry later")
        if self._failed:
            raise EngineUnavailable("the engine has failed and is being replaced; retry later")

    # The methods from here to `_deliver` run in the step thread.

    def _run_steps(self) -> None:
        try:
            while self._engine.failure is None and self._take_commands():
                if self._engine.has_work:
                    self._step()
                self._load = self._engine.current_load()
                self._stall.stepped(has_work=self._engine.has_work)
        except BaseException:  # whatever ends the thread ends the requests, each exactly once
            log.exception("the engine's step loop failed")
            self._fail()
        else:
            if self._engine.failure is not None:  # the engine has logged it
                self._fail()

    def _fail(self) -> None:
        self._failed = True
        self._post(self._fail_all)

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            # a step that outlived the shutdown: nobody waits for it

    def _take_commands(self) -> bool:
        """Execute the commands in the inbox; an idle engine blocks for one. False ends the loop."""
        idle = not self._engine.has_work
        while True:
            try:
                command = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            idle = False
            self._stall.taken()
            if isinstance(command, _Stop):
                return False
            if isinstance(command, _Abort):
                self._engine.abort(command.request_id)
            else:
                self._add(command)

    def _add(self, request: GenerateRequest) -> None:
        try:
            self._engine.add_request(to_engine(request))
        except RequestError as error:
            refusal: list[tuple[str, Event | Exception]] = [(request.request_id, error)]
            self._post(self._deliver, refusal)

    def _step(self) -> None:
        items: list[tuple[str, Event | Exception]] = []
        for output in self._engine.step():
            items.extend((output.request_id, event) for event in to_events(output))
        if items:  # one callback per step, not one per request
            self._post(self._deliver, items)

    # These run on the event loop.

    def _deliver(self, items: list[tuple[str, Event | Exception]]) -> None:
        for request_id, item in items:
            if (mailbox := self._mailboxes.get(request_id)) is not None:
                mailbox.put(item)

    def _fail_all(self) -> None:
        for mailbox in self._mailboxes.values():
            mailbox.put(
                Done(
                    "error",
                    mailbox.prompt_tokens,
                    mailbox.produced,
                    error="the engine failed while it worked on this request; retry",
                    retryable=True,
                )
            )


def _engine_options(config: EmbeddedOptions, cpus: float | None) -> EngineOptions:
    """The configured options; a setting that is None keeps the engine's default. `cpus` None: it
    runs in no replica."""
    num_threads = config.num_threads
    if num_threads is None and cpus is not None:
        num_threads = share_of_cores(cpus)
        if num_threads < int(cpus):
            log.warning(
                "the replica reserves %g CPUs and may run on %d; the engine computes with %d "
                "threads: lower cpus, or set engine.num_threads", cpus, num_cores(), num_threads,
            )  # fmt: skip
    given: dict[str, Any] = {
        "kv_cache": config.kv_cache,
        "max_kv_tokens": config.kv_tokens,
        "max_model_len": config.max_model_len,
        "max_batch_size": config.max_batch_size,
        "max_batched_tokens": config.max_batched_tokens,
        "num_threads": num_threads,
        "prefix_cache": config.prefix_cache,
        "kernels": config.kernels,
        "huge_pages": config.huge_pages,
    }
    return EngineOptions(**{name: value for name, value in given.items() if value is not None})
