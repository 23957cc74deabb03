"""A double of the parts of vLLM 0.32 that the worker's backend uses, passed in by import path.

It computes nothing: a request says its prompt back, one token a step, and then the last token again
and again. What of vLLM it imitates strictly: unknown keywords of `AsyncEngineArgs` and of
`SamplingParams` are errors, and so is sampling that is left to a default; a request whose iterator
is closed early, and one that is aborted, end in an abort, which is printed; deltas; a dead engine.
The first token of a prompt can ask for a fault: 250 refuses, 251 fails alone, 252 kills the engine.
A directory whose name says `broken` does not load, and `full` has no memory for more than 512 MiB.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

__version__ = "0.32.0+double"

REFUSED, FAILED, DEAD = 250, 251, 252
_SAMPLING = {
    *("n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "stop", "stop_token_ids"),
    *("ignore_eos", "logprobs", "prompt_logprobs", "detokenize", "skip_special_tokens"),
    *("include_stop_str_in_output", "watermarking", "output_kind"),
}


class VLLMClientError(Exception): ...


class GracefulHTTPError(Exception): ...


class GenerationError(Exception): ...


class EngineGenerateError(Exception): ...


class EngineDeadError(Exception): ...


class RequestOutputKind(Enum):
    DELTA = 1


class SamplingParams:
    def __init__(self, **given: Any) -> None:
        if given.keys() != _SAMPLING:
            raise TypeError(f"sampling left open or unknown: {sorted(given.keys() ^ _SAMPLING)}")
        vars(self).update(given)


def tokens_input(prompt_token_ids: list[int], *, cache_salt: str | None = None) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": prompt_token_ids, "cache_salt": cache_salt}


@dataclass
class AsyncEngineArgs:
    model: str
    max_model_len: int = 1024
    max_num_seqs: int = 8
    kv_cache_memory_bytes: int = 0


class StatLoggerBase: ...


@dataclass
class _Request:
    aborted: asyncio.Event = field(default_factory=asyncio.Event)


class AsyncLLM:
    def __init__(self, args: AsyncEngineArgs, stat_loggers: list[Any]) -> None:
        self._dead = False
        self._open: dict[str, _Request] = {}
        self._log = stat_loggers[0](None)
        cache = SimpleNamespace(num_gpu_blocks=64, block_size=16, kv_cache_size_tokens=1024)
        self.vllm_config = SimpleNamespace(
            cache_config=cache,
            model_config=SimpleNamespace(max_model_len=args.max_model_len),
            scheduler_config=SimpleNamespace(max_num_seqs=args.max_num_seqs),
        )

    @classmethod
    def from_engine_args(cls, args: AsyncEngineArgs, stat_loggers: list[Any]) -> AsyncLLM:
        name = Path(args.model).name
        head = "(Worker_TP1 pid=12) ERROR 11-26 20:46:32 [file.py:953] "
        if "broken" in name:
            print(f"{head}Traceback (most recent call last):", file=sys.stderr)
            print(f"{head}KeyError: 'model.layers.1.mlp.gate.weight'", file=sys.stderr)
        if "full" in name and args.kv_cache_memory_bytes > 1 << 29:
            words = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9.00 GiB"
            print(f"{head}{words}", file=sys.stderr)
        if "broken" in name or ("full" in name and args.kv_cache_memory_bytes > 1 << 29):
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        return cls(args, stat_loggers)

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    async def generate(
        self, prompt: dict[str, Any], params: SamplingParams, request_id: str, *, priority: int
    ) -> AsyncIterator[Any]:
        ids = prompt["prompt_token_ids"]
        if ids[0] == REFUSED:
            raise VLLMClientError("The prompt is not to its taste")
        if ids[0] == FAILED:
            raise EngineGenerateError from ValueError("its own output is not finite")
        request = self._open[request_id] = _Request()
        ended = False
        try:
            for index in range(params.max_tokens):
                await asyncio.sleep(0.002)
                if ids[0] == DEAD and index == 2:
                    self._dead = True
                if self._dead:
                    raise EngineDeadError
                if request.aborted.is_set():
                    ended = True
                    yield self._step(prompt, [], "abort")
                    return
                self._log.record(
                    SimpleNamespace(
                        num_running_reqs=len(self._open),
                        num_waiting_reqs=0,
                        num_skipped_waiting_reqs=0,
                        kv_cache_usage=0.5,
                    ),
                    None,
                )
                token = ids[min(index, len(ids) - 1)]
                stops = token in params.stop_token_ids
                last = index + 1 == params.max_tokens
                ended = stops or last
                reason = "stop" if stops else "length" if last else None
                yield self._step(prompt, [token], reason)
                if ended:
                    return
        finally:
            del self._open[request_id]
            if not ended and not self._dead:
                print(f"double: request {request_id} was left")

    def _step(self, prompt: dict[str, Any], new: list[int], reason: str | None) -> Any:
        output = SimpleNamespace(
            token_ids=new, logprobs=None, finish_reason=reason, stop_reason=None
        )
        return SimpleNamespace(
            outputs=[output],
            prompt_logprobs=None,
            num_cached_tokens=3 if prompt["cache_salt"] == "known" else 0,
            metrics=SimpleNamespace(queued_ts=1.0, scheduled_ts=1.25),
        )

    async def abort(self, request_id: str) -> None:
        request = self._open.get(request_id)
        print(f"double: abort {request_id}" + ("" if request else ", which does not run"))
        if request is not None:
            request.aborted.set()

    async def check_health(self) -> None:
        if self._dead:
            raise EngineDeadError

    def shutdown(self, timeout: float) -> None:
        print("double: shut down")


def _module(name: str, **members: Any) -> None:
    module = ModuleType(f"{__name__}.{name}")
    vars(module).update(members)
    sys.modules[module.__name__] = module


_module("inputs", tokens_input=tokens_input)
_module(
    "exceptions",
    VLLMClientError=VLLMClientError,
    GracefulHTTPError=GracefulHTTPError,
    GenerationError=GenerationError,
)
_module(
    "v1.engine.exceptions", EngineGenerateError=EngineGenerateError, EngineDeadError=EngineDeadError
)
_module("sampling_params", SamplingParams=SamplingParams, RequestOutputKind=RequestOutputKind)
_module("platforms", current_platform=SimpleNamespace(is_cpu=lambda: True))
_module("engine.arg_utils", AsyncEngineArgs=AsyncEngineArgs)
_module("v1.engine.async_llm", AsyncLLM=AsyncLLM)
_module("v1.metrics.loggers", StatLoggerBase=StatLoggerBase)
__path__: list[str] = []
