"""The arguments of `tensorrt_llm.LLM` that llm_args.yaml may hold, mirrored and read strictly.

The loader's own model cannot be used for this: it asks CUDA while it validates, and it is not
installable everywhere. This one is stricter than the loader. What runs other code, reads other
files or changes the model is refused by name, unless it has the value that does nothing; a name of
another version is refused (`deepseek/trtllm/versions.py` says which are known of each). Defaults
are None here, for "left out", because they differ between versions.

The format of weights is never an argument: the loader takes it from the directory alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError
from pydantic_core import ErrorDetails

from deepseek.errors import DeployError
from deepseek.trtllm.versions import EVIDENCE, EngineVersion, known_arguments
from deepseek.untrusted import show, show_name

Positive = Annotated[int, Field(ge=1, le=1 << 40)]
Natural = Annotated[int, Field(ge=0, le=1 << 62)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
MAX_LIST = 512
#: A list in YAML, whose items are not converted.
PositiveList = Annotated[
    tuple[Positive, ...], Strict(False), Field(min_length=1, max_length=MAX_LIST)
]
_Custom = Literal["AUTO", "UB", "MINLATENCY", "ONESHOT", "TWOSHOT", "LOWPRECISION", "MNNVL"]
AllReduce = Literal[_Custom, "NCCL", "NCCL_SYMMETRIC"]


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class KvCache(_Arguments):
    """The KV cache of each rank. Of several limits the smallest holds; `max_tokens` counts tokens,
    `max_gpu_total_bytes` and `host_cache_size` bytes. dtype `auto` is what the directory says."""

    dtype: Literal["auto", "fp8", "nvfp4"] | None = None
    free_gpu_memory_fraction: Share | None = None
    max_tokens: Positive | None = None
    max_gpu_total_bytes: Natural | None = None
    tokens_per_block: Positive | None = None
    enable_block_reuse: bool | None = None
    enable_partial_reuse: bool | None = None
    copy_on_partial_reuse: bool | None = None
    host_cache_size: Natural | None = None
    onboard_blocks: bool | None = None
    secondary_offload_min_priority: Natural | None = None
    event_buffer_max_size: Natural | None = None
    attention_dp_events_gather_period_ms: Positive | None = None
    use_uvm: bool | None = None
    use_kv_cache_manager_v2: bool | None = None
    max_util_for_resume: Share | None = None
    max_attention_window: None = None
    sink_token_length: None = None
    cross_kv_cache_fraction: None = None


class CudaGraphs(_Arguments):
    """Batch sizes of which decoding steps are captured as CUDA graphs."""

    batch_sizes: PositiveList | None = None
    max_batch_size: Natural | None = None
    enable_padding: bool | None = None


class LoadBalancer(_Arguments):
    """Redundant copies of experts (EPLB)."""

    num_slots: Positive | None = None
    layer_updates_per_iter: Natural | None = None


class Moe(_Arguments):
    """How routed experts are computed."""

    backend: (
        Literal["AUTO", "CUTLASS", "CUTEDSL", "WIDEEP", "TRTLLM", "DEEPGEMM", "VANILLA", "TRITON"]
        | None
    ) = None
    max_num_tokens: Positive | None = None
    load_balancer: LoadBalancer | None = None
    disable_finalize_fusion: bool | None = None
    use_low_precision_moe_combine: bool | None = None


class Scheduler(_Arguments):
    """Which requests a step takes."""

    capacity_scheduler_policy: (
        Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH"] | None
    ) = None
    context_chunking_policy: Literal["FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"] | None = None
    waiting_queue_policy: Literal["fcfs", "priority"] | None = None
    dynamic_batch_config: None = None


class Mtp(_Arguments):
    """Speculative decoding with the model's own MTP layers."""

    decoding_type: Literal["MTP"]
    num_nextn_predict_layers: Annotated[int, Field(ge=1, le=16)] | None = None
    max_draft_len: Annotated[int, Field(ge=1, le=16)] | None = None
    max_concurrency: Positive | None = None
    speculative_model: None = None
    use_relaxed_acceptance_for_thinking: bool | None = None
    relaxed_topk: Positive | None = None
    relaxed_delta: Annotated[float, Field(ge=0.0)] | None = None
    use_mtp_vanilla: bool | None = None
    mtp_eagle_one_model: bool | None = None
    begin_thinking_phase_token: Natural | None = None
    end_thinking_phase_token: Natural | None = None


