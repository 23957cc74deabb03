"""The versions of TensorRT-LLM that engines are built for, and what is known of their arguments.

`_ARGUMENTS` has one row for each argument of `tensorrt_llm.LLM` that IntServe writes or accepts in
llm_args.yaml, and says for each version how we know that it is there. The loader refuses a name
that it does not have, so an argument without a source is refused here first:

    A  in the list of arguments that was read from the wheel of 1.2.1
    D  ai-dynamo 1.6.1, which is pinned to 1.3.0rc29, passes it
    S  in two published lists of the loader's arguments (its `llm_args_golden_manifest.json`), one
       from before 17 August 2026 and one from September 2026, around which 1.3.0rc29 was made
    L  in the source of the loader's arguments of that September (free text and objects, which those
       lists leave out)
    -  absent, or not known to us
"""

from __future__ import annotations

from typing import Literal, get_args

from deepseek.errors import DeployError
from deepseek.untrusted import show_name

#: The newest general release, and the newest candidate that is known to be in use.
EngineVersion = Literal["1.2.1", "1.3.0rc29"]
VERSIONS: tuple[EngineVersion, ...] = get_args(EngineVersion)

_MIXED = (
    "it aborts on the mixed-precision config of this target (the fix, #18393, is of September 2026)"
)
#: Versions with a known fault that no argument avoids. Candidates of 1.3.0 before 26 share one.
_BROKEN = {
    "1.2.0rc0": "with host KV offload it answers with tokens of other prompts (#8813)",
    "1.2.0rc1": "with host KV offload it answers with tokens of other prompts (#8813)",
    "1.3.0rc20": "DeepSeek-V3 hangs in its warm-up",
    "1.3.0rc26": "its second KV manager refuses to start although memory is free",
    "1.3.0rc27": "its image has an Open MPI that cannot spawn ranks, so that LLM() never returns",
} | {f"1.3.0rc{n}": _MIXED for n in range(1, 26) if n != 20}


def require_version(name: str) -> EngineVersion:
    """The version by name.

    Raises:
        DeployError: it is none that engines are built for.
    """
    for version in VERSIONS:
        if version == name:
            return version
    fault = _BROKEN.get(name)
    what = f"is not built for: {fault}" if fault else "is not known to us"
    raise DeployError(
        f"TensorRT-LLM {show_name(name)} {what}; use --engine-version {' or '.join(VERSIONS)}"
    )


