"""The adapter of an engine that runs in a process of its own: implements `Engine`.

Tokens come as ids and everything else of an answer is made here (text.py). A request is aborted
once, when its client leaves or a stop string ends it; what the engine still sends is dropped.
When the worker, one of its ranks or the engine in it dies or hangs (health.py), every request ends
in a retryable error, the processes are killed, and `check` raises: the replica is then replaced.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec

from deepseek.engine.limits import RequestLimits
from deepseek.engine.logprob_names import LogprobNamer
from deepseek.engine.options import EngineLoad
from deepseek.errors import DeployError, RequestError
from serve_app.engine_sections import RemoteOptions
from serve_app.engines.protocol import Done, EngineInfo, Event, GenerateRequest, LoadProgress
from serve_app.engines.remote.counts import Counts
from serve_app.engines.remote.health import Pulse
from serve_app.engines.remote.launch import Deadlines, Launch, Plan
from serve_app.engines.remote.loading import Loader, Worker
from serve_app.engines.remote.options import launch_of, plan_of
from serve_app.engines.remote.requests import Requests
from serve_app.engines.remote.text import Answer, to_worker
from serve_app.engines.worker import processes
from serve_app.engines.worker.messages import (
    End,
    Fatal,
    FromWorker,
    Load,
    Output,
    Ping,
    Pong,
    Stop,
)
from serve_app.errors import EngineUnavailable

log = logging.getLogger("ray.serve")

#: Seconds between two looks at the pulse, at most.
_LOOK_S = 0.5
#: Seconds for the engine's first figures to come, from the first request on.
_FIGURES_S = 3.0
#: Seconds from the end of an engine's shutdown to that of its process.
_EXIT_S = 2.0
#: Prompts of the requests before the first one of a client, in tokens, and their answers.
_WARM_UP = ((1, 1), (512, 4))
#: Salt of requests that have none: engines differ in what an empty one means.
_NO_SALT = "intserve"
#: What a client reads of an engine that failed, as of the embedded one.
_FAILED = "the engine failed while it worked on this request; retry"


class RemoteEngine:
    """One engine behind a worker. `launch` and `plan` are made from the options by default; tests
    pass a worker of their own. All methods run on the loop that awaited `start`.

    `GenerateRequest.output_ids` go to the engine as the end of its prompt. A greedy answer goes on
    as it would have, up to the engine's own rounding; a sampled one is drawn anew from there.
    """

    def __init__(
        self,
        options: RemoteOptions,
        launch: Launch | None = None,
        *,
        plan: Callable[[RemoteOptions], Plan] = plan_of,
        deadlines: Deadlines | None = None,
    ) -> None:
        self._options = options
        self._launch = launch_of(options) if launch is None else launch
        self._make_plan = plan
        self._deadlines = deadlines or Deadlines(load_s=options.load_timeout_s)
        self._loader: Loader | None = None
        self._worker: Worker | None = None
        self._pids: dict[int, int | None] = {}
        self._requests = Requests(self._send, ())
        self._counts = Counts()
        self._failure: str | None = None
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> EngineInfo:
        plan = self._plan = await asyncio.to_thread(self._make_plan, self._options)
        self._loader = Loader(plan, self._launch, self._deadlines)
        self._worker, ready = await self._loader.load()
        self._pids = {pid: processes.start_of(pid) for pid in ready.pids}
        self._requests = Requests(self._send, plan.end_token_ids)
        self._counts.ready(plan, ready)
        self._limits = RequestLimits(
            max_model_len=min(plan.max_model_len, ready.max_model_len or plan.max_model_len),
            vocab_size=plan.vocab_size,
            has_tokenizer=plan.tokenizer is not None,
            is_cut_to_dense=False,
        )
        self._namer = LogprobNamer(plan.tokenizer)
        self._pulse = Pulse(self._deadlines, time.monotonic())
        self._worker.listen(self._receive)
        self._loader.progress = LoadProgress("warming up")
        try:
            await self._warm_up()
        except BaseException:
            self._stopping = True
            await self._worker.end(self._deadlines.kill_s)
            raise
        self._tasks.append(asyncio.create_task(self._watch()))
        return EngineInfo(
            max_model_len=self._limits.max_model_len,
            kv_tokens_total=self._counts.load((), time.monotonic()).kv_tokens_total,
            recipe=plan.recipe,
            artifact_digest=plan.artifact_digest,
            engine=plan.engine,
            engine_digest=plan.engine_digest,
            kv_cache=plan.kv_cache,
            max_running=self._counts.max_running,
            page_tokens=self._counts.page_tokens,
            continues=True,
            kv_bytes_per_token=plan.kv_bytes_per_token,
        )

    def loading(self) -> LoadProgress | None:
        return None if self._loader is None else self._loader.progress

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self._raise_if_failed()
        if request.request_id in self._requests.named:
            raise RequestError(f"request id {request.request_id!r} is in use; choose another")
        answer = Answer(
            request,
            limits=self._limits,
            tokenizer=self._plan.tokenizer,
            namer=self._namer,
            end_token_ids=self._plan.end_token_ids,
            now_s=time.monotonic(),
        )
        if answer.reason is not None:  # nothing is left to compute
            for event in answer.replayed(time.monotonic()):
                yield event
            return
        item = self._requests.new(answer)
        self._requests.named[request.request_id] = item
        self._requests.submit(
            item,
            to_worker(
                request,
                item.number,
                room=answer.room,
                end_token_ids=self._plan.end_token_ids,
                salt=request.cache_salt or _NO_SALT,
            ),
        )
        try:
            while True:
                told = await item.events.get()
                if isinstance(told, Exception):
                    raise told
                yield told
                if isinstance(told, Done):
                    return
        finally:
            del self._requests.named[request.request_id]
            if not (item.ended and answer.engine_ends):
                self._requests.abort(item)

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            item = self._requests.named.get(request_id)
            if item is not None and item.answer is not None and not item.ended:
                item.put(item.answer.abort(time.monotonic()))
                self._requests.abort(item)

    def load(self) -> EngineLoad:
        return self._counts.load(self._requests.answers, time.monotonic())

    async def check(self) -> None:
        self._raise_if_failed()

    def stalled_s(self) -> float:
        return self._requests.stall.stalled_s()

    async def shutdown(self) -> None:
        self._stopping = True
        for item in self._requests:
            item.put([EngineUnavailable("the engine that held this request is stopping; retry")])
        for task in self._tasks:
            if self._failure is None:
                task.cancel()
            else:
                await task  # which kills
        worker = self._worker
        if worker is None:
            if self._loader is not None:
                await self._loader.stop()
            return
        if self._failure is not None:
            return
        worker.channel.send(Stop())
        if await worker.process.wait(self._deadlines.shutdown_s + _EXIT_S):
            log.info("the engine's process %s", worker.process.exit)  # a signal is no fault now
        else:
            log.error("the engine has not stopped in %g s; killed", self._deadlines.shutdown_s)
        await worker.end(self._deadlines.kill_s)

    def _raise_if_failed(self) -> None:
        if self._stopping:
            raise EngineUnavailable("the engine is stopping; retry later")
        if self._failure is not None:
            raise EngineUnavailable("the engine has failed and is being replaced; retry later")

    async def _warm_up(self) -> None:
        """Have it compute a short and a longer prompt, so that no client waits for what an engine
        does at its first request. Its first figures come with them.

        Raises:
            DeployError: it does not.
        """
        salt = f"intserve-warm-up-{secrets.token_hex(8)}"
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._deadlines.warm_up_s):
                for length, answer in _WARM_UP:
                    room = min(length, self._limits.max_model_len - answer)
                    if room > 0 and self._failure is None:
                        await self._requests.ask(room, answer, salt)
        except TimeoutError as error:
            self._failure = "warm-up"
            raise self._unready(
                f"it is loaded, but has not answered a first request in "
                f"{self._deadlines.warm_up_s:g} s"
            ) from error
        if self._failure is not None:
            raise self._unready(f"it is loaded, but at the first request {self._failure}")
        while self._counts.kv_tokens_total is None:
            if time.monotonic() - began > _FIGURES_S:
                most = self._counts.max_running * self._limits.max_model_len
                log.warning(
                    "the engine does not say how large its KV cache is; counting with the %d "
                    "tokens of %d of the longest requests", most, self._counts.max_running,
                )  # fmt: skip
                self._counts.assume(most)
                break
            await asyncio.sleep(0.05)

    def _send(self, message: msgspec.Struct) -> None:
        if self._worker is not None:
            self._worker.channel.send(message)

    def _unready(self, what: str) -> DeployError:
        return DeployError(f"{self._plan.directory} does not serve in {self._plan.engine}: {what}")

    # What comes from the worker.

    def _receive(self, message: FromWorker | str) -> None:
        now = time.monotonic()
        if isinstance(message, Output):
            self._progress(now)
            self._take(message, now)
        elif isinstance(message, End):
            self._end(message, now)
            self._progress(now)
        elif isinstance(message, Load):
            if self._counts.told(message, now):
                self._pulse.stepped(now)
                self._requests.progress()
        elif isinstance(message, Pong):
            self._pulse.pong(message.n)
            if not message.healthy:
                self._fail(message.why or "it says that it is not healthy")
        elif isinstance(message, Fatal):
            self._fail(message.why)
        elif isinstance(message, str):
            self._fail(message, has_ended=True)
        else:
            log.warning("the engine's worker said %s, late", type(message).__name__)

    def _progress(self, now_s: float) -> None:
        self._pulse.progress(now_s)
        self._requests.progress()

    def _take(self, output: Output, now_s: float) -> None:
        item = self._requests.get(output.id)
        if item is None or item.answer is None:
            return
        answer = item.answer
        if answer.reason is not None:
            self._requests.abort(item)  # it goes on after the end that it was given
            return
        is_first = answer.began_s is None
        item.put(answer.take(output, now_s))
        if is_first and answer.began_s is not None:
            self._counts.started(answer)
        if answer.reason is not None and not answer.engine_ends:
            self._requests.abort(item)

    def _end(self, end: End, now_s: float) -> None:
        item = self._requests.close(end.id)
        if item is None:
            return
        answer = item.answer
        if answer is None:
            if end.error is not None:
                self._fail(f"it failed on a request of its own: {end.error}")
            return
        if end.refused and answer.began_s is None:
            item.put([RequestError(f"the engine refuses this request: {end.error}")])
            return
        item.put(answer.end(end, now_s))
        if answer.is_unnamed:
            self._counts.unnamed += 1
            if self._counts.unnamed in (1, 10, 100) or self._counts.unnamed % 1000 == 0:
                log.warning(
                    "the engine ended a request without a reason (%r), for the %d. time",
                    end.finish_reason, self._counts.unnamed,
                )  # fmt: skip

    # Its life and its end.

    async def _watch(self) -> None:
        """Ping it, send canaries, and give it up when it is dead or hangs; when nobody watches it
        any more, too."""
        limits = self._deadlines
        look_s = min(_LOOK_S, *(s / 4 for s in (limits.quiet_s, limits.canary_s, limits.pong_s)))
        canary: asyncio.Task[None] | None = None
        try:
            while self._failure is None:
                await asyncio.sleep(look_s)
                now = time.monotonic()
                number = self._pulse.next_ping(now)
                if number is not None:
                    self._send(Ping(number))
                if self._pulse.needs_canary(now, has_work=bool(self._requests)):
                    canary = asyncio.create_task(self._send_canary())
                fault = self._pulse.fault(now) or self._dead_rank()
                if fault is not None:
                    self._fail(fault)
        except Exception as error:
            log.exception("the watch over the engine failed")
            self._fail(f"the watch over it failed ({type(error).__name__})")
        finally:
            if canary is not None:
                canary.cancel()

    async def _send_canary(self) -> None:
        """One token of one token, under a salt of its own: unsalted ones have crashed engines."""
        await self._requests.ask(1, 1, f"intserve-canary-{secrets.token_hex(8)}")
        self._pulse.canary_ended(time.monotonic())

    def _dead_rank(self) -> str | None:
        """The worker watches its ranks too, unless it hangs itself."""
        for pid, start in self._pids.items():
            if processes.start_of(pid) != start:
                return f"its rank process {pid} has ended"
        return None

    def _fail(self, why: str, *, has_ended: bool = False) -> None:
        """Give the engine up: tell every client, kill every process. Of a worker that has ended
        it is told how, which is known a moment later."""
        if self._failure is not None or self._stopping:
            return
        self._failure = why
        now = time.monotonic()
        for item in self._requests:
            item.over.set()
            if item.answer is not None and item.answer.reason is None:
                item.put(item.answer.fail(_FAILED, now, retryable=True))
        assert self._worker is not None
        if not has_ended:
            self._worker.process.kill_at_once()
        self._tasks.append(asyncio.create_task(self._bury(self._worker, why, has_ended)))

    async def _bury(self, worker: Worker, why: str, has_ended: bool) -> None:
        if has_ended:
            why = self._failure = await worker.ending(why)
        lines = "\n  ".join(["", *worker.process.last_lines[-10:]])
        log.error("the engine is given up: %s. It said last:%s", why, lines)
        await worker.end(self._deadlines.kill_s)
