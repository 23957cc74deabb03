"""Memory and lengths of llm_args.yaml that are known to go wrong are found."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.linting import LEFT_OUT, RELEASED, Case, check, sentences_without_case

from deepseek.models import DEEPSEEK_V3_2
from deepseek.trtllm import lint_memory

CASES = {
    "NVFP4 KV": Case(
        "refuse", "nvfp4 needs Blackwell; use auto", {"kv_cache_config.dtype": "nvfp4"}
    ),
    "FP8 KV of a BF16 engine": Case(
        "refuse",
        "kv_cache_config.dtype fp8 disagrees with the engine, whose KV cache is bf16",
        {"kv_cache_config.dtype": "fp8"},
    ),
    "BF16 KV of an FP8 release": Case(
        "refuse",
        "auto means BF16 for a release, whose config names no KV format",
        {"enable_chunked_prefill": False, "max_seq_len": 8192},
        RELEASED | {"kv_cache": "fp8"},
    ),
    "FP8 KV of DeepSeek-V3.2": Case(
        "refuse",
        "DeepSeek-V3.2 needs a BF16 KV cache, because on Hopper sparse FlashMLA reads no other",
        {"kv_cache_config.dtype": "fp8"},
        {"kv_cache": "fp8", "config": replace(DEEPSEEK_V3_2, num_nextn_predict_layers=0)},
    ),
    "FP8 KV with chunked prefill": Case(
        "warn",
        "FP8 KV cache with chunked prefill has not been seen to run on Hopper",
        {"kv_cache_config.dtype": "fp8"},
        {"kv_cache": "fp8"},
    ),
    "nearly all memory": Case(
        "warn",
        "free_gpu_memory_fraction 0.9 leaves little for activations",
        {"kv_cache_config.free_gpu_memory_fraction": 0.9},
    ),
    "all memory by default": Case(
        "warn",
        "free_gpu_memory_fraction left out, which is 0.9, leaves little",
        {"kv_cache_config.free_gpu_memory_fraction": LEFT_OUT},
    ),
    "a cache smaller than a request": Case(
        "refuse",
        "kv_cache_config.max_tokens 64 cannot hold one request of max_seq_len 32768",
        {"kv_cache_config.max_tokens": 64},
    ),
    "host memory": Case(
        "warn",
        "with host_cache_size answers held tokens of other prompts on 1.2.0rc0 and rc1",
        {"kv_cache_config.host_cache_size": 1 << 30},
    ),
    "events without reuse": Case(
        "warn",
        "event_buffer_max_size has no effect without enable_block_reuse",
        {
            "kv_cache_config.event_buffer_max_size": 100,
            "kv_cache_config.enable_block_reuse": False,
        },
    ),
    "the second KV manager": Case(
        "warn",
        "use_kv_cache_manager_v2 is a prototype that refused to start",
        {"kv_cache_config.use_kv_cache_manager_v2": True},
        version="1.3.0rc29",
    ),
    "small blocks": Case(
        "refuse",
        "tokens_per_block 32 cannot be used: FlashMLA on Hopper takes blocks of 64 tokens only",
        {"kv_cache_config.tokens_per_block": 32},
    ),
    "blocks by default": Case(
        "warn",
        "tokens_per_block is left out, which is 32 until the loader changes it; set it to 64",
        {"kv_cache_config.tokens_per_block": LEFT_OUT},
    ),
    "half a block": Case(
        "refuse",
        "max_num_tokens 8200 must be a multiple of tokens_per_block 64; use 8192",
        {"max_num_tokens": 8200},
    ),
    "unbounded": Case(
        "warn",
        "max_seq_len is left out, so that one request may fill the KV cache with 163840 tokens",
        {"max_seq_len": LEFT_OUT},
    ),
    "longer than the model": Case(
        "refuse",
        "max_seq_len 163841 is more than the model's 163840 positions; lower it",
        {"max_seq_len": 163_841},
    ),
    "long prompts": Case(
        "warn",
        "without chunked prefill a prompt of more than max_num_tokens 8192 cannot be served",
        {"enable_chunked_prefill": False},
    ),
    "a batch larger than a step": Case(
        "warn",
        "max_batch_size 9000 is more than max_num_tokens 8192",
        {"max_batch_size": 9000},
    ),
    "no graphs": Case(
        "warn",
        "cuda_graph_config null runs every decoding step without CUDA graphs",
        {"cuda_graph_config": None},
    ),
    "graphs that disagree": Case(
        "refuse",
        "cuda_graph_config.max_batch_size 32 must be 64, the largest of batch_sizes, or left out",
        {"cuda_graph_config.max_batch_size": 32},
    ),
    "graphs of larger batches": Case(
        "warn",
        "CUDA graphs of batches of 128 are never used, because max_batch_size is 64",
        {"cuda_graph_config.batch_sizes": [1, 128]},
    ),
    "graphs without padding": Case(
        "warn",
        "without enable_padding only batches of exactly these sizes use a CUDA graph",
        {"cuda_graph_config.enable_padding": False},
    ),
    "too many graphs": Case(
        "warn",
        "CUDA graphs of 64 batch sizes take up to 12.8 GB of each GPU",
        {"cuda_graph_config.batch_sizes": list(range(1, 65))},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_combination_is_found_alone(name: str) -> None:
    check(CASES[name])


def test_every_sentence_has_a_case() -> None:
    assert sentences_without_case(lint_memory, CASES.values()) == []