_ARGUMENTS = """
backend                                                       A D
tokenizer                                                     A L
tokenizer_mode                                                A S
tokenizer_revision                                            A L
custom_tokenizer                                              A L
revision                                                      A L
skip_tokenizer_init                                           A D
trust_remote_code                                             A D
dtype                                                         A S
model_kwargs                                                  - L
tensor_parallel_size                                          A D
pipeline_parallel_size                                        A D
context_parallel_size                                         A S
pp_partition                                                  A S
gpus_per_node                                                 A D
moe_expert_parallel_size                                      A D
moe_tensor_parallel_size                                      A S
moe_cluster_parallel_size                                     A S
enable_attention_dp                                           A D
enable_lm_head_tp_in_adp                                      A S
attention_dp_config                                           A S
attention_dp_config.enable_balance                            A S
attention_dp_config.timeout_iters                             A S
attention_dp_config.batching_wait_iters                       A S
attention_dp_config.kv_cache_routing_conversation_affinity    - D
load_format                                                   A D
checkpoint_format                                             A L
checkpoint_loader                                             A L
max_batch_size                                                A D
max_num_tokens                                                A D
max_seq_len                                                   A D
max_input_len                                                 A S
max_beam_width                                                A D
enable_chunked_prefill                                        A S
kv_cache_config                                               A D
kv_cache_config.dtype                                         A S
kv_cache_config.free_gpu_memory_fraction                      A D
kv_cache_config.max_tokens                                    A S
kv_cache_config.max_gpu_total_bytes                           A S
kv_cache_config.tokens_per_block                              A S
kv_cache_config.enable_block_reuse                            A S
kv_cache_config.enable_partial_reuse                          A D
kv_cache_config.copy_on_partial_reuse                         A S
kv_cache_config.host_cache_size                               A S
kv_cache_config.onboard_blocks                                A -
kv_cache_config.secondary_offload_min_priority                A S
kv_cache_config.event_buffer_max_size                         A D
kv_cache_config.attention_dp_events_gather_period_ms          A S
kv_cache_config.use_uvm                                       A S
kv_cache_config.max_attention_window                          A S
kv_cache_config.sink_token_length                             A S
kv_cache_config.cross_kv_cache_fraction                       A S
kv_cache_config.use_kv_cache_manager_v2                       - D
kv_cache_config.max_util_for_resume                           - S
cuda_graph_config                                             A S
cuda_graph_config.batch_sizes                                 A S
cuda_graph_config.max_batch_size                              A S
cuda_graph_config.enable_padding                              A S
moe_config                                                    A S
moe_config.backend                                            A S
moe_config.max_num_tokens                                     A S
moe_config.load_balancer                                      A L
moe_config.load_balancer.num_slots                            A L
moe_config.load_balancer.layer_updates_per_iter               A L
moe_config.disable_finalize_fusion                            A S
moe_config.use_low_precision_moe_combine                      A S
scheduler_config                                              A D
scheduler_config.capacity_scheduler_policy                    A D
scheduler_config.context_chunking_policy                      A S
scheduler_config.dynamic_batch_config                         A D
scheduler_config.waiting_queue_policy                         - S
speculative_config                                            A S
speculative_config.decoding_type                              A S
speculative_config.num_nextn_predict_layers                   A S
speculative_config.max_draft_len                              A S
speculative_config.max_concurrency                            A S
speculative_config.speculative_model                          A L
speculative_config.use_relaxed_acceptance_for_thinking        A S
speculative_config.relaxed_topk                               A S
speculative_config.relaxed_delta                              A S
speculative_config.use_mtp_vanilla                            A S
speculative_config.mtp_eagle_one_model                        A S
speculative_config.begin_thinking_phase_token                 A S
speculative_config.end_thinking_phase_token                   A S
torch_compile_config                                          A S
torch_compile_config.enable_fullgraph                         A S
torch_compile_config.enable_inductor                          A S
torch_compile_config.enable_piecewise_cuda_graph              A S
torch_compile_config.capture_num_tokens                       A S
torch_compile_config.enable_userbuffers                       A S
torch_compile_config.max_num_streams                          A S
attn_backend                                                  A S
sampler_type                                                  A -
sampler_force_async_worker                                    A S
disable_flashinfer_sampling                                   A -
disable_overlap_scheduler                                     A S
enable_autotuner                                              A S
allreduce_strategy                                            A S
stream_interval                                               A S
guided_decoding_backend                                       A D
reasoning_parser                                              A S
batched_logits_processor                                      A L
gather_generation_logits                                      A S
num_postprocess_workers                                       A S
postprocess_tokenizer_dir                                     A L
batch_wait_timeout_ms                                         A S
batch_wait_timeout_iters                                      A S
batch_wait_max_tokens_ratio                                   A S
garbage_collection_gen0_threshold                             A S
fail_fast_on_attention_window_too_large                       A -
enable_iter_perf_stats                                        A D
enable_iter_req_stats                                         A S
iter_stats_max_iterations                                     A S
request_stats_max_iterations                                  A S
max_stats_len                                                 A S
print_iter_log                                                A S
return_perf_metrics                                           A D
perf_metrics_max_requests                                     A S
otlp_traces_endpoint                                          A L
telemetry_config                                              - S
telemetry_config.disabled                                     - S
orchestrator_type                                             A S
ray_worker_extension_cls                                      A L
ray_placement_config                                          A L
env_overrides                                                 A L
enable_lora                                                   A S
lora_config                                                   A L
peft_cache_config                                             A L
sparse_attention_config                                       A L
cache_transceiver_config                                      A L
kv_connector_config                                           A D
decoding_config                                               A L
force_dynamic_quantization                                    A S
enable_min_latency                                            A S
enable_layerwise_nvtx_marker                                  A S
mm_encoder_only                                               A S
enable_sleep                                                  A -
sleep_config                                                  - D
"""

_ROWS = [row.split() for row in _ARGUMENTS.split("\n") if row]
#: Argument, by its path in llm_args.yaml -> version -> how we know that it is there.
EVIDENCE: dict[str, dict[EngineVersion, str]] = {
    path: dict(zip(VERSIONS, letters, strict=True)) for path, *letters in _ROWS
}


def known_arguments(version: EngineVersion) -> frozenset[str]:
    """Paths of the arguments that the version is known to have."""
    return frozenset(path for path, known in EVIDENCE.items() if known[version] != "-")
