"""Combinations of arguments that are known to hang, crash, answer garbage or be ignored.

`lint` looks at llm_args.yaml together with the engine that it belongs to, and returns one finding
for each such combination: `refuse` where serving would fail or answer wrongly, `warn` where it
would be slower or less certain than it looks. `evidence` names the issue or pull request of
TensorRT-LLM (#n), or the part of its source, from which it is known. Most of these the loader takes
without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.config import ModelConfig
from deepseek.trtllm.findings import Case, ExpertFormat, Finding, Rule, refuse, warn
from deepseek.trtllm.layout import Dialect
from deepseek.trtllm.lint_memory import MEMORY_RULES
from deepseek.trtllm.llm_schema import LlmArgs
from deepseek.trtllm.versions import EngineVersion


def lint(
    args: LlmArgs,
    version: EngineVersion,
    *,
    dialect: Dialect,
    config: ModelConfig,
    kv_cache: str,
    experts: Collection[ExpertFormat],
    ranks: RankLayout | None = None,
) -> tuple[Finding, ...]:
    """What is known to go wrong with `args`, refusals first.

    `config` is the directory's config.json (without MTP layers where they were left out),
    `kv_cache` the engine's KV format, `experts` the formats of its routed experts, `ranks` the
    layout that it was planned for.
    """
    case = Case(args, version, dialect, config, kv_cache, frozenset(experts), ranks)
    found = [finding for rule in _RULES for finding in rule(case)]
    return tuple(sorted(found, key=lambda finding: finding.severity != "refuse"))


def _parallel(case: Case) -> Iterator[Finding]:
    args, tp = case.args, case.tp
    cluster = args.moe_cluster_parallel_size or 1
    ep = (
        args.moe_expert_parallel_size
        or tp // ((args.moe_tensor_parallel_size or tp) * cluster)
        or 1
    )
    moe_tp = args.moe_tensor_parallel_size or tp // (ep * cluster) or 1
    names = "moe_expert_parallel_size", "moe_tensor_parallel_size", "tensor_parallel_size"
    if ep * moe_tp * cluster != tp:
        yield refuse(
            f"moe_expert_parallel_size {ep} times moe_tensor_parallel_size {moe_tp} must be "
            f"tensor_parallel_size {tp}; correct one of them",
            "its Mapping",
            *names,
        )
        return
    if case.ranks is not None and (case.ranks.tp, case.ranks.ep) != (tp, ep):
        yield refuse(
            f"the engine was built and checked for tp {case.ranks.tp} and ep {case.ranks.ep}, not "
            f"for tp {tp} and ep {ep}; correct the arguments, or build for that layout",
            "engine.json",
            *names,
        )
    if case.config.num_attention_heads % tp and not args.enable_attention_dp:
        yield refuse(
            f"tensor_parallel_size {tp} does not divide the {case.config.num_attention_heads} "
            "attention heads; use a divisor of them",
            "its MLA module",
            "tensor_parallel_size",
        )
    if case.config.n_routed_experts % ep:
        yield refuse(
            f"moe_expert_parallel_size {ep} does not divide the {case.config.n_routed_experts} "
            "routed experts; use a divisor of them",
            "its MoE module",
            "moe_expert_parallel_size",
        )


def _other_parallel(case: Case) -> Iterator[Finding]:
    args = case.args
    for name in ("pipeline_parallel_size", "context_parallel_size"):
        if (getattr(args, name) or 1) > 1:
            yield refuse(
                f"{name} {getattr(args, name)} was not planned for this engine, whose bytes per "
                "rank were checked for tensor and expert parallelism only; remove it",
                "engine.json",
                name,
            )
    per_node = args.gpus_per_node
    if per_node and case.tp > per_node and case.tp % per_node:
        yield refuse(
            f"tensor_parallel_size {case.tp} fills no whole nodes of gpus_per_node {per_node}; "
            "correct one of them",
            "its Mapping",
            *("gpus_per_node", "tensor_parallel_size"),
        )
    if per_node is None and case.tp > 8:
        yield warn(
            f"with tensor_parallel_size {case.tp} and no gpus_per_node every node counts its own "
            "GPUs; set gpus_per_node, to 8 on most nodes",
            "its TorchLlmArgs",
            "gpus_per_node",
        )


def _attention_dp(case: Case) -> Iterator[Finding]:
    args = case.args
    if args.enable_attention_dp and args.enable_chunked_prefill:
        names = "enable_attention_dp", "enable_chunked_prefill"
        what = "attention data parallelism with chunked prefill stops the service without an error"
        if "int4" in case.experts:
            yield refuse(
                f"{what} at the first prompt longer than max_num_tokens; turn off one of them",
                "#5267",
                *names,
            )
        else:
            yield warn(
                f"{what} at the first prompt longer than max_num_tokens on versions until 0.21; no "
                "fix is named, so try such a prompt before you serve, or turn off one of them",
                "#5267",
                *names,
            )
    if not args.enable_attention_dp:
        for name in ("attention_dp_config", "enable_lm_head_tp_in_adp"):
            if getattr(args, name):
                yield warn(
                    f"{name} is ignored without enable_attention_dp; remove it",
                    "its TorchLlmArgs",
                    name,
                )


def _mtp(case: Case) -> Iterator[Finding]:
    mtp = case.args.speculative_config
    if mtp is None:
        return
    if case.config.num_nextn_predict_layers == 0:
        yield refuse(
            "speculative_config asks for MTP, but the engine has no MTP layer; remove it, or build "
            "the engine with its MTP layers",
            "#6137",
            "speculative_config",
        )
    if mtp.mtp_eagle_one_model is False:
        yield warn(
            "mtp_eagle_one_model false is deprecated, and ignored by 1.3; remove it",
            "its TorchLlmArgs",
            "speculative_config.mtp_eagle_one_model",
        )


def _experts(case: Case) -> Iterator[Finding]:
    backend = case.moe.backend or "CUTLASS"
    if backend not in ("CUTLASS", "AUTO"):
        if case.quantized:
            yield refuse(
                f"moe_config.backend {backend} has no kernel for {case.quantized} experts on "
                "Hopper; use CUTLASS",
                "its MoE methods",
                "moe_config.backend",
            )
        else:
            yield warn(
                f"moe_config.backend {backend} is made for other GPUs than Hopper or is not known "
                "to run there; use CUTLASS",
                "its MoE modules",
                "moe_config.backend",
            )
    if case.moe.load_balancer is not None and case.quantized:
        yield refuse(
            f"moe_config.load_balancer cannot move {case.quantized} experts between ranks; remove "
            "it",
            "its MoE methods",
            "moe_config.load_balancer",
        )
    if case.moe.use_low_precision_moe_combine:
        yield warn(
            "use_low_precision_moe_combine is for NVFP4 experts; remove it",
            "its TorchLlmArgs",
            "moe_config.use_low_precision_moe_combine",
        )
    if case.dialect == "mixed":
        why, evidence = {
            "1.2.1": ("was read in the source of 1.2 and not yet run on a GPU", "#4123"),
            "1.3.0rc29": ("rests on a fix of September 2026 that is taken to be in it", "#18393"),
        }[case.version]
        yield warn(
            f"MIXED_PRECISION in {case.version} {why}; load a few layers first with the variable "
            "TLLM_OVERRIDE_LAYER_NUM, or build with --dialect single",
            evidence,
            "moe_config",
        )


def _serving(case: Case) -> Iterator[Finding]:
    args = case.args
    if args.load_format == "dummy":
        yield refuse(
            "load_format dummy serves random weights; remove it", "its TorchLlmArgs", "load_format"
        )
    if args.attn_backend not in (None, "TRTLLM"):
        yield refuse(
            f"attn_backend {args.attn_backend} does not run FlashMLA, for which the KV cache was "
            "planned; use TRTLLM",
            "its ModelConfig",
            "attn_backend",
        )
    if args.orchestrator_type == "ray":
        yield refuse(
            "orchestrator_type ray reserves GPUs beside those that the replica holds, and waits "
            "for them for ever; remove it, which is MPI",
            "its RayExecutor",
            "orchestrator_type",
        )
    elif args.orchestrator_type == "rpc":
        yield warn(
            "orchestrator_type rpc is a prototype; remove it, which is MPI",
            "#9431",
            "orchestrator_type",
        )
    if args.num_postprocess_workers:
        with_ray = args.orchestrator_type == "ray"
        yield (refuse if with_ray else warn)(
            "num_postprocess_workers must be 0 with orchestrator_type ray; set it to 0"
            if with_ray
            else "num_postprocess_workers above 0 leaked memory, and replaces tokens by text that "
            "IntServe does not use; set it to 0",
            "its RayExecutor" if with_ray else "#13777",
            "num_postprocess_workers",
        )
    policy = args.scheduler_config and args.scheduler_config.capacity_scheduler_policy
    if policy == "STATIC_BATCH":
        yield warn(
            "capacity_scheduler_policy STATIC_BATCH lets new requests wait until a whole batch has "
            "ended; use GUARANTEED_NO_EVICT",
            "its TorchLlmArgs",
            "scheduler_config.capacity_scheduler_policy",
        )
    if args.allreduce_strategy == "LOWPRECISION":
        yield warn(
            "allreduce_strategy LOWPRECISION changes answers, which the gate judged without it; "
            "use AUTO",
            "its TorchLlmArgs",
            "allreduce_strategy",
        )
    if args.torch_compile_config is not None and case.version != "1.2.1":
        yield warn(
            "torch_compile_config failed with DeepSeek on H100 in 1.3.0rc21, and no fix is named; "
            "leave it out",
            "1.3.0rc21",
            "torch_compile_config",
        )


def _telemetry(case: Case) -> Iterator[Finding]:
    args = case.args
    if args.otlp_traces_endpoint:
        yield warn(
            "otlp_traces_endpoint takes the tracer of the whole process: a second engine in it "
            "fails, and spans of the server's own endpoint are lost; set one of the two endpoints",
            "its tracing",
            "otlp_traces_endpoint",
        )
        if not args.return_perf_metrics:
            yield warn(
                "otlp_traces_endpoint writes no span without return_perf_metrics; set it true",
                "its tracing",
                *("return_perf_metrics", "otlp_traces_endpoint"),
            )
    if args.enable_iter_req_stats and not args.enable_iter_perf_stats:
        yield warn(
            "enable_iter_req_stats is ignored without enable_iter_perf_stats; set that true",
            "its TorchLlmArgs",
            *("enable_iter_perf_stats", "enable_iter_req_stats"),
        )
    if args.perf_metrics_max_requests:
        if case.version != "1.2.1":
            yield warn(
                "perf_metrics_max_requests is ignored since finished requests are no longer kept; "
                "remove it",
                "its TorchLlmArgs",
                "perf_metrics_max_requests",
            )
        elif not args.return_perf_metrics:
            yield warn(
                "perf_metrics_max_requests is ignored without return_perf_metrics; set that true",
                "its server",
                *("return_perf_metrics", "perf_metrics_max_requests"),
            )


_RULES: tuple[Rule, ...] = (
    *(_parallel, _other_parallel, _attention_dp, _mtp, _experts),
    *MEMORY_RULES,
    *(_serving, _telemetry),
)
