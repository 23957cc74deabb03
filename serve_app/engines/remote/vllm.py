"""vLLM's side of the adapter: what it is started with, read from the engine directory, checked, and
made ours.

The directory is checked as `build --check` does it, but for its tensors, and vllm.yaml is read
strictly (deepseek/vllm/launch.py). What the adapter relies on is then set, whatever the file says.
"""

from __future__ import annotations

import math
from typing import Any

from deepseek.artifact.built_engine import BuiltEngine, read_engine
from deepseek.artifact.engine_checks import read_target_manifest
from deepseek.artifact.engine_manifest import EngineManifest
from deepseek.engine.request import MAX_LOGPROBS
from deepseek.vllm.check import check_config, check_launch
from deepseek.vllm.fields import LOADER, TARGET, VllmFields
from deepseek.vllm.launch import KV_DTYPES, LAUNCH_FILE
from deepseek.vllm.loadable import check_loadable, require_ranks
from serve_app.engine_sections import VllmOptions
from serve_app.engines.remote.launch import Launch, Plan
from serve_app.engines.remote.plans import context_of, plan_for

#: Of the GPUs' memory, what the second try after out-of-memory takes of the first's share.
_SECOND_TRY = 0.9
#: Bytes of KV cache of vLLM's build for CPUs, unless VLLM_CPU_KVCACHE_SPACE says how many GiB: a
#: share of the memory, which vllm.yaml asks for, would be taken from all else that runs there.
_CPU_KV_BYTES = 1 << 30
#: Tokens of a page where nothing else is said.
_DEFAULT_PAGE = 16
#: Arguments that the adapter relies on. Without a tokenizer it needs none of ours, and every
#: request names the tokens that end it. A health check goes before what waits.
_OURS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "trust_remote_code": False,
    "generation_config": "vllm",
    "enable_prefix_caching": True,
    "scheduling_policy": "priority",
    "max_logprobs": MAX_LOGPROBS,
    "logprobs_mode": "raw_logprobs",
    "seed": 0,
    "disable_log_stats": True,
    "enable_log_requests": False,
}


def launch_vllm(options: VllmOptions) -> Launch:
    """The process of the environment that the options name."""
    return Launch(
        python=options.python,
        backend="vllm",
        env={
            # Of its own, which is 600.
            "VLLM_ENGINE_READY_TIMEOUT_S": str(math.ceil(options.load_timeout_s)),
            # Ranks of one node; without it vLLM looks for an address that others could reach.
            "VLLM_HOST_IP": "127.0.0.1",
        },
    )


def plan_vllm(options: VllmOptions) -> Plan:
    """Read the engine directory of `options`, without its tensors.

    Raises:
        ArtifactError: it is no engine for vLLM, or damaged.
        DeployError: its arguments cannot be served, or an option contradicts them.
    """
    directory = options.directory
    path = directory / LAUNCH_FILE
    engine, fields = read_target_manifest(directory, TARGET, LOADER, VllmFields)
    built = read_engine(directory)
    check_config(directory, built, engine, fields)
    mtp = fields.mtp == "kept"
    file = check_launch(directory, built, built.config, engine, mtp=mtp)
    tp = _tensor_ranks(options, built, engine, mtp=mtp)
    max_model_len = context_of(options, file.max_model_len, path)
    max_running = options.max_batch_size or file.max_num_seqs
    kv_cache = options.kv_cache or engine.kv_cache
    arguments = file.model_dump(mode="json", exclude_none=True) | _OURS
    arguments |= {
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "enable_expert_parallel": file.enable_expert_parallel and tp > 1,
        "kv_cache_dtype": KV_DTYPES[kv_cache],
        "max_model_len": max_model_len,
        "max_num_seqs": max_running,
        "max_num_batched_tokens": max(file.max_num_batched_tokens, max_running),
    }
    if options.cpu:
        del arguments["gpu_memory_utilization"]
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": _CPU_KV_BYTES}
        less: dict[str, Any] = {"kv_cache_memory_bytes": _CPU_KV_BYTES // 2}
    else:
        share = file.gpu_memory_utilization
        less = {"gpu_memory_utilization": round(share * _SECOND_TRY, 4)}
    return plan_for(
        options,
        engine,
        built,
        arguments=arguments,
        max_model_len=max_model_len,
        page_tokens=_DEFAULT_PAGE,
        max_running=max_running,
        engine_version=fields.engine_version,
        less_memory=arguments | less,
        memory=(_words(arguments), _words(arguments | less)),
    )


def _tensor_ranks(
    options: VllmOptions, built: BuiltEngine, engine: EngineManifest, *, mtp: bool
) -> int:
    """Ranks that share each layer. The files are the same for any number, if it divides them."""
    tp = options.tensor_parallel_size or engine.ranks.tp
    if tp != engine.ranks.tp:
        ranks = require_ranks(tp, tp if engine.ranks.ep > 1 else 1)
        check_loadable(built.config, engine.schemes, ranks, mtp=mtp)
    return tp


def _words(arguments: dict[str, Any]) -> str:
    if "gpu_memory_utilization" in arguments:
        return f"gpu_memory_utilization {arguments['gpu_memory_utilization']:g}"
    return f"{arguments['kv_cache_memory_bytes'] / (1 << 30):g} GiB of KV cache"
