"""LLM: the constructor, which blocks, and requests, which do not."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import resource
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tensorrt_llm import arguments, faults, stats
from tensorrt_llm.admission import check_use, prepare_sampling, read_inputs
from tensorrt_llm.journal import record, violate
from tensorrt_llm.ranks import RankDied, Ranks
from tensorrt_llm.result import RequestOutput
from tensorrt_llm.sampling import SamplingParams
from tensorrt_llm.steps import Steps
from tensorrt_llm.version import IS_1_3, __version__


class _Executor:
    """What `LLM._executor` shows."""

    def __init__(self, steps: Steps, ranks: Ranks) -> None:
        self._steps = steps
        self._ranks = ranks

    def is_shutdown(self) -> bool:
        return self._steps.is_shutdown


class _HealthyExecutor(_Executor):
    """... since 1.3."""

    @property
    def _fatal_error(self) -> BaseException | None:
        return self._steps.fatal

    def check_health(self) -> bool:
        while faults.current().health_hangs:
            time.sleep(0.05)
        return self._steps.fatal is None


class _BaseLLM:
    """What both versions have.

    Raises (constructor):
        ValueError, ValidationError: arguments that the version does not take.
        RuntimeError: no GPUs, or too few; a rank could not load, with the reason as its cause.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        given = {
            "tokenizer": tokenizer,
            "tokenizer_mode": tokenizer_mode,
            "skip_tokenizer_init": skip_tokenizer_init,
            "trust_remote_code": trust_remote_code,
            "tensor_parallel_size": tensor_parallel_size,
            "dtype": dtype,
            "revision": revision,
            "tokenizer_revision": tokenizer_revision,
            **kwargs,
        }
        self._executor: _Executor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ids = itertools.count(1)
        self._outputs: dict[int, RequestOutput] = {}
        self._is_stopping = False
        record("construct", version=__version__, arguments=_plain(given))
        self.args = arguments.parse(model, given)
        arguments.check_gpus(self.args)
        directory = Path(model)
        switches = faults.current()
        self._port = _bind(switches)
        files = sorted(directory.glob("*.safetensors"))
        world = self.args.tensor_parallel_size * self.args.pipeline_parallel_size
        if switches.construct == "hang":  # the spawn has failed, in a thread
            while True:
                time.sleep(3600)
        ranks = Ranks(world, files, switches)
        try:
            engine = self._load(directory, ranks)
        except BaseException:
            ranks.kill()
            self._port.close()
            raise
        self._tokenizer: Any = None
        self._end_id: int | None = None
        if not skip_tokenizer_init:
            self._tokenizer = SimpleNamespace(tokenizer=engine.tokenizer)
            self._end_id = min(engine.config.eos_token_ids)
        self._max_model_len = engine.max_model_len
        self._steps = Steps(engine, ranks, self.args)
        self._steps.start()
        self._executor = (_HealthyExecutor if IS_1_3 else _Executor)(self._steps, ranks)
        atexit.register(self._at_exit)
        record("ready", max_seq_len=engine.max_model_len, blocks=self._steps.blocks)

    def _load(self, directory: Path, ranks: Ranks) -> Any:
        switches = faults.current()
        fraction = self.args.kv_cache_config.free_gpu_memory_fraction
        try:
            ranks.wait_ready()
        except RankDied as error:
            if switches.notices_early_death:
                raise RuntimeError("Executor worker died during initialization") from error
            while True:
                time.sleep(3600)
        while faults.current().construct == "later":
            time.sleep(0.02)
        from tensorrt_llm import model  # torch, which takes seconds

        limit = switches.oom_above_fraction
        try:
            if limit is not None and fraction > limit:
                raise _out_of_memory(fraction)
            return model.load(directory, self.args)
        except Exception as error:
            raise RuntimeError("Executor worker returned error") from error

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def llm_id(self) -> str:
        return f"{socket.gethostname()}-{os.getpid()}"

    def get_stats_async(self, timeout: float | None = 2) -> stats.IterationResult:
        self._check_running()
        return stats.IterationResult(self._steps.stats, timeout, stats.shape_stats)

    def get_stats(self, timeout: float | None = 2) -> list[Any]:
        return self.get_stats_async(timeout).get_results()

    def get_kv_cache_events_async(self, timeout: float | None = 2) -> stats.IterationResult:
        self._check_running()
        return stats.IterationResult(self._steps.events, timeout, lambda event: event)

    def get_kv_cache_events(self, timeout: float | None = 2) -> list[Any]:
        return self.get_kv_cache_events_async(timeout).get_results()

    def shutdown(self) -> None:
        """Blocks, for ever if the engine hangs or a rank is dead."""
        if self._executor is None:
            return
        if self._is_stopping:
            violate("second_shutdown", "shutdown was called while it runs")
        self._is_stopping = True
        switches = faults.current()
        record("shutdown")
        open_ids = [key for key, output in self._outputs.items() if not output.released]
        if open_ids:
            violate("unreleased", f"requests {open_ids} were neither read to the end nor aborted")
        steps, ranks = self._steps, self._executor._ranks
        while switches.shutdown == "hang" or steps.is_hung or ranks.dead():
            time.sleep(3600)
        steps.stop()
        ranks.stop()
        self._port.close()
        if switches.shutdown == "sigabrt":
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.abort()
        self._executor = None
        record("stopped")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def _at_exit(self) -> None:
        if self._executor is not None and not self._is_stopping:
            record("exit_without_shutdown")
            self.shutdown()

    def _check_running(self) -> None:
        if self._executor is None or self._is_stopping or self._executor.is_shutdown():
            raise RuntimeError("LLM is shutting down")

    def _generate(
        self,
        inputs: Any,
        sampling: SamplingParams | None,
        cache_salt: str | None,
        *,
        streaming: bool,
        **others: Any,
    ) -> RequestOutput:
        """Accept a request. `others` are the arguments that only are written down."""
        self._check_running()
        if self._steps.fatal is not None:
            raise RuntimeError(f"the executor is dead: {self._steps.fatal}")
        self._check_loop()
        sampling = prepare_sampling(sampling, self.args, self._end_id)
        prompt_ids = read_inputs(inputs)
        request_id = next(self._ids)
        record(
            "request",
            id=request_id,
            prompt_tokens=len(prompt_ids),
            cache_salt=cache_salt,
            streaming=streaming,
            **{name: getattr(sampling, name) for name in sorted(sampling.given)},
            **{name: value for name, value in others.items() if value is not None},
        )
        check_use(prompt_ids, sampling, cache_salt, self.args, self._max_model_len)
        shows_text = self._tokenizer is not None and sampling.detokenize
        output = RequestOutput(
            request_id,
            prompt_ids,
            sampling,
            streaming=streaming,
            abort=self._steps.abort,
            show_text=_wrong_text if shows_text else _no_text,
        )
        self._outputs = {key: old for key, old in self._outputs.items() if not old.released}
        self._outputs[request_id] = output
        self._steps.submit(output, cache_salt)
        return output

    def _check_loop(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # RequestOutput complains
        if self._loop is None:
            self._loop = loop
        elif loop is not self._loop:
            violate("second_loop", "generate_async was called on a second event loop")

    def _refuse_unknown(self, unknown: dict[str, Any]) -> None:
        for name in unknown:
            violate(
                "unknown_keyword",
                f"generate_async has no {name} in {__version__}",
                refused=True,
                name=name,
            )
            raise TypeError(f"generate_async() got an unexpected keyword argument {name!r}")


class _LLM121(_BaseLLM):
    """1.2.1."""

    def generate_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        trace_headers: dict[str, str] | None = None,
        _postproc_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: str | None = None,
        **unknown: Any,
    ) -> RequestOutput:
        """Returns at once. See `_BaseLLM._generate`."""
        self._refuse_unknown(unknown)
        return self._generate(
            inputs,
            sampling_params,
            cache_salt,
            streaming=streaming,
            trace_headers=trace_headers,
        )


