"""Every combination that is known to go wrong is found, and what is written has none of them."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from itertools import product

import pytest
from support.linting import (
    LEFT_OUT,
    RELEASED,
    WITHOUT_MTP,
    Case,
    check,
    found,
    sentences_without_case,
)

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.models import DEEPSEEK_V3
from deepseek.trtllm.layout import DIALECTS
from deepseek.trtllm.lint import lint
from deepseek.trtllm.llm_args import KV_DTYPES, make_llm_args
from deepseek.trtllm.versions import VERSIONS, EngineVersion

CASES = {
    "experts of no layout": Case(
        "refuse",
        "size 4 times moe_tensor_parallel_size 1 must be tensor_parallel_size 8; correct one",
        {"moe_expert_parallel_size": 4},
    ),
    "experts of a clustered layout": Case(
        "refuse", "must be tensor_parallel_size 8", {"moe_cluster_parallel_size": 2}
    ),
    "another layout than the engine's": Case(
        "refuse",
        "the engine was built and checked for tp 8 and ep 8, not for tp 4 and ep 4",
        {"tensor_parallel_size": 4, "moe_expert_parallel_size": 4},
    ),
    "experts divided in width only, unasked": Case(
        "refuse",
        "not for tp 8 and ep 1",
        {"moe_expert_parallel_size": LEFT_OUT, "moe_tensor_parallel_size": LEFT_OUT},
    ),
    "heads": Case(
        "refuse",
        "tensor_parallel_size 8 does not divide the 20 attention heads",
        {},
        {"config": replace(WITHOUT_MTP, num_attention_heads=20)},
    ),
    "experts": Case(
        "refuse",
        "moe_expert_parallel_size 8 does not divide the 12 routed experts",
        {},
        {"config": replace(WITHOUT_MTP, n_routed_experts=12, n_group=4)},
    ),
    "pipeline": Case(
        "refuse",
        "pipeline_parallel_size 2 was not planned for this engine",
        {"pipeline_parallel_size": 2},
    ),
    "context parallel": Case(
        "refuse", "context_parallel_size 2 was not planned", {"context_parallel_size": 2}
    ),
    "broken nodes": Case(
        "refuse",
        "tensor_parallel_size 8 fills no whole nodes of gpus_per_node 3",
        {"gpus_per_node": 3},
    ),
    "two nodes": Case(
        "warn",
        "with tensor_parallel_size 16 and no gpus_per_node every node counts its own GPUs",
        {"tensor_parallel_size": 16, "moe_expert_parallel_size": 16},
        {"ranks": RankLayout(tp=16, ep=16)},
    ),
    "attention DP, chunked prefill and W4A8": Case(
        "refuse",
        "attention data parallelism with chunked prefill stops the service without an error at the "
        "first prompt longer than max_num_tokens; turn off one",
        {"enable_attention_dp": True},
    ),
    "attention DP and chunked prefill": Case(
        "warn",
        "on versions until 0.21; no fix is named",
        {"enable_attention_dp": True},
        RELEASED,
    ),
    "balance without attention DP": Case(
        "warn",
        "attention_dp_config is ignored without enable_attention_dp; remove it",
        {"attention_dp_config": {"enable_balance": True}},
    ),
    "head without attention DP": Case(
        "warn", "enable_lm_head_tp_in_adp is ignored", {"enable_lm_head_tp_in_adp": True}
    ),
    "MTP without its layer": Case(
        "refuse",
        "speculative_config asks for MTP, but the engine has no MTP layer",
        {"speculative_config": {"decoding_type": "MTP"}},
    ),
    "MTP with two models": Case(
        "warn",
        "mtp_eagle_one_model false is deprecated",
        {"speculative_config": {"decoding_type": "MTP", "mtp_eagle_one_model": False}},
        {"config": DEEPSEEK_V3},
    ),
    "experts of another kernel": Case(
        "refuse",
        "moe_config.backend DEEPGEMM has no kernel for INT4 experts on Hopper; use CUTLASS",
        {"moe_config.backend": "DEEPGEMM"},
    ),
    "INT8 experts of another kernel": Case(
        "refuse",
        "moe_config.backend TRITON has no kernel for INT4 and INT8 experts on Hopper",
        {"moe_config.backend": "TRITON"},
        {"experts": ("int8", "int4")},
    ),
    "FP8 experts of another kernel": Case(
        "warn",
        "moe_config.backend TRTLLM is made for other GPUs than Hopper",
        {"moe_config.backend": "TRTLLM"},
        RELEASED,
    ),
    "balanced INT4 experts": Case(
        "refuse",
        "moe_config.load_balancer cannot move INT4 experts between ranks",
        {"moe_config.load_balancer": {"num_slots": 288}},
    ),
    "low precision combine": Case(
        "warn",
        "use_low_precision_moe_combine is for NVFP4 experts",
        {"moe_config.use_low_precision_moe_combine": True},
    ),
    "mixed precision in 1.2": Case(
        "warn",
        "MIXED_PRECISION in 1.2.1 was read in the source of 1.2 and not yet run on a GPU",
        {},
        {"dialect": "mixed"},
    ),
    "mixed precision in 1.3": Case(
        "warn",
        "MIXED_PRECISION in 1.3.0rc29 rests on a fix of September 2026",
        {},
        {"dialect": "mixed"},
        "1.3.0rc29",
    ),
    "random weights": Case(
        "refuse", "load_format dummy serves random weights", {"load_format": "dummy"}
    ),
    "another attention": Case(
        "refuse",
        "attn_backend FLASHINFER does not run FlashMLA",
        {"attn_backend": "FLASHINFER"},
    ),
    "the Ray orchestrator": Case(
        "refuse",
        "orchestrator_type ray reserves GPUs beside those that the replica holds",
        {"orchestrator_type": "ray"},
    ),
    "the RPC orchestrator": Case(
        "warn", "orchestrator_type rpc is a prototype", {"orchestrator_type": "rpc"}
    ),
    "postprocess workers": Case(
        "warn",
        "num_postprocess_workers above 0 leaked memory",
        {"num_postprocess_workers": 4},
    ),
    "whole batches": Case(
        "warn",
        "capacity_scheduler_policy STATIC_BATCH lets new requests wait",
        {"scheduler_config": {"capacity_scheduler_policy": "STATIC_BATCH"}},
    ),
    "rough sums": Case(
        "warn",
        "allreduce_strategy LOWPRECISION changes answers",
        {"allreduce_strategy": "LOWPRECISION"},
    ),
    "compiled": Case(
        "warn",
        "torch_compile_config failed with DeepSeek on H100 in 1.3.0rc21",
        {"torch_compile_config": {}},
        version="1.3.0rc29",
    ),
    "two endpoints": Case(
        "warn",
        "otlp_traces_endpoint takes the tracer of the whole process",
        {"otlp_traces_endpoint": "http://collector:4317"},
    ),
    "request statistics alone": Case(
        "warn",
        "enable_iter_req_stats is ignored without enable_iter_perf_stats",
        {"enable_iter_req_stats": True, "enable_iter_perf_stats": False},
    ),
    "metrics that are not kept": Case(
        "warn",
        "perf_metrics_max_requests is ignored since finished requests are no longer kept",
        {"perf_metrics_max_requests": 100},
        version="1.3.0rc29",
    ),
    "metrics that are not taken": Case(
        "warn",
        "perf_metrics_max_requests is ignored without return_perf_metrics",
        {"perf_metrics_max_requests": 100, "return_perf_metrics": False},
    ),
}
#: Cases in which one combination makes another.
TWO_FINDINGS = {
    "postprocess workers of Ray": Case(
        "refuse",
        "num_postprocess_workers must be 0 with orchestrator_type ray",
        {"num_postprocess_workers": 4, "orchestrator_type": "ray"},
    ),
    "spans without metrics": Case(
        "warn",
        "otlp_traces_endpoint writes no span without return_perf_metrics",
        {"otlp_traces_endpoint": "http://collector:4317", "return_perf_metrics": False},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_combination_is_found_alone(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize("name", TWO_FINDINGS)
def test_a_combination_in_another_is_found_too(name: str) -> None:
    case = TWO_FINDINGS[name]
    findings = found(case)
    assert len(findings) == 2
    assert any(case.sentence in each.sentence for each in findings)
    assert case.severity in [each.severity for each in findings]


def test_every_sentence_has_a_case() -> None:
    cases = (CASES | TWO_FINDINGS).values()
    assert sentences_without_case(import_module("deepseek.trtllm.lint"), cases) == []


def test_refusals_come_first() -> None:
    changes = {"max_seq_len": LEFT_OUT, "load_format": "dummy", "num_postprocess_workers": 1}
    severities = [each.severity for each in found(Case("", "", changes))]
    assert severities == ["refuse", "warn", "warn"]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_written_for_an_engine_is_never_refused(version: EngineVersion) -> None:
    layouts = [
        (tp, ep) for tp in (1, 2, 4, 8, 16, 32) for ep in (1, 2, 4, 8, 16, 32) if tp % ep == 0
    ]
    formats = [("int4",), ("int8",), ("int4", "int8")]
    for (tp, ep), kv_cache, dialect, mtp in product(layouts, KV_DTYPES, DIALECTS, (False, True)):
        args = make_llm_args(
            version,
            tp=tp,
            ep=ep,
            kv_cache=kv_cache,
            max_batch_size=64,
            max_num_tokens=8192,
            max_seq_len=32768,
            mtp=mtp,
        )
        for experts in formats if dialect != "released" else [("fp8-block",)]:
            findings = lint(
                args,
                version,
                dialect=dialect,
                config=DEEPSEEK_V3 if mtp else WITHOUT_MTP,
                kv_cache=kv_cache,
                experts=experts,
                ranks=RankLayout(tp=tp, ep=ep),
            )
            assert not [each for each in findings if each.severity == "refuse"]
            names = {each.arguments[0] for each in findings}
            assert names <= {"moe_config", "enable_chunked_prefill"}


def test_nothing_is_said_of_an_engine_as_it_was_written() -> None:
    assert found(Case("", "", {})) == ()
