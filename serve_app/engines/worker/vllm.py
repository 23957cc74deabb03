"""vLLM's `AsyncLLM` behind the worker's loop. The only file that knows its API, that of 0.32.

What it relies on: `AsyncLLM.from_engine_args` blocks until the engine core, a process with its rank
processes below it, has loaded. `generate` is an async generator; with `DELTA` each output has the
new tokens only, of one or several steps, and its logprobs; one whose iterator is closed early is
aborted. `abort` of an id that runs ends its stream in "abort". A request is registered before
`generate` first waits, so that an abort which follows finds it; that holds for rendered input
(`tokens_input`), not for a raw prompt. Errors of a request are `VLLMClientError`; `EngineDeadError`
and everything else mean that the engine is dead. Without a tokenizer it knows no end token, and it
does not look whether a prompt's ids are in the vocabulary: one that is not kills the engine core,
so the adapter looks.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from .backend import LoadError, Refused, RequestFailed
from .messages import End, Generate, Load, Output, Progress, Ready, Score, Start
from .processes import below_guardian, is_rank
from .said import Said, is_out_of_memory
from .values import checked_version, count, finite, positive

#: No reports to its makers, no look at a hub, no fork of a process that has threads.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
#: Of its build for CPUs: MLA has no kernel without AVX-512 there, and replicas must not bind
#: themselves to the same cores.
_ON_CPU = {"VLLM_MLA_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
#: Seconds that its processes may take to end by themselves.
_SHUTDOWN_S = 3.0


def make(module: str | None = None) -> VllmBackend:
    return VllmBackend(module or "vllm")


class VllmBackend:
    """Implements `Backend`."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._said = Said()
        self._engine: Any = None
        self._stats: Any = None
        self._steps = 0
        self._running = 0
        self._blocks: int | None = None
        self._block_tokens: int | None = None

    async def start(self, start: Start, report: Callable[[Progress], None]) -> Ready:
        """Blocks the loop until the engine is there, which takes minutes."""
        version = self._prepare(start, report)
        self._construct(start)
        await self._engine.get_supported_tasks()  # cached: `submit` never waits for it
        self._said.forget()
        config = self._engine.vllm_config
        self._blocks = positive(config.cache_config, "num_gpu_blocks")
        self._block_tokens = positive(config.cache_config, "block_size")
        return Ready(
            engine_version=version,
            max_model_len=positive(config.model_config, "max_model_len"),
            kv_tokens_total=positive(config.cache_config, "kv_cache_size_tokens"),
            page_tokens=self._block_tokens,
            max_running=positive(config.scheduler_config, "max_num_seqs"),
        )

    def _prepare(self, start: Start, report: Callable[[Progress], None]) -> str:
        """Import vLLM in the environment that it needs; returns its version.

        Raises:
            LoadError: it is another version than the directory was built for.
        """
        os.environ.update(_ENVIRONMENT)
        self._said.tee()
        report(Progress(phase="importing", total=start.weight_bytes))
        package = importlib.import_module(self._module)
        version = checked_version(package, "vLLM", start)
        self._import()
        if self._platform.is_cpu():
            os.environ.update(_ON_CPU)
        report(Progress(phase="weights", total=start.weight_bytes))
        return version

    async def submit(self, request: Generate) -> AsyncGenerator[Output | End, None]:
        """W3C headers are not passed on: its tracer is off, and would say so for every request."""
        prompt = self._tokens_input(request.prompt_ids, cache_salt=request.cache_salt or None)
        cached: int | None = None
        completion: Any = None
        self._running += 1
        try:
            stream = self._engine.generate(
                prompt, self._sampling(request), str(request.id), priority=_priority(request)
            )
            async for step in stream:
                cached = count(step.num_cached_tokens, cached)
                completion = step.outputs[0]
                new = [int(token) for token in completion.token_ids]
                scored = _prompt_scores(step.prompt_logprobs, request)
                if new or scored:
                    yield Output(
                        request.id,
                        new,
                        scores=_scores(completion.logprobs, new, request.logprobs),
                        prompt_scores=scored,
                        cached_tokens=cached,
                        queue_s=_queue_s(getattr(step, "metrics", None)),
                    )
        except self._client_errors as error:
            raise Refused(str(error) or type(error).__name__) from error
        except self._request_errors as error:
            raise RequestFailed(str(error.__cause__ or error)) from error
        except self._dead_error as error:
            raise RuntimeError(self._why_dead()) from error
        finally:
            self._running -= 1
        yield End(
            request.id,
            finish_reason=getattr(completion, "finish_reason", None),
            stop_reason=getattr(completion, "stop_reason", None),
        )

    async def abort(self, request_id: int) -> None:
        await self._engine.abort(str(request_id))

    async def load(self) -> Load | None:
        """Of its last step. It tells nothing while it is idle, not even that it is."""
        stats = self._stats
        if stats is None:
            return None
        used: float | None = None
        if self._blocks is not None:
            used = stats.kv_cache_usage * self._blocks
        busy = self._running > 0
        waiting = stats.num_waiting_reqs + getattr(stats, "num_skipped_waiting_reqs", 0)
        return Load(
            running=stats.num_running_reqs if busy else 0,
            waiting=waiting if busy else 0,
            kv_blocks_used=None if used is None else round(used) if busy else 0,
            kv_blocks_total=self._blocks,
            page_tokens=self._block_tokens,
            steps=self._steps,
        )

    async def healthy(self) -> str | None:
        try:
            await self._engine.check_health()
        except self._dead_error:
            return self._why_dead()
        return None

    def pids(self) -> list[int]:
        """The engine core and its ranks."""
        return [p.pid for p in below_guardian() if p.status is None and is_rank(p.pid)]

    def cause(self) -> LoadError | None:
        """What its processes say of their end."""
        found = self._said.cause()
        return None if found is None else LoadError(found[0], out_of_memory=found[1])

    def shutdown(self) -> None:
        self._engine.shutdown(timeout=_SHUTDOWN_S)

    def _why_dead(self) -> str:
        found = self._said.cause()
        return "vLLM's engine core has died" + (f" ({found[0]})" if found else "")

    def _import(self) -> None:
        name = self._module
        inputs = importlib.import_module(f"{name}.inputs")
        errors = importlib.import_module(f"{name}.exceptions")
        engine_errors = importlib.import_module(f"{name}.v1.engine.exceptions")
        sampling = importlib.import_module(f"{name}.sampling_params")
        self._platform = importlib.import_module(f"{name}.platforms").current_platform
        self._tokens_input = inputs.tokens_input
        self._sampling_params = sampling.SamplingParams
        self._delta = sampling.RequestOutputKind.DELTA
        self._client_errors = (errors.VLLMClientError, errors.GracefulHTTPError, ValueError)
        self._request_errors = (engine_errors.EngineGenerateError, errors.GenerationError)
        self._dead_error = engine_errors.EngineDeadError

    def _construct(self, start: Start) -> None:
        name = self._module
        args = importlib.import_module(f"{name}.engine.arg_utils").AsyncEngineArgs
        engine = importlib.import_module(f"{name}.v1.engine.async_llm").AsyncLLM
        loggers = importlib.import_module(f"{name}.v1.metrics.loggers")
        self._check_known(args, start)
        backend = self
        base: Any = loggers.StatLoggerBase

        class Recorder(base):  # type: ignore[misc]  # a class of the module
            """Keeps what the scheduler says with each step."""

            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
                if scheduler_stats is not None:
                    backend._stats = scheduler_stats
                    backend._steps += 1

            def log_engine_initialized(self) -> None:
                pass

        try:
            made = args(model=start.directory, **start.arguments)
            self._engine = engine.from_engine_args(made, stat_loggers=[Recorder])
        except Exception as error:
            cause = self.cause()
            if cause is not None:
                raise cause from error
            words = f"{type(error).__name__}: {error}"
            raise LoadError(words, out_of_memory=is_out_of_memory(words)) from error

    def _check_known(self, args: Any, start: Start) -> None:
        unknown = sorted(start.arguments.keys() - args.__dataclass_fields__.keys())
        if unknown:
            raise LoadError(f"this vLLM does not know the argument {unknown[0]}; remove it")

    def _sampling(self, request: Generate) -> Any:
        """Nothing is left to a default of its own, and no text is made. The tokens that end a text
        are told, because they count; it knows no end token but those."""
        ends = [] if request.ignore_eos else request.end_ids
        return self._sampling_params(
            n=1,
            max_tokens=request.max_tokens,
            min_tokens=0,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=0.0,
            seed=request.seed,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            stop=None,
            stop_token_ids=sorted({*request.stop_token_ids, *ends}),
            ignore_eos=request.ignore_eos,
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs,
            detokenize=False,
            skip_special_tokens=False,
            include_stop_str_in_output=True,
            watermarking=False,
            output_kind=self._delta,
        )