class AttentionDp(_Arguments):
    """Balancing of requests over ranks under attention data parallelism."""

    enable_balance: bool | None = None
    timeout_iters: Natural | None = None
    batching_wait_iters: Natural | None = None
    kv_cache_routing_conversation_affinity: bool | None = None


class TorchCompile(_Arguments):
    """torch.compile of the model."""

    enable_fullgraph: bool | None = None
    enable_inductor: bool | None = None
    enable_piecewise_cuda_graph: bool | None = None
    capture_num_tokens: PositiveList | None = None
    enable_userbuffers: bool | None = None
    max_num_streams: Positive | None = None


class Telemetry(_Arguments):
    """What TensorRT-LLM reports to its makers."""

    disabled: bool | None = None


class LlmArgs(_Arguments):
    """The whole of llm_args.yaml, in the order in which it is written. None is "left out"; an
    explicit null is among `model_fields_set` (`cuda_graph_config: null` turns graphs off)."""

    backend: Literal["pytorch"] | None = None
    tokenizer: None = None
    tokenizer_mode: Literal["auto", "slow"] | None = None
    tokenizer_revision: None = None
    custom_tokenizer: None = None
    revision: None = None
    skip_tokenizer_init: bool | None = None
    trust_remote_code: Literal[False] = False
    dtype: Literal["auto", "bfloat16"] | None = None
    model_kwargs: None = None
    tensor_parallel_size: Positive | None = None
    pipeline_parallel_size: Positive | None = None
    context_parallel_size: Positive | None = None
    pp_partition: None = None
    gpus_per_node: Positive | None = None
    moe_expert_parallel_size: Positive | None = None
    moe_tensor_parallel_size: Positive | None = None
    moe_cluster_parallel_size: Positive | None = None
    enable_attention_dp: bool | None = None
    enable_lm_head_tp_in_adp: bool | None = None
    attention_dp_config: AttentionDp | None = None
    load_format: Literal["auto", "dummy"] | None = None
    checkpoint_format: None = None
    checkpoint_loader: None = None
    max_batch_size: Positive | None = None
    max_num_tokens: Positive | None = None
    max_seq_len: Positive | None = None
    max_input_len: Positive | None = None
    max_beam_width: Positive | None = None
    enable_chunked_prefill: bool | None = None
    kv_cache_config: KvCache | None = None
    cuda_graph_config: CudaGraphs | None = None
    moe_config: Moe | None = None
    scheduler_config: Scheduler | None = None
    speculative_config: Mtp | None = None
    torch_compile_config: TorchCompile | None = None
    attn_backend: Literal["TRTLLM", "VANILLA", "FLASHINFER"] | None = None
    sampler_type: Literal["auto", "TRTLLMSampler", "TorchSampler"] | None = None
    sampler_force_async_worker: bool | None = None
    disable_flashinfer_sampling: bool | None = None
    disable_overlap_scheduler: bool | None = None
    enable_autotuner: bool | None = None
    allreduce_strategy: AllReduce | None = None
    stream_interval: Positive | None = None
    guided_decoding_backend: Literal["xgrammar", "llguidance"] | None = None
    reasoning_parser: Literal["deepseek-r1"] | None = None
    batched_logits_processor: None = None
    gather_generation_logits: bool | None = None
    num_postprocess_workers: Natural | None = None
    postprocess_tokenizer_dir: None = None
    batch_wait_timeout_ms: Annotated[float, Field(ge=0.0)] | None = None
    batch_wait_timeout_iters: Natural | None = None
    batch_wait_max_tokens_ratio: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    garbage_collection_gen0_threshold: Positive | None = None
    fail_fast_on_attention_window_too_large: bool | None = None
    enable_iter_perf_stats: bool | None = None
    enable_iter_req_stats: bool | None = None
    iter_stats_max_iterations: Annotated[int, Field(ge=-1)] | None = None
    request_stats_max_iterations: Annotated[int, Field(ge=-1)] | None = None
    max_stats_len: Annotated[int, Field(ge=-1)] | None = None
    print_iter_log: bool | None = None
    return_perf_metrics: bool | None = None
    perf_metrics_max_requests: Natural | None = None
    otlp_traces_endpoint: Annotated[str, Field(max_length=512)] | None = None
    telemetry_config: Telemetry | None = None
    orchestrator_type: Literal["rpc", "ray"] | None = None
    ray_worker_extension_cls: None = None
    ray_placement_config: None = None
    env_overrides: None = None
    enable_lora: Literal[False] = False
    lora_config: None = None
    peft_cache_config: None = None
    sparse_attention_config: None = None
    cache_transceiver_config: None = None
    kv_connector_config: None = None
    decoding_config: None = None
    force_dynamic_quantization: Literal[False] = False
    enable_min_latency: Literal[False] = False
    enable_layerwise_nvtx_marker: bool | None = None
    mm_encoder_only: Literal[False] = False
    enable_sleep: Literal[False] = False
    sleep_config: None = None


