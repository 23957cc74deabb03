"""TensorRT-LLM's PyTorch backend behind the worker's loop. The only file that knows its API.

What it relies on is listed in docs/tensorrt-llm.md, with the versions. In short: `LLM(...)` blocks;
`generate_async` returns at once and needs a running loop; iterating yields one object, mutated,
whose token ids are cumulative, several more at a time; leaving the iteration does not stop the
request, `abort()` does. Its text is never read, its tracer stays off, nothing is left to its
defaults.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import queue
from collections.abc import AsyncGenerator, Callable
from typing import Any

from .backend import LoadError, Refused, RequestFailed
from .messages import End, Generate, Load, Output, Progress, Ready, Score, Start
from .processes import below_guardian, is_rank
from .trtllm_stats import merge_stats
from .values import checked_version, count, finite, positive

#: Seconds that it waits for statistics where there are none, and that one look may take: while it
#: works there are always more.
_IDLE_S, _STATS_S = 0.02, 0.3
#: Most of its statistics that one look reads. It keeps 1000.
_MOST_STATS = 1000


def make(module: str | None = None) -> TrtllmBackend:
    return TrtllmBackend(module or "tensorrt_llm")


class TrtllmBackend:
    """Implements `Backend`."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._llm: Any = None
        self._sampling_params: Any = None
        self._request_error: tuple[type[Exception], ...] = ()
        self._has_priority = False
        self._outputs: dict[int, Any] = {}
        self._page_tokens: int | None = None

    async def start(self, start: Start, report: Callable[[Progress], None]) -> Ready:
        """Blocks the loop until the engine is there, which takes minutes."""
        report(Progress(phase="importing", total=start.weight_bytes))
        package = importlib.import_module(self._module)
        version = checked_version(package, "TensorRT-LLM", start)
        self._sampling_params = package.SamplingParams
        with contextlib.suppress(ImportError, AttributeError):
            errors = importlib.import_module(f"{self._module}.executor.utils")
            self._request_error = (errors.RequestError,)
        accepted = inspect.signature(package.LLM.generate_async).parameters
        self._has_priority = "priority" in accepted
        report(Progress(phase="weights", total=start.weight_bytes))
        self._llm = package.LLM(model=start.directory, **start.arguments)
        kv = start.arguments.get("kv_cache_config") or {}
        self._page_tokens = kv.get("tokens_per_block")
        return Ready(
            engine_version=version,
            max_model_len=positive(getattr(self._llm, "args", None), "max_seq_len"),
            kv_tokens_total=self._capacity(),
            page_tokens=self._page_tokens,
            max_running=positive(getattr(self._llm, "args", None), "max_batch_size"),
        )

    async def submit(self, request: Generate) -> AsyncGenerator[Output | End, None]:
        arguments: dict[str, Any] = {
            "sampling_params": self._sampling_params(**_sampling(request)),
            "streaming": True,
            "cache_salt": request.cache_salt,
        }
        if self._has_priority and request.priority is not None:
            arguments["priority"] = request.priority
        try:
            output = self._llm.generate_async(request.prompt_ids, **arguments)
        except (ValueError, NotImplementedError) as error:
            raise Refused(str(error) or type(error).__name__) from error
        self._outputs[request.id] = output
        told = 0
        scored = request.logprobs is not None
        cached: int | None = None
        completion: Any = None
        try:
            async for step in output:
                cached = count(getattr(step, "cached_tokens", None), cached)
                outputs = getattr(step, "outputs", None)
                if not outputs:
                    continue
                completion = outputs[0]
                new = [int(token) for token in completion.token_ids[told:]]
                if new:
                    yield Output(
                        request.id,
                        new,
                        scores=_scores(completion.logprobs, told, new, request) if scored else None,
                        prompt_scores=_prompt_scores(completion, request) if not told else None,
                        cached_tokens=cached,
                        queue_s=_queue_s(completion),
                    )
                    told += len(new)
        except self._request_error as error:
            raise RequestFailed(str(error) or type(error).__name__) from error
        finally:
            del self._outputs[request.id]
        if request.prompt_logprobs is not None and not told:
            yield Output(request.id, [], prompt_scores=_prompt_scores(completion, request))
        yield End(
            request.id,
            finish_reason=getattr(completion, "finish_reason", None),
            stop_reason=getattr(completion, "stop_reason", None),
        )

    async def abort(self, request_id: int) -> None:
        output = self._outputs.get(request_id)
        if output is not None and not output.finished:
            output.abort()

    async def load(self) -> Load | None:
        """Its own figures, each of which is handed out once, to one reader."""
        found: list[Any] = []
        with contextlib.suppress(
            asyncio.TimeoutError, TimeoutError, asyncio.QueueEmpty, queue.Empty
        ):
            await asyncio.wait_for(self._read_stats(found), timeout=_STATS_S)
        return merge_stats(found, self._page_tokens)

    async def healthy(self) -> str | None:
        return await asyncio.to_thread(self._ask_health)

    def cause(self) -> LoadError | None:
        """Its ranks say what they say in its constructor's exception, or nothing."""
        return None

    def pids(self) -> list[int]:
        return [p.pid for p in below_guardian() if p.status is None and is_rank(p.pid)]

    def shutdown(self) -> None:
        self._llm.shutdown()

    async def _read_stats(self, found: list[Any]) -> None:
        async for item in self._llm.get_stats_async(timeout=_IDLE_S):
            found.append(item)
            if len(found) >= _MOST_STATS:
                return

    def _ask_health(self) -> str | None:
        """Private members, of which a version may have none: then only its silence tells."""
        executor = getattr(self._llm, "_executor", None)
        fatal = getattr(executor, "_fatal_error", None)
        if fatal is not None:
            return f"TensorRT-LLM reports {type(fatal).__name__}: {fatal}"
        for owner, name in ((self._llm, "_check_health"), (executor, "check_health")):
            check = getattr(owner, name, None)
            if callable(check):
                return None if check() is not False else "TensorRT-LLM's health check fails"
        return None

    def _capacity(self) -> int | None:
        """KV tokens, of the versions that say it."""
        ask = getattr(self._llm, "get_kv_cache_capacity", None)
        if not callable(ask):
            return None
        answer = ask()
        if isinstance(answer, dict):
            answer = answer.get("maxNumTokens")
        return answer if isinstance(answer, int) and answer > 0 else None