def _priority(request: Generate) -> int:
    """Its priorities are whole numbers, the least first; requests of one are served in order."""
    return 0 if request.priority is None else round(1000 * (0.5 - request.priority))


def _scores(found: Any, tokens: list[int], num_top: int | None) -> list[Score] | None:
    """Of the new tokens, whose entries map tokens to logprobs."""
    if num_top is None:
        return None
    entries = list(found or ())
    if len(entries) != len(tokens):
        raise RequestFailed(f"vLLM told {len(entries)} logprobs of {len(tokens)} tokens")
    return [_score(entry, token, num_top) for entry, token in zip(entries, tokens, strict=True)]


def _prompt_scores(found: Any, request: Generate) -> list[Score | None] | None:
    """One per prompt token, the first None, once; None before and after."""
    if request.prompt_logprobs is None or not found:
        return None
    prompt = request.prompt_ids
    if len(found) != len(prompt):
        raise RequestFailed(f"vLLM told {len(found)} logprobs of {len(prompt)} prompt tokens")
    return [None] + [
        _score(entry, token, request.prompt_logprobs)
        for entry, token in zip(list(found)[1:], prompt[1:], strict=True)
    ]


def _score(entry: Mapping[int, Any], token: int, num_top: int) -> Score:
    """The entry holds the best tokens, and the chosen one where it is none of them."""
    if token not in entry:
        raise RequestFailed(f"vLLM's logprobs do not hold the token {token} that it chose")
    values = {int(key): finite(item.logprob) for key, item in entry.items()}
    best = sorted(values.items(), key=lambda item: (-item[1], item[0]))[:num_top]
    return Score(values[token], count(entry[token].rank, None), best)


def _queue_s(metrics: Any) -> float | None:
    """Seconds from its arrival in the engine core to its first step, by one clock."""
    queued, scheduled = getattr(metrics, "queued_ts", 0.0), getattr(metrics, "scheduled_ts", 0.0)
    return scheduled - queued if 0.0 < queued <= scheduled else None
