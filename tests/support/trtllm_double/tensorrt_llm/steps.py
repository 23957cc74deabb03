"""The step loop: a thread that owns the engine and gives every request its responses.

Requests and aborts come through one inbox. Each iteration asks all ranks, computes as many steps of
the embedded engine as the engine decodes tokens at once (more than one with MTP), and answers
every request in its first iteration, in its last, and in every `stream_interval`-th between.
"""

from __future__ import annotations

import datetime
import queue
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from deepseek.engine.engine import LLMEngine
from deepseek.engine.request import MAX_LOGPROBS, Request, SamplingParams, StepOutput, TokenLogprob
from deepseek.errors import RequestError as EngineRefusal
from tensorrt_llm import faults, stats
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.journal import record
from tensorrt_llm.ranks import RankDied, Ranks
from tensorrt_llm.result import Logprob, RequestOutput, Response

#: Iterations between an abort and its effect.
ABORT_ITERATIONS = 2
#: Seconds between looks at the switches while nothing is to do.
_IDLE_S = 0.02


@dataclass(slots=True)
class _Pending:
    """A request under way, in the step loop."""

    output: RequestOutput
    iterations: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: tuple[Any, ...] = ()
    arrived: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None


class Steps:
    """Owns `engine` and `ranks` from `start` on. `fatal` is what ended it, None while it lives."""

    def __init__(self, engine: LLMEngine, ranks: Ranks, args: SimpleNamespace) -> None:
        self._engine = engine
        self._ranks = ranks
        self._args = args
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._pending: dict[int, _Pending] = {}
        self._aborts: dict[int, int] = {}
        self._iterations = 0
        self._events_made = 0
        self.fatal: BaseException | None = None
        self.is_hung = False
        self.is_shutdown = False
        cache = args.kv_cache_config
        self.blocks = engine.current_load().kv_tokens_total // cache.tokens_per_block
        self.stats = stats.Ring(args.max_stats_len if args.enable_iter_perf_stats else None)
        size = cache.event_buffer_max_size if cache.enable_block_reuse else 0
        self.events = stats.Ring(size or None)
        level = [self.blocks, 0]
        self._event({"type": "created", "num_blocks_per_cache_level": level})
        draft = args.speculative_config
        self._steps = 1 + (draft.num_nextn_predict_layers or 1 if draft is not None else 0)
        self._thread = threading.Thread(target=self._run, name="engine-steps", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, output: RequestOutput, salt: str | None) -> None:
        self._inbox.put(("submit", (output, salt)))
        if self.fatal is not None:
            self._refuse_inbox()

    def abort(self, request_id: int) -> None:
        self._inbox.put(("abort", request_id))

    def stop(self) -> None:
        """Wait for the iteration under way, and end the thread. Blocks for ever if it hangs."""
        self._inbox.put(("stop", None))
        self._thread.join()
        self.is_shutdown = True

    def die(self, error: BaseException) -> None:
        """The engine is dead: every stream raises `error`."""
        self.fatal = error
        record("fatal", error=repr(error))
        for pending in self._pending.values():
            pending.output.deliver(Response(error=error))
        self._pending.clear()
        self._refuse_inbox()

    def _refuse_inbox(self) -> None:
        """Requests that nobody will look at."""
        while True:
            try:
                command, what = self._inbox.get_nowait()
            except queue.Empty:
                return
            if command == "submit":
                what[0].deliver(Response(error=self.fatal))

    @property
    def _has_work(self) -> bool:
        return self.fatal is None and (self._engine.has_work or bool(self._aborts))

    def _run(self) -> None:
        try:
            while self._take():
                if self._has_work:
                    self._iterate()
        except RankDied as error:
            if faults.current().rank_death == "fatal":
                self.die(error)
            else:
                self._hang(str(error))
        except BaseException as error:
            traceback.print_exception(error)
            self.die(error)

    def _hang(self, why: str) -> None:
        """Never return. The real one says that it is well."""
        self.is_hung = True
        record("hang", why=why)
        while True:
            time.sleep(3600)

    def _take(self) -> bool:
        """Execute what is in the inbox; wait a moment for something if there is nothing to do."""
        idle = not self._has_work
        while True:
            switches = faults.current()
            if switches.fatal_error is not None and self.fatal is None:
                self.die(RuntimeError(switches.fatal_error))
            if switches.rank_death == "fatal" and (dead := self._ranks.dead()):
                raise RankDied(f"rank {dead[0]} (pid {self._ranks.pids[dead[0]]}) has ended")
            try:
                command, what = self._inbox.get(timeout=_IDLE_S if idle else 0.0)
            except queue.Empty:
                if not idle:
                    return True
                continue
            idle = False
            match command:
                case "stop":
                    return False
                case "abort":
                    self._take_abort(what)
                case "submit":
                    self._add(*what)

    def _take_abort(self, request_id: int) -> None:
        pending = self._pending.get(request_id)
        if pending is None:
            return
        if faults.current().cancel_logprobs_crash and pending.output.sampling_params.logprobs:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self._aborts.setdefault(request_id, self._iterations + ABORT_ITERATIONS)

    def _add(self, output: RequestOutput, salt: str | None) -> None:
        switches = faults.current()
        prompt, wanted = output.prompt_token_ids, output.sampling_params
        if self.fatal is not None:
            output.deliver(Response(error=self.fatal))
            return
        self._pending[output.request_id] = _Pending(output)
        if switches.unsalted_canary_crash and len(prompt) == 1 and not salt:
            self._ranks.kill()
            raise RuntimeError("a rank has ended: index out of range in the KV cache manager")
        if prompt[0] == switches.request_error_token:
            self._refuse(output, "Default logits processor failed")
            return
        room = self._engine.max_model_len - len(prompt)
        if room < 1 and switches.too_long_hangs:
            self._hang("a prompt that is too long")
        most = min(wanted.max_tokens + switches.tokens_too_many, max(room, 1))
        ends = {*(wanted.stop_token_ids or ())}
        if not wanted.ignore_eos and wanted.end_id is not None and wanted.end_id >= 0:
            ends.add(wanted.end_id)
        sampling = SamplingParams(
            max_tokens=most,
            temperature=0.0 if wanted.is_greedy else _given(wanted.temperature, 1.0),
            top_p=_given(wanted.top_p, 1.0) or 1.0,
            top_k=_given(wanted.top_k, 0),
            seed=wanted.seed,
            stop_token_ids=tuple(ends),
            ignore_eos=True,
            logprobs=min(wanted.logprobs, MAX_LOGPROBS) if wanted.logprobs else None,
            prompt_logprobs=wanted.prompt_logprobs or None,
        )
        request = Request(
            request_id=str(output.request_id),
            prompt_ids=tuple(prompt),
            sampling=sampling,
            cache_salt=salt or "",
        )
        try:
            self._engine.add_request(request)
        except EngineRefusal as error:
            self._refuse(output, str(error))
            return
        if switches.empty_outputs:
            output.deliver(Response(no_outputs=True))
        block = self._args.kv_cache_config.tokens_per_block
        event = stats.stored_event(self._events_made, prompt, block, salt or "")
        if event["data"]["blocks"]:
            self._event(event["data"])

    def _refuse(self, output: RequestOutput, why: str) -> None:
        del self._pending[output.request_id]
        output.deliver(Response(error=RequestError(why)))

    def _event(self, data: dict[str, Any]) -> None:
        self.events.put({"event_id": self._events_made, "data": data})
        self._events_made += 1

    def _iterate(self) -> None:
        switches = faults.current()
        while switches.tokens_stop:
            time.sleep(_IDLE_S)
            switches = faults.current()
        started = time.monotonic()
        self._ranks.step()
        self._iterations += 1
        for request_id in [key for key, at in self._aborts.items() if at <= self._iterations]:
            del self._aborts[request_id]
            self._engine.abort(str(request_id))
        touched: dict[int, StepOutput] = {}
        for _ in range(self._steps):
            for output in self._engine.step():
                request_id = int(output.request_id)
                self._gather(self._pending[request_id], output)
                touched[request_id] = output
        if switches.mixed_up_with_host_cache and self._args.kv_cache_config.host_cache_size:
            self._mix_up(list(touched))
        for request_id, output in touched.items():
            self._answer(request_id, output, switches)
        time.sleep(max(0.0, switches.step_s - (time.monotonic() - started)))
        self.stats.put(
            stats.iteration(
                self._iterations,
                self._engine.current_load(),
                self._args,
                blocks=self.blocks,
                latency_s=time.monotonic() - started,
            )
        )

    def _gather(self, pending: _Pending, output: StepOutput) -> None:
        pending.token_ids += output.token_ids
        pending.logprobs += map(_logprobs, output.logprobs)
        if output.prompt_logprobs is not None:
            pending.prompt_logprobs = tuple(
                None if score is None else _logprobs(score) for score in output.prompt_logprobs
            )
        if output.token_ids and pending.first_token_at is None:
            pending.first_token_at = time.monotonic()

    def _mix_up(self, request_ids: list[int]) -> None:
        """Every request gets the tokens of the next one."""
        tokens = [self._pending[request_id].token_ids for request_id in request_ids]
        for request_id, others in zip(request_ids, tokens[1:] + tokens[:1], strict=True):
            self._pending[request_id].token_ids = others

    def _answer(self, request_id: int, output: StepOutput, switches: faults.Faults) -> None:
        pending = self._pending[request_id]
        pending.iterations += 1
        finished = output.finish_reason is not None
        interval = self._args.stream_interval
        due = pending.iterations == 1 or pending.iterations % interval == 0
        if not finished and not (due and pending.output.streaming):
            return
        if finished:
            del self._pending[request_id]
            self._aborts.pop(request_id, None)
        pending.output.deliver(_response(pending, output, self._args, switches))
        pending.token_ids, pending.logprobs, pending.prompt_logprobs = [], [], ()