def _sampling(request: Generate) -> dict[str, Any]:
    """Keywords of its SamplingParams. Its logprobs 0 means none in some versions, so the least is
    1; the tokens that end a text are kept, because they count."""
    ends = [] if request.ignore_eos else list(request.end_ids)
    stops = sorted({*request.stop_token_ids, *ends[1:]})
    return {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "seed": request.seed or 0,
        "end_id": request.end_ids[0] if request.end_ids else -1,
        "pad_id": request.end_ids[0] if request.end_ids else 0,
        "ignore_eos": request.ignore_eos,
        "stop_token_ids": stops or None,
        "include_stop_str_in_output": True,
        "logprobs": None if request.logprobs is None else max(1, request.logprobs),
        "prompt_logprobs": (
            None if request.prompt_logprobs is None else max(1, request.prompt_logprobs)
        ),
        "n": 1,
        "best_of": 1,
        "detokenize": False,
        "add_special_tokens": False,
        "skip_special_tokens": False,
        "return_perf_metrics": True,
    }


def _scores(found: Any, told: int, tokens: list[int], request: Generate) -> list[Score]:
    """Of the new tokens. An entry is a mapping from token to its logprob, or a number."""
    assert request.logprobs is not None
    entries = list(found or ())[told : told + len(tokens)]
    if len(entries) < len(tokens):
        raise RequestFailed("the engine told no logprobs for its tokens")
    return [
        _score(entry, token, request.logprobs) for entry, token in zip(entries, tokens, strict=True)
    ]


def _score(entry: Any, token: int, num_top: int) -> Score:
    if not hasattr(entry, "items"):
        return Score(finite(entry))
    values = {int(key): _value(item) for key, item in entry.items()}
    chosen = entry.get(token)
    if chosen is None:
        raise RequestFailed(f"the engine's logprobs do not hold the token {token} that it chose")
    best = sorted(values.items(), key=lambda item: (-item[1], item[0]))[:num_top]
    rank = getattr(chosen, "rank", None)
    return Score(_value(chosen), rank if isinstance(rank, int) and rank > 0 else None, best)


def _prompt_scores(completion: Any, request: Generate) -> list[Score | None] | None:
    """One per prompt token; the first, which nothing predicts, may be left out or None."""
    if request.prompt_logprobs is None:
        return None
    found = list(getattr(completion, "prompt_logprobs", None) or ())
    prompt = request.prompt_ids
    if len(found) == len(prompt) - 1:
        found = [None, *found]
    if len(found) != len(prompt):
        raise RequestFailed(f"the engine told {len(found)} logprobs of {len(prompt)} prompt tokens")
    return [None] + [
        _score(entry, token, request.prompt_logprobs)
        for entry, token in zip(found[1:], prompt[1:], strict=True)
    ]


def _value(item: Any) -> float:
    return finite(getattr(item, "logprob", item))


def _queue_s(completion: Any) -> float | None:
    """Seconds from its arrival in the engine to its first step, by the engine's own clock."""
    timing = getattr(getattr(completion, "request_perf_metrics", None), "timing_metrics", None)
    try:
        waited = timing.first_scheduled_time - timing.arrival_time  # type: ignore[union-attr]
        seconds = waited.total_seconds() if hasattr(waited, "total_seconds") else float(waited)
    except (AttributeError, TypeError, ValueError):
        return None
    return seconds if 0.0 <= seconds < 1e6 else None