class _LLM13(_BaseLLM):
    """1.3.0rc29."""

    def generate_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        trace_headers: dict[str, str] | None = None,
        _postproc_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: str | None = None,
        priority: float = 0.5,
        conversation_params: Any = None,
        **unknown: Any,
    ) -> RequestOutput:
        """Returns at once. See `_BaseLLM._generate`."""
        self._refuse_unknown(unknown)
        if not 0.0 <= priority <= 1.0:
            raise ValueError(f"priority must lie in [0, 1], got {priority}")
        return self._generate(
            inputs,
            sampling_params,
            cache_salt,
            streaming=streaming,
            trace_headers=trace_headers,
            priority=priority,
        )

    def _check_health(self) -> bool:
        executor = self._executor
        return isinstance(executor, _HealthyExecutor) and executor.check_health()

    def get_kv_cache_capacity(self) -> dict[str, int]:
        """The primary GPU cache: blocks, and tokens."""
        self._check_running()
        block = self.args.kv_cache_config.tokens_per_block
        blocks = self._steps.blocks
        return {
            "maxNumBlocks": blocks,
            "tokensPerBlock": block,
            "maxNumTokens": blocks * block,
        }


class LLM(_LLM13 if IS_1_3 else _LLM121):  # type: ignore[misc]
    """`tensorrt_llm.LLM` of the version."""


def _bind(switches: faults.Faults) -> socket.socket:
    """The rendezvous of the ranks: a port of MASTER_PORT, of the fault, or any that is free."""
    chosen = os.environ.get("MASTER_PORT") or switches.fixed_port or 0
    listener = socket.socket()
    try:
        listener.bind(("127.0.0.1", int(chosen)))
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise RuntimeError(
            f"The server socket has failed to listen on any local network address. port: {chosen}, "
            "code: -98, name: EADDRINUSE, message: address already in use"
        ) from error
    return listener


def _out_of_memory(fraction: float) -> BaseException:
    """What a rank raises, as torch says it."""
    import torch

    gib = 79.11 * fraction
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {gib:.2f} GiB. GPU 0 has a total capacity of 79.11 "
        "GiB of which 8.20 GiB is free."
    )


def _no_text(token_ids: list[int]) -> str:
    return ""


def _wrong_text(token_ids: list[int]) -> str:
    """Never the text: the engine's own loses spaces and splits characters (#14312)."""
    return "".join(f"wrong{token}" for token in token_ids)


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    simple = (str, int, float, bool, dict, list, tuple, type(None))
    return {
        name: value if isinstance(value, simple) else repr(value) for name, value in given.items()
    }
