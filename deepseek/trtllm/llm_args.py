"""llm_args.yaml: the arguments with which TensorRT-LLM serves an engine directory.

`make_llm_args` chooses them from the plan's numbers, `llm_args_yaml` writes them, `read_llm_args`
reads them back after a user has changed the file:

    trtllm-serve DIR --extra_llm_api_options DIR/llm_args.yaml

What is chosen here holds for DeepSeek-V3 on Hopper. Blocks of the KV cache have 64 tokens, which
FlashMLA needs, and a step's tokens are whole blocks, which chunked prefill needs. CUDA graphs are
captured for as many batch sizes as their memory allows; a batch between two of them is padded.
Nothing is written that names a machine or a path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml

from deepseek.errors import DeployError
from deepseek.trtllm.llm_schema import LlmArgs, parse_llm_args
from deepseek.trtllm.versions import EngineVersion
from deepseek.untrusted import UnusableFileError
from deepseek.yaml_files import parse_yaml_mapping, read_yaml_mapping

LLM_ARGS_FILE = "llm_args.yaml"
#: Tokens of one block of the KV cache. FlashMLA takes no other number.
TOKENS_PER_BLOCK = 64
#: Most bytes of GPU memory that one CUDA graph takes, as the loader's documentation says.
GRAPH_BYTES = 200_000_000
#: Share of what is free after loading that the KV cache takes. With the loader's own 0.9 users ran
#: out of memory (#3486).
KV_FRACTION = 0.85
#: KV format -> the loader's name of it. BF16 is what a directory without a KV method has.
KV_DTYPES: dict[str, Literal["auto", "fp8"]] = {"bf16": "auto", "fp8": "fp8"}


def make_llm_args(
    version: EngineVersion,
    *,
    tp: int,
    ep: int,
    kv_cache: str,
    max_batch_size: int,
    max_num_tokens: int,
    max_seq_len: int,
    kv_tokens: int | None = None,
    kv_fraction: float | None = None,
    gpus_per_node: int = 8,
    graph_bytes: int = 20 * GRAPH_BYTES,
    stream_interval: int = 10,
    mtp: bool = False,
) -> LlmArgs:
    """The arguments for an engine of `tp` ranks whose experts are divided over `ep` groups.

    `max_batch_size` counts requests, `max_num_tokens` the tokens of one step, `max_seq_len` the
    tokens of one request with its answer. `kv_tokens` is the KV cache's size in tokens, the same on
    each rank; without it the cache takes `kv_fraction` of the memory that is free after loading
    (`KV_FRACTION` where that is not given either); with both, the smaller one. `max_num_tokens` and
    `kv_tokens` are rounded down to whole blocks. `graph_bytes` of each GPU may be used for CUDA
    graphs; below `GRAPH_BYTES` none is captured. `stream_interval` is in steps. With `mtp` the
    model's first MTP layer drafts one token.

    Raises:
        DeployError: numbers that exclude each other, in one sentence that names them.
    """
    numbers = {"tp": tp, "ep": ep, "max_batch_size": max_batch_size, "max_seq_len": max_seq_len}
    numbers |= {"gpus_per_node": gpus_per_node, "stream_interval": stream_interval}
    for name, number in numbers.items():
        if number < 1:
            raise DeployError(f"{name} {number} must be at least 1")
    if tp % ep:
        raise DeployError(f"ep {ep} must divide tp {tp}: each group of experts has tp / ep ranks")
    if tp > gpus_per_node and tp % gpus_per_node:
        raise DeployError(
            f"tp {tp} fills no whole nodes of {gpus_per_node} GPUs; use a multiple of that"
        )
    if kv_cache not in KV_DTYPES:
        raise DeployError(
            f"TensorRT-LLM has no {kv_cache} KV cache for this model; use --kv-cache bf16 or fp8"
        )
    step = _whole_blocks("max_num_tokens", max_num_tokens)
    if step < max_batch_size:
        raise DeployError(
            f"max_num_tokens {max_num_tokens} is less than max_batch_size {max_batch_size}, of "
            "which each request takes a token in every step; raise it or lower the other"
        )
    cache: dict[str, Any] = {"dtype": KV_DTYPES[kv_cache]}
    if kv_fraction is not None and not 0.0 < kv_fraction < 1.0:
        raise DeployError(
            f"kv_fraction {kv_fraction} must lie between 0 and 1: it is the share of the free "
            "memory that the KV cache takes"
        )
    if kv_tokens is not None:
        cache["max_tokens"] = _whole_blocks("kv_tokens", kv_tokens)
        if cache["max_tokens"] < max_seq_len:
            raise DeployError(
                f"a KV cache of {kv_tokens} tokens cannot hold one request of max_seq_len "
                f"{max_seq_len}; lower max_seq_len, or give the cache more memory"
            )
    cache["free_gpu_memory_fraction"] = KV_FRACTION if kv_fraction is None else kv_fraction
    raw: dict[str, Any] = {
        "backend": "pytorch",
        "tensor_parallel_size": tp,
        "moe_expert_parallel_size": ep,
        "moe_tensor_parallel_size": tp // ep,
        "max_batch_size": max_batch_size,
        "max_num_tokens": step,
        "max_seq_len": max_seq_len,
        "enable_chunked_prefill": True,
        "kv_cache_config": cache
        | {"tokens_per_block": TOKENS_PER_BLOCK, "enable_block_reuse": True},
        "cuda_graph_config": None,
        "moe_config": {"backend": "CUTLASS"},  # the only one with these formats on Hopper
        "stream_interval": stream_interval,
        "num_postprocess_workers": 0,
        "enable_iter_perf_stats": True,
        "return_perf_metrics": True,
    }
    if tp > gpus_per_node:
        raw["gpus_per_node"] = gpus_per_node
    if graph_bytes >= GRAPH_BYTES:
        sizes = graph_batch_sizes(max_batch_size, graph_bytes // GRAPH_BYTES)
        raw["cuda_graph_config"] = {"batch_sizes": sizes, "enable_padding": True}
    if mtp:
        raw["speculative_config"] = {"decoding_type": "MTP", "num_nextn_predict_layers": 1}
    return parse_llm_args(raw, version, where=LLM_ARGS_FILE)


def graph_batch_sizes(max_batch_size: int, most: int) -> list[int]:
    """At most `most` >= 1 batch sizes up to the largest batch: powers of two, and then even steps,
    as narrow as that many sizes allow."""
    step = max(8, max_batch_size // most // 8 * 8)
    while True:
        powers = {1 << bit for bit in range(step.bit_length()) if 1 << bit < step}
        sizes = {size for size in powers if size < max_batch_size}
        chosen = sorted(sizes | {*range(step, max_batch_size, step), max_batch_size})
        if len(chosen) <= most or step >= max_batch_size:
            return chosen[-most:]
        step += max(8, step // 64 * 8)


def graph_bytes(args: LlmArgs) -> int:
    """Most bytes of each GPU that the CUDA graphs of `args` take, by `GRAPH_BYTES`."""
    graphs = args.cuda_graph_config
    return GRAPH_BYTES * len(graphs.batch_sizes or ()) if graphs is not None else 0


def llm_args_yaml(args: LlmArgs, version: EngineVersion) -> bytes:
    """The file of `args`: what was given, in the order of the schema, the same bytes always."""
    graphs = args.cuda_graph_config
    winner = {
        "1.2.1": "This file wins over flags of that command line.",
        "1.3.0rc29": "Flags of that command line win over this file.",
    }[version]
    comments = [
        f"Arguments of TensorRT-LLM {version}, made by IntServe. Serve this directory DIR with:",
        f"  trtllm-serve DIR --extra_llm_api_options DIR/{LLM_ARGS_FILE}",
        winner,
    ]
    if graphs is not None and graphs.batch_sizes:
        comments.append(
            f"CUDA graphs of {len(graphs.batch_sizes)} batch sizes take up to "
            f"{graph_bytes(args) / 1e9:.1f} GB of each GPU."
        )
    given = args.model_dump(mode="json", exclude_unset=True)
    body = yaml.dump(given, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)
    return ("".join(f"# {line}\n" for line in comments) + body).encode()


def read_llm_args(path: Path, version: EngineVersion, *, root: Path | None = None) -> LlmArgs:
    """Read llm_args.yaml strictly. `root` is the engine directory, which no link may leave.

    Raises:
        DeployError: unreadable, not plain YAML, a key twice, an unknown name, or a wrong value.
    """
    try:
        raw = read_yaml_mapping(path, root=root)
    except UnusableFileError as error:
        raise DeployError(f"{path} {error}") from error
    return parse_llm_args(raw, version, where=str(path))


def llm_args_of(data: bytes, version: EngineVersion, *, where: str) -> LlmArgs:
    """Like `read_llm_args`, for the content of a file whose digest was checked; `where` names it.

    Raises:
        DeployError: as `read_llm_args`.
    """
    try:
        raw = parse_yaml_mapping(data)
    except UnusableFileError as error:
        raise DeployError(f"{where} {error}") from error
    return parse_llm_args(raw, version, where=where)


def _whole_blocks(name: str, tokens: int) -> int:
    if tokens < TOKENS_PER_BLOCK:
        raise DeployError(
            f"{name} {tokens} is less than the {TOKENS_PER_BLOCK} tokens of one block of the KV "
            "cache; raise it"
        )
    return tokens - tokens % TOKENS_PER_BLOCK


class _Dumper(yaml.SafeDumper):
    """Lists in one line; no anchors, which equal lists would get."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: _Dumper, items: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(list, _represent_list)
