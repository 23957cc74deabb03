"""The keywords of `LLM`, checked as the real constructor checks them.

Names and types are those of `deepseek/trtllm/versions.py` and `llm_schema.py`; the refusals are the
real one's: ValueError for an unknown keyword, pydantic's ValidationError for anything nested and
for values. The schema is narrower than the real model where ours is narrower on purpose (other
code, other files), which a worker of ours never sends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel, ValidationError

from deepseek.trtllm.llm_schema import LlmArgs
from deepseek.trtllm.versions import known_arguments, require_version
from tensorrt_llm.journal import violate
from tensorrt_llm.version import __version__

_VERSION = require_version(__version__)
KNOWN = known_arguments(_VERSION)
#: Defaults of the wheel of 1.2.1, of what the double looks at.
_DEFAULTS: dict[str, Any] = {
    "skip_tokenizer_init": False,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "enable_attention_dp": False,
    "max_batch_size": 2048,
    "max_num_tokens": 8192,
    "max_seq_len": None,
    "enable_chunked_prefill": False,
    "speculative_config": None,
    "stream_interval": 1,
    "num_postprocess_workers": 0,
    "enable_iter_perf_stats": False,
    "return_perf_metrics": False,
    "max_stats_len": 1000,
    "orchestrator_type": None,
}
_KV_DEFAULTS: dict[str, Any] = {
    "dtype": "auto",
    "enable_block_reuse": True,
    "event_buffer_max_size": 0,
    "free_gpu_memory_fraction": 0.9,
    "host_cache_size": None,
    "max_tokens": None,
    "tokens_per_block": 32,
}


def parse(model: Any, given: Mapping[str, Any]) -> SimpleNamespace:
    """The arguments with the real one's defaults, as `LLM.args` shows them.

    Raises:
        ValueError: a keyword that the version has not.
        ValidationError: a nested name or a value that it does not take.
        RuntimeError: no GPU is visible; validating the dtype asks CUDA.
    """
    for name in given:
        if name not in KNOWN and name != "_mpi_session":
            _note(name)
            raise ValueError(f"LLM got invalid argument: {name}")
    if visible_gpus() == 0:
        raise RuntimeError("No CUDA GPUs are available")
    try:
        parsed = LlmArgs.model_validate(dict(given))
    except ValidationError as error:
        for problem in error.errors():
            if problem["type"] == "extra_forbidden":
                _note(".".join(str(part) for part in problem["loc"]))
        raise
    for path, value in _given(parsed):
        if path not in KNOWN:
            _note(path)
            raise _unknown(path, value)
    args = {**_DEFAULTS, **{name: value for name, value in parsed if value is not None}}
    cache = {} if parsed.kv_cache_config is None else parsed.kv_cache_config.model_dump()
    kept = {name: value for name, value in cache.items() if value is not None}
    args["kv_cache_config"] = SimpleNamespace(**(_KV_DEFAULTS | kept))
    if args["num_postprocess_workers"]:
        violate(
            "num_postprocess_workers",
            f"{args['num_postprocess_workers']} workers, which leak memory; give 0",
        )
    return SimpleNamespace(**{**args, "model": str(model), "backend": "pytorch"})


def visible_gpus() -> int:
    """GPUs that the process sees: those of the node, or of CUDA_VISIBLE_DEVICES where it is set."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return sum(bool(name.strip()) for name in shown.split(","))
    return int(os.environ.get("TRTLLM_DOUBLE_GPUS", "8"))


def check_gpus(args: SimpleNamespace) -> None:
    """Raises:
    RuntimeError: there are fewer GPUs than ranks."""
    world = args.tensor_parallel_size * args.pipeline_parallel_size
    if world > 1 and visible_gpus() < world:
        raise RuntimeError(f"Only {visible_gpus()} GPUs are available, but {world} are required.")


def _note(name: str) -> None:
    violate("unknown_keyword", f"LLM has no {name} in {__version__}", refused=True, name=name)


def _given(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in model.model_fields_set:
        value = getattr(model, name)
        yield f"{prefix}{name}", value
        if isinstance(value, BaseModel):
            yield from _given(value, f"{prefix}{name}.")


def _unknown(path: str, value: Any) -> ValidationError:
    return ValidationError.from_exception_data(
        "TorchLlmArgs",
        [{"type": "extra_forbidden", "loc": tuple(path.split(".")), "input": value}],
    )