_OTHER_CODE = "it imports other code, which this directory never does"
_OTHER_FILES = "the directory's own files are used"
_ALL_SERVED = "the engine is served whole, prefill and decode in one place"
#: Argument -> why only its neutral value may be given, or (of those that LlmArgs lacks) none.
_REASONS = {
    "quant_config": "the loader refuses it, and takes the format of weights from the directory",
    "model": "the directory is named on the command line",
    "build_config": "there is no TensorRT engine to build; DeepSeek runs on the PyTorch backend",
    "cp_config": "context parallelism was not planned for this engine",
    "nvfp4_gemm_config": "Hopper has no FP4",
    "tokenizer": _OTHER_FILES,
    "tokenizer_revision": _OTHER_FILES,
    "revision": _OTHER_FILES,
    "postprocess_tokenizer_dir": _OTHER_FILES,
    "custom_tokenizer": _OTHER_CODE,
    "trust_remote_code": _OTHER_CODE,
    "checkpoint_format": _OTHER_CODE,
    "checkpoint_loader": _OTHER_CODE,
    "batched_logits_processor": _OTHER_CODE,
    "kv_connector_config": _OTHER_CODE,
    "ray_worker_extension_cls": _OTHER_CODE,
    "ray_placement_config": "placement groups cannot be written in a file",
    "env_overrides": "set variables in the environment of the server",
    "model_kwargs": "it changes the model that was checked",
    "pp_partition": "the engine is divided by tensor and expert parallelism only",
    "enable_lora": "DeepSeek-V3 has no LoRA there",
    "lora_config": "DeepSeek-V3 has no LoRA there",
    "peft_cache_config": "DeepSeek-V3 has no LoRA there",
    "sparse_attention_config": "the loader takes it from config.json",
    "cache_transceiver_config": _ALL_SERVED,
    "decoding_config": "use speculative_config",
    "force_dynamic_quantization": "the engine's input scales are static",
    "enable_min_latency": "it is for Llama 4",
    "mm_encoder_only": "the model reads text only",
    "enable_sleep": "weights would leave the GPUs under the server",
    "sleep_config": "weights would leave the GPUs under the server",
    "kv_cache_config.max_attention_window": "MLA attends to all tokens",
    "kv_cache_config.sink_token_length": "the PyTorch backend ignores it",
    "kv_cache_config.cross_kv_cache_fraction": "the model has no encoder",
    "scheduler_config.dynamic_batch_config": "the PyTorch backend ignores it",
    "speculative_config.speculative_model": "the MTP layers are the directory's own",
}
#: Arguments that the loader takes null for, besides those with a reason above.
_NULL_TAKEN = """
gpus_per_node moe_expert_parallel_size moe_tensor_parallel_size moe_cluster_parallel_size
attention_dp_config max_batch_size max_num_tokens max_seq_len max_input_len max_beam_width
kv_cache_config.max_tokens kv_cache_config.host_cache_size
kv_cache_config.secondary_offload_min_priority cuda_graph_config cuda_graph_config.batch_sizes
moe_config.max_num_tokens moe_config.load_balancer moe_config.load_balancer.num_slots
scheduler_config.context_chunking_policy speculative_config speculative_config.max_concurrency
torch_compile_config torch_compile_config.capture_num_tokens allreduce_strategy
guided_decoding_backend reasoning_parser iter_stats_max_iterations request_stats_max_iterations
otlp_traces_endpoint orchestrator_type
"""
_NULLABLE = frozenset(_NULL_TAKEN.split())
#: Flags of trtllm-serve that are not the names of arguments.
_FLAGS = {
    "tp_size": "tensor_parallel_size",
    "pp_size": "pipeline_parallel_size",
    "ep_size": "moe_expert_parallel_size",
    "kv_cache_dtype": "kv_cache_config.dtype",
    "kv_cache_free_gpu_memory_fraction": "kv_cache_config.free_gpu_memory_fraction",
}
#: (argument, value) -> why the version, or every one, does not take it.
_VALUES: dict[tuple[str, str], str] = {
    ("kv_cache_config.dtype", "int8"): "the PyTorch backend has no INT8 KV cache; use auto or fp8",
    ("kv_cache_config.dtype", "bf16"): "BF16 is called auto there",
    ("kv_cache_config.dtype", "bfloat16"): "BF16 is called auto there",
    ("1.2.1", "moe_config.backend AUTO"): "1.2.1 has no AUTO; use CUTLASS",
    ("1.3.0rc29", "moe_config.backend WIDEEP"): "1.3.0rc29 has no WIDEEP; use CUTLASS",
}