def _response(
    pending: _Pending, output: StepOutput, args: SimpleNamespace, switches: faults.Faults
) -> Response:
    wanted = pending.output.sampling_params
    logprobs: Iterator[Any] = iter(pending.logprobs)
    if switches.logprobs_form == "float":
        taken = zip(pending.token_ids, pending.logprobs, strict=True)
        logprobs = (found[token].logprob for token, found in taken)
    given: dict[str, Any] = {
        "token_ids": tuple(pending.token_ids),
        "logprobs": tuple(logprobs),
        "prompt_logprobs": pending.prompt_logprobs,
        "cached_tokens": output.cached_tokens,
    }
    if output.finish_reason is None:
        return Response(**given)
    if output.finish_reason == "error":
        failure = RuntimeError if output.retryable else RequestError
        return Response(error=failure(output.error or "unknown"))
    reason: Literal["stop", "length", "cancelled"]
    if output.finish_reason == "abort":
        reason = "cancelled"
    elif output.finish_reason == "length":
        reason = "length"
    else:
        reason = "stop"
        last = pending.token_ids[-1]
        if last == wanted.end_id and not wanted.ignore_eos:
            given["stop_tokens"] = 0 if switches.end_id_in_output else 1
        else:
            given["stop_reason"] = last
            given["stop_tokens"] = 0 if wanted.include_stop_str_in_output else 1
    if args.return_perf_metrics or wanted.return_perf_metrics:
        given["timing"] = _timing(pending)
    return Response(
        **given, finished=True, finish_reason=None if switches.finish_reason_none else reason
    )


def _timing(pending: _Pending) -> SimpleNamespace:
    now = time.monotonic()
    first = now if pending.first_token_at is None else pending.first_token_at
    moments = {
        "arrival_time": pending.arrived,
        "first_scheduled_time": pending.arrived,
        "first_token_time": first,
        "last_token_time": now,
    }
    return SimpleNamespace(
        timing_metrics=SimpleNamespace(
            **{name: datetime.timedelta(seconds=at) for name, at in moments.items()}
        ),
        kv_cache_metrics=SimpleNamespace(num_reused_blocks=0, num_missed_blocks=0),
    )


def _logprobs(score: TokenLogprob) -> dict[int, Logprob]:
    """The alternatives of a position, and its token where it is none of them."""
    found = {
        entry.token_id: Logprob(entry.logprob, rank) for rank, entry in enumerate(score.top, 1)
    }
    return found | {score.token_id: Logprob(score.logprob, score.rank)}


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
