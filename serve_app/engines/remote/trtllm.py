"""TensorRT-LLM's side of the adapter: what it is started with, read from the engine directory,
checked, and made ours.

`llm_args.yaml` is read strictly for the version that the directory was built for
(deepseek/trtllm/llm_args.py), so that an unknown name is our sentence and not the loader's after
minutes. What the adapter relies on is then set, whatever the file says.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek.artifact.built_engine import read_engine
from deepseek.errors import DeployError
from deepseek.trtllm.check_files import check_args, check_config, read_trtllm_manifest
from deepseek.trtllm.llm_args import KV_DTYPES, LLM_ARGS_FILE, llm_args_of
from deepseek.trtllm.llm_schema import LlmArgs
from serve_app.engine_sections import TrtllmOptions
from serve_app.engines.remote.launch import Launch, Plan
from serve_app.engines.remote.plans import context_of, plan_for

log = logging.getLogger("ray.serve")

#: What the loader takes where an argument is left out.
_DEFAULT_BATCH, _DEFAULT_KV_FRACTION, _DEFAULT_BLOCK = 2048, 0.9, 32
#: GPUs of a node where the arguments do not say how many.
_GPUS_PER_NODE = 8
#: Of the KV cache's share of memory, what the second try after out-of-memory takes.
_SECOND_TRY = 0.8
#: Arguments that the adapter relies on. Its own text, tracer and postprocessing stay off; without
#: a tokenizer it needs none of ours, and every request names the tokens that end it.
_OURS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "trust_remote_code": False,
    "num_postprocess_workers": 0,
    "enable_iter_perf_stats": True,
    "return_perf_metrics": True,
}
#: Arguments that are not passed on: its own tracer, and its reports to its makers.
_NOT_PASSED = ("otlp_traces_endpoint", "perf_metrics_max_requests", "print_iter_log")


def launch_trtllm(options: TrtllmOptions) -> Launch:
    """The process of the environment that the options name."""
    return Launch(python=options.python, backend="trtllm", ports=("MASTER_PORT",))


def plan_trtllm(options: TrtllmOptions) -> Plan:
    """Read the engine directory of `options`, without its tensors.

    Raises:
        ArtifactError: it is no engine for TensorRT-LLM, or damaged.
        DeployError: its arguments are not those of its version, or cannot be served; or an option
            contradicts them.
    """
    directory = options.directory
    path = directory / LLM_ARGS_FILE
    engine, fields = read_trtllm_manifest(directory)
    built = read_engine(directory)
    stored = check_config(directory, built, engine, fields)
    for warning in check_args(directory, built, built.config, engine, stored, fields):
        log.warning("%s: %s", path, warning)
    args = llm_args_of(built.documents[LLM_ARGS_FILE], fields.engine_version, where=str(path))
    _check_one_node(args, path)
    check_gpus(args.tensor_parallel_size or 1, os.environ)
    positions = built.config.max_position_embeddings
    max_model_len = context_of(options, min(args.max_seq_len or positions, positions), path)
    arguments = args.model_dump(mode="json", exclude_unset=True)
    for name in _NOT_PASSED:
        arguments.pop(name, None)
    cache = dict(arguments.get("kv_cache_config") or {})
    if options.kv_cache not in (None, engine.kv_cache):
        cache["dtype"] = KV_DTYPES[str(options.kv_cache)]
    arguments |= _OURS | {"max_seq_len": max_model_len, "kv_cache_config": cache}
    less_cache = _less_cache(cache, max_model_len)
    return plan_for(
        options,
        engine,
        built,
        arguments=arguments,
        max_model_len=max_model_len,
        kv_tokens_total=cache.get("max_tokens"),
        page_tokens=cache.get("tokens_per_block") or _DEFAULT_BLOCK,
        max_running=args.max_batch_size or _DEFAULT_BATCH,
        engine_version=fields.engine_version,
        less_memory=arguments | {"kv_cache_config": less_cache},
        memory=(_words(cache), _words(less_cache)),
    )


def _check_one_node(args: LlmArgs, path: Path) -> None:
    if args.orchestrator_type is not None:
        raise DeployError(
            f"{path}: orchestrator_type {args.orchestrator_type} cannot be served: the ranks are "
            "MPI processes below the replica's own; remove it"
        )
    ranks, per_node = args.tensor_parallel_size or 1, args.gpus_per_node or _GPUS_PER_NODE
    if ranks > per_node:
        raise DeployError(
            f"{path}: {ranks} ranks on nodes of {per_node} GPUs need more than one node, but the "
            "ranks of a replica are processes of one; build for at most that many, or use vllm"
        )


def check_gpus(ranks: int, environ: Mapping[str, str]) -> None:
    """Check that this process sees as many GPUs as there are ranks. Ray shows an actor those that
    it reserves, and none to an actor that reserves none; without a word of it nothing is known.

    Raises:
        DeployError: it sees fewer.
    """
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return
    there = len([name for name in shown.split(",") if name.strip() not in ("", "-1")])
    if there < ranks:
        raise DeployError(
            f"the engine has {ranks} ranks, but its replica sees {there} GPUs "
            f"(CUDA_VISIBLE_DEVICES {shown!r}); give its pool gpus: {ranks}"
        )


def _less_cache(cache: Mapping[str, Any], max_model_len: int) -> dict[str, Any]:
    """The KV cache of the second try: whole blocks, and one request of the longest at least."""
    fraction = cache.get("free_gpu_memory_fraction") or _DEFAULT_KV_FRACTION
    less = dict(cache) | {"free_gpu_memory_fraction": round(fraction * _SECOND_TRY, 3)}
    if (tokens := cache.get("max_tokens")) is not None:
        block = cache.get("tokens_per_block") or _DEFAULT_BLOCK
        wanted = max(int(tokens * _SECOND_TRY), max_model_len)
        less["max_tokens"] = min(tokens, -(-wanted // block) * block)
    return less


def _words(cache: Mapping[str, Any]) -> str:
    tokens = cache.get("max_tokens")
    fraction = cache.get("free_gpu_memory_fraction") or _DEFAULT_KV_FRACTION
    return f"free_gpu_memory_fraction {fraction}" + (f" and {tokens} KV tokens" if tokens else "")