def parse_llm_args(raw: object, version: EngineVersion, *, where: str) -> LlmArgs:
    """The arguments of a version; `where` names the file in the error.

    Raises:
        DeployError: a name is unknown or not one of that version, or a value is wrong; the sentence
            says what to change.
    """
    try:
        args = LlmArgs.model_validate(raw)
    except ValidationError as error:
        raise DeployError(f"{where}: {_problem(error.errors()[0], version)}") from error
    known = known_arguments(version)
    for path, value in _given(args):
        if path not in known:
            raise DeployError(f"{where}: {_unknown(path, version)}")
        if value is None and path not in _NULLABLE and path not in _REASONS:
            raise DeployError(f"{where}: {path}: the loader takes no null here; remove it")
        fault = _VALUES.get((version, f"{path} {value}"))
        if fault:
            raise DeployError(f"{where}: {path}: {fault}")
    return args


def _given(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of every argument that was given, in the order of the schema."""
    for name in type(model).model_fields:
        if name not in model.model_fields_set:
            continue
        value = getattr(model, name)
        yield f"{prefix}{name}", value
        if isinstance(value, BaseModel):
            yield from _given(value, f"{prefix}{name}.")


def _problem(error: ErrorDetails, version: EngineVersion) -> str:
    path = show_name(".".join(str(part) for part in error["loc"] if isinstance(part, str)))
    value = error["input"]
    if path in _REASONS:
        return f"{path}: {_REASONS[path]}; remove it"
    if error["type"] == "extra_forbidden":
        return _unknown(path, version)
    fault = _VALUES.get((path, value)) if isinstance(value, str) else None
    if fault:
        return f"{path}: {fault}"
    message = error["msg"]
    if error["type"] in ("model_type", "model_attributes_type"):
        message = "Input should be a mapping"
    elif error["type"] in ("too_short", "too_long"):
        message = f"Input should be a list of 1 to {MAX_LIST} items"
    if not error["loc"]:
        return message
    return f"{path}: {message}" + ("" if error["type"] == "missing" else f", not {show(value)}")


def _unknown(path: str, version: EngineVersion) -> str:
    others = [name for name, letter in EVIDENCE.get(path, {}).items() if letter != "-"]
    if others and version == "1.2.1":
        return f"{path} is not an argument of TensorRT-LLM 1.2.1, only of {others[0]}; remove it"
    beside = [name for name in known_arguments(version) if name.count(".") == path.count(".")]
    near = difflib.get_close_matches(path[:80], sorted(beside), n=1, cutoff=0.8)
    meant = _FLAGS.get(path) or (near[0] if near else None)
    change = f"did you mean {meant}?" if meant else "remove or correct it"
    if version == "1.2.1":
        return f"{path} is no argument of TensorRT-LLM 1.2.1 that IntServe knows; {change}"
    return f"{path} is not known to us in 1.3.0rc29; {change}"
