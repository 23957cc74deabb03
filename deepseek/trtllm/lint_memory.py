"""Rules for the memory and the lengths of llm_args.yaml: KV cache, blocks, batches, CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator

from deepseek.trtllm.findings import Case, Finding, Rule, refuse, warn
from deepseek.trtllm.llm_args import KV_DTYPES, TOKENS_PER_BLOCK, graph_bytes

#: What the loader takes where an argument is left out.
_DEFAULT_BATCH, _DEFAULT_STEP, _DEFAULT_BLOCK, _DEFAULT_KV_FRACTION = 2048, 8192, 32, 0.9
#: Bytes of CUDA graphs above which they are worth a word; `make_llm_args` takes half of it.
_MANY_GRAPH_BYTES = 8_000_000_000


def _kv_format(case: Case) -> Iterator[Finding]:
    dtype = case.kv.dtype or "auto"
    name = "kv_cache_config.dtype"
    if dtype == "nvfp4":
        yield refuse(
            f"{name} nvfp4 needs Blackwell; use {KV_DTYPES[case.kv_cache]}, as the engine has it",
            "its ModelLoader",
            name,
        )
    elif dtype == "fp8" and case.kv_cache != "fp8":
        yield refuse(
            f"{name} fp8 disagrees with the engine, whose KV cache is {case.kv_cache}: its files "
            "and its verdict are for that; use auto, or build with --kv-cache fp8",
            "its ModelConfig",
            name,
        )
    elif dtype == "auto" and case.kv_cache == "fp8" and case.dialect == "released":
        yield refuse(
            f"{name} auto means BF16 for a release, whose config names no KV format, but the "
            "engine was planned with FP8; use fp8",
            "its ModelConfig",
            name,
        )
    if case.kv_cache == "fp8" and case.config.has_indexer:
        yield refuse(
            "DeepSeek-V3.2 needs a BF16 KV cache, because on Hopper sparse FlashMLA reads no "
            "other; build with --kv-cache bf16",
            "Model-Optimizer #763",
            name,
        )
    elif case.kv_cache == "fp8" and case.args.enable_chunked_prefill:
        yield warn(
            "FP8 KV cache with chunked prefill has not been seen to run on Hopper; send one prompt "
            "longer than max_num_tokens before you serve, or set enable_chunked_prefill false",
            "#7107",
            *("enable_chunked_prefill", name),
        )


def _kv_memory(case: Case) -> Iterator[Finding]:
    kv, args = case.kv, case.args
    fraction = kv.free_gpu_memory_fraction
    bounded = kv.max_tokens is not None or bool(kv.max_gpu_total_bytes)
    if (fraction or _DEFAULT_KV_FRACTION) >= _DEFAULT_KV_FRACTION and not (
        fraction is None and bounded
    ):
        shown = "left out, which is 0.9," if fraction is None else f"{fraction}"
        yield warn(
            f"free_gpu_memory_fraction {shown} leaves little for activations, and users ran out "
            "of memory; use 0.85 or less",
            "#3486",
            "kv_cache_config.free_gpu_memory_fraction",
        )
    if kv.max_tokens is not None and args.max_seq_len and kv.max_tokens < args.max_seq_len:
        yield refuse(
            f"kv_cache_config.max_tokens {kv.max_tokens} cannot hold one request of max_seq_len "
            f"{args.max_seq_len}, which would wait for ever; lower max_seq_len or raise the other",
            "#4441",
            *("kv_cache_config.max_tokens", "max_seq_len"),
        )
    if kv.host_cache_size:
        yield warn(
            "with host_cache_size answers held tokens of other prompts on 1.2.0rc0 and rc1; leave "
            "it out, or test that tenants stay apart",
            "#8813",
            "kv_cache_config.host_cache_size",
        )
    if kv.event_buffer_max_size and kv.enable_block_reuse is False:
        yield warn(
            "event_buffer_max_size has no effect without enable_block_reuse; remove it",
            "its KvCacheConfig",
            *("kv_cache_config.event_buffer_max_size", "kv_cache_config.enable_block_reuse"),
        )
    if kv.use_kv_cache_manager_v2:
        yield warn(
            "use_kv_cache_manager_v2 is a prototype that refused to start in 1.3.0rc26 although "
            "memory was free; leave it out",
            "1.3.0rc26",
            "kv_cache_config.use_kv_cache_manager_v2",
        )


def _blocks(case: Case) -> Iterator[Finding]:
    block = case.kv.tokens_per_block
    name = "kv_cache_config.tokens_per_block"
    if block is not None and block != TOKENS_PER_BLOCK:
        yield refuse(
            f"tokens_per_block {block} cannot be used: FlashMLA on Hopper takes blocks of "
            f"{TOKENS_PER_BLOCK} tokens only; set it to {TOKENS_PER_BLOCK}",
            "#9141",
            name,
        )
    elif block is None:
        yield warn(
            f"tokens_per_block is left out, which is {_DEFAULT_BLOCK} until the loader changes it; "
            f"set it to {TOKENS_PER_BLOCK}",
            "#9141",
            name,
        )
    step = case.args.max_num_tokens or _DEFAULT_STEP
    if case.args.enable_chunked_prefill and step % (block or TOKENS_PER_BLOCK):
        yield refuse(
            f"with chunked prefill max_num_tokens {step} must be a multiple of tokens_per_block "
            f"{block or TOKENS_PER_BLOCK}; use {step - step % (block or TOKENS_PER_BLOCK)}",
            "its DeepSeek-V3 README",
            *("max_num_tokens", name, "enable_chunked_prefill"),
        )


def _lengths(case: Case) -> Iterator[Finding]:
    args = case.args
    positions, step = case.config.max_position_embeddings, args.max_num_tokens or _DEFAULT_STEP
    if args.max_seq_len is None:
        yield warn(
            f"max_seq_len is left out, so that one request may fill the KV cache with {positions} "
            "tokens; set it",
            "its TorchLlmArgs",
            "max_seq_len",
        )
    elif args.max_seq_len > positions:
        yield refuse(
            f"max_seq_len {args.max_seq_len} is more than the model's {positions} positions; "
            "lower it",
            "config.json",
            "max_seq_len",
        )
    if not args.enable_chunked_prefill and (args.max_seq_len or positions) > step:
        yield warn(
            f"without chunked prefill a prompt of more than max_num_tokens {step} cannot be served "
            "and was seen to hang the engine; set enable_chunked_prefill true",
            "#4441",
            *("enable_chunked_prefill", "max_num_tokens"),
        )
    batch = args.max_batch_size or _DEFAULT_BATCH
    if batch > step:
        yield warn(
            f"max_batch_size {batch} is more than max_num_tokens {step}, so that no step can hold "
            "such a batch; lower it",
            "its TorchLlmArgs",
            *("max_batch_size", "max_num_tokens"),
        )


def _cuda_graphs(case: Case) -> Iterator[Finding]:
    args = case.args
    if args.cuda_graph_config is None:
        if "cuda_graph_config" in args.model_fields_set:
            yield warn(
                "cuda_graph_config null runs every decoding step without CUDA graphs, which is "
                "much slower at small batches; give batch sizes",
                "its TorchLlmArgs",
                "cuda_graph_config",
            )
        return
    graphs = args.cuda_graph_config
    sizes = graphs.batch_sizes or ()
    if sizes and graphs.max_batch_size and graphs.max_batch_size != max(sizes):
        yield refuse(
            f"cuda_graph_config.max_batch_size {graphs.max_batch_size} must be {max(sizes)}, the "
            "largest of batch_sizes, or left out",
            "its TorchLlmArgs",
            *("cuda_graph_config.max_batch_size", "cuda_graph_config.batch_sizes"),
        )
    batch = args.max_batch_size or _DEFAULT_BATCH
    largest = max(sizes, default=graphs.max_batch_size or 0)
    if largest > batch:
        yield warn(
            f"CUDA graphs of batches of {largest} are never used, because max_batch_size is "
            f"{batch}; remove them",
            "its PyTorchModelEngine",
            *("cuda_graph_config.batch_sizes", "max_batch_size"),
        )
    if sizes and not graphs.enable_padding:
        yield warn(
            "without enable_padding only batches of exactly these sizes use a CUDA graph; set it "
            "true",
            "its TorchLlmArgs",
            "cuda_graph_config.enable_padding",
        )
    if graph_bytes(args) > _MANY_GRAPH_BYTES:
        yield warn(
            f"CUDA graphs of {len(sizes)} batch sizes take up to {graph_bytes(args) / 1e9:.1f} GB "
            "of each GPU, which the plan does not leave free; list fewer",
            "its TorchLlmArgs",
            "cuda_graph_config.batch_sizes",
        )


MEMORY_RULES: tuple[Rule, ...] = (_kv_format, _kv_memory, _blocks, _lengths, _cuda_graphs)
