"""llm_args.yaml is chosen from numbers, written the same always, and read strictly."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import DeployError
from deepseek.trtllm.llm_args import (
    GRAPH_BYTES,
    LLM_ARGS_FILE,
    graph_batch_sizes,
    graph_bytes,
    llm_args_of,
    llm_args_yaml,
    make_llm_args,
    read_llm_args,
)
from deepseek.trtllm.llm_schema import LlmArgs, parse_llm_args
from deepseek.trtllm.versions import VERSIONS, EngineVersion

NUMBERS: dict[str, Any] = {
    "tp": 8,
    "ep": 8,
    "kv_cache": "fp8",
    "max_batch_size": 64,
    "max_num_tokens": 8192,
    "max_seq_len": 32768,
}

#: Nine lists of nine aliases each of the one before.
BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)

WRITTEN = """\
# Arguments of TensorRT-LLM 1.2.1, made by IntServe. Serve this directory DIR with:
#   trtllm-serve DIR --extra_llm_api_options DIR/llm_args.yaml
# This file wins over flags of that command line.
# CUDA graphs of 11 batch sizes take up to 2.2 GB of each GPU.
backend: pytorch
tensor_parallel_size: 8
moe_expert_parallel_size: 8
moe_tensor_parallel_size: 1
max_batch_size: 64
max_num_tokens: 8192
max_seq_len: 32768
enable_chunked_prefill: true
kv_cache_config:
  dtype: fp8
  free_gpu_memory_fraction: 0.85
  tokens_per_block: 64
  enable_block_reuse: true
cuda_graph_config:
  batch_sizes: [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
  enable_padding: true
moe_config:
  backend: CUTLASS
stream_interval: 10
num_postprocess_workers: 0
enable_iter_perf_stats: true
return_perf_metrics: true
"""


def make(version: EngineVersion = "1.2.1", **numbers: Any) -> LlmArgs:
    return make_llm_args(version, **NUMBERS | numbers)


def given_args(args: LlmArgs) -> dict[str, Any]:
    return args.model_dump(mode="json", exclude_unset=True)


def test_the_file_says_how_it_is_used_and_what_was_chosen() -> None:
    assert llm_args_yaml(make(), "1.2.1").decode() == WRITTEN


def test_later_versions_let_flags_win() -> None:
    text = llm_args_yaml(make("1.3.0rc29"), "1.3.0rc29").decode()
    assert "# Flags of that command line win over this file.\n" in text
    assert "TensorRT-LLM 1.3.0rc29" in text


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_written_is_read_back(version: EngineVersion, tmp_path: Path) -> None:
    path = tmp_path / LLM_ARGS_FILE
    for mtp, kv_tokens, graphs in product((False, True), (None, 200_000), (0, 10**10)):
        args = make(version, mtp=mtp, kv_tokens=kv_tokens, graph_bytes=graphs)
        path.write_bytes(llm_args_yaml(args, version))
        again = read_llm_args(path, version, root=tmp_path)
        assert given_args(again) == given_args(args)
        assert llm_args_yaml(again, version) == path.read_bytes()
        assert llm_args_of(path.read_bytes(), version, where="f") == again


def test_what_the_loaders_yaml_reads_is_what_was_meant() -> None:
    assert yaml.safe_load(WRITTEN) == given_args(make())


def test_layouts_and_formats_become_the_loaders_names() -> None:
    args = given_args(make(tp=16, ep=4, kv_cache="bf16", mtp=True, kv_tokens=100_001))
    assert args["tensor_parallel_size"] == 16
    assert args["moe_expert_parallel_size"] == 4
    assert args["moe_tensor_parallel_size"] == 4
    assert args["gpus_per_node"] == 8
    assert args["kv_cache_config"]["dtype"] == "auto"
    assert args["kv_cache_config"]["max_tokens"] == 99_968  # whole blocks
    assert args["speculative_config"] == {"decoding_type": "MTP", "num_nextn_predict_layers": 1}
    assert "gpus_per_node" not in given_args(make())


def test_a_step_is_whole_blocks() -> None:
    assert make(max_num_tokens=8191).max_num_tokens == 8128


def test_nothing_written_chooses_a_weight_format_or_runs_other_code() -> None:
    for version in VERSIONS:
        text = llm_args_yaml(make(version, mtp=True), version).decode()
        for word in ("quant", "trust_remote_code", "model:", "tokenizer", "/home", "/tmp"):
            assert word not in text


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"ep": 3}, "ep 3 must divide tp 8: each group of experts has tp / ep ranks"),
        ({"ep": 16}, "ep 16 must divide tp 8"),
        ({"tp": 0}, "tp 0 must be at least 1"),
        ({"ep": -1}, "ep -1 must be at least 1"),
        ({"tp": 12, "ep": 4}, "tp 12 fills no whole nodes of 8 GPUs; use a multiple of that"),
        ({"kv_cache": "int8"}, "TensorRT-LLM has no int8 KV cache for this model; use --kv-cache"),
        ({"max_num_tokens": 63}, "max_num_tokens 63 is less than the 64 tokens of one block"),
        ({"max_batch_size": 9000}, "max_num_tokens 8192 is less than max_batch_size 9000"),
        ({"max_batch_size": 0}, "max_batch_size 0 must be at least 1"),
        ({"max_seq_len": 0}, "max_seq_len 0 must be at least 1"),
        ({"stream_interval": 0}, "stream_interval 0 must be at least 1"),
        ({"kv_fraction": 1.5}, "kv_fraction 1.5 must lie between 0 and 1"),
        ({"kv_fraction": 0.0}, "kv_fraction 0.0 must lie between 0 and 1"),
        ({"kv_tokens": 10}, "kv_tokens 10 is less than the 64 tokens of one block"),
        (
            {"kv_tokens": 32767},
            "a KV cache of 32767 tokens cannot hold one request of max_seq_len 32768; lower",
        ),
    ],
)
def test_numbers_that_exclude_each_other_get_one_sentence(
    numbers: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DeployError) as caught:
        make(**numbers)
    assert sentence in str(caught.value)


@given(batch=st.integers(1, 4096), most=st.integers(1, 64))
def test_graph_sizes_are_few_rising_and_end_with_the_largest_batch(batch: int, most: int) -> None:
    sizes = graph_batch_sizes(batch, most)
    assert 1 <= len(sizes) <= most
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == batch
    assert sizes[0] >= 1
    if most >= batch.bit_length() + 1:  # enough for the powers of two
        assert sizes[0] == 1
        assert all(b <= 2 * a for a, b in zip(sizes, sizes[1:], strict=False))


def test_a_large_batch_takes_no_longer_than_a_small_one() -> None:
    assert graph_batch_sizes(10**12, 20)[-1] == 10**12


def test_graphs_keep_their_budget_and_without_one_there_are_none() -> None:
    for budget in (GRAPH_BYTES, 3 * GRAPH_BYTES, 5 * 10**9):
        assert 0 < graph_bytes(make(graph_bytes=budget, max_batch_size=512)) <= budget
    none = make(graph_bytes=GRAPH_BYTES - 1)
    assert given_args(none)["cuda_graph_config"] is None
    assert graph_bytes(none) == 0


#: Content of the file -> the sentence, in 1.2.1 and in 1.3.0rc29 (None: it is read).
REFUSED: dict[str, tuple[str | None, str | None]] = {
    "tp_size: 8": (
        "tp_size is no argument of TensorRT-LLM 1.2.1 that IntServe knows; did you mean "
        "tensor_parallel_size?",
        "tp_size is not known to us in 1.3.0rc29; did you mean tensor_parallel_size?",
    ),
    "max_batch_sise: 8": (
        "max_batch_sise is no argument of TensorRT-LLM 1.2.1 that IntServe knows; did you mean "
        "max_batch_size?",
        "max_batch_sise is not known to us in 1.3.0rc29; did you mean max_batch_size?",
    ),
    "dwdp_config: {}": (
        "dwdp_config is no argument of TensorRT-LLM 1.2.1 that IntServe knows; remove or correct",
        "dwdp_config is not known to us in 1.3.0rc29; remove or correct it",
    ),
    "kv_cache_config: {pool_ratio: [1.0]}": (
        "kv_cache_config.pool_ratio is no argument of TensorRT-LLM 1.2.1 that IntServe knows",
        "kv_cache_config.pool_ratio is not known to us in 1.3.0rc29",
    ),
    "kv_cache_config: {max_util_for_resume: 0.9}": (
        "kv_cache_config.max_util_for_resume is not an argument of TensorRT-LLM 1.2.1, only of "
        "1.3.0rc29; remove it",
        None,
    ),
    "sampler_type: auto": (None, "sampler_type is not known to us in 1.3.0rc29"),
    "kv_cache_config: {onboard_blocks: true}": (
        None,
        "kv_cache_config.onboard_blocks is not known to us in 1.3.0rc29",
    ),
    "moe_config: {backend: AUTO}": ("moe_config.backend: 1.2.1 has no AUTO; use CUTLASS", None),
    "moe_config: {backend: WIDEEP}": (None, "moe_config.backend: 1.3.0rc29 has no WIDEEP; use"),
}
#: The same in both versions.
REFUSED |= {
    text: (sentence, sentence)
    for text, sentence in {
        "quant_config: null": "quant_config: the loader refuses it, and takes the format of",
        "quant_config: {quant_algo: FP8}": "quant_config: the loader refuses it",
        "model: /x": "model: the directory is named on the command line; remove it",
        "trust_remote_code: true": "trust_remote_code: it imports other code",
        "trust_remote_code: null": "trust_remote_code: it imports other code",
        "custom_tokenizer: a.B": "custom_tokenizer: it imports other code",
        "checkpoint_loader: x": "checkpoint_loader: it imports other code",
        "kv_connector_config: {connector_module: a}": "kv_connector_config: it imports other code",
        "env_overrides: {A: b}": "env_overrides: set variables in the environment of the server",
        "model_kwargs: {num_hidden_layers: 2}": "model_kwargs",
        "tokenizer: /x": "tokenizer: the directory's own files are used; remove it",
        "enable_lora: true": "enable_lora: DeepSeek-V3 has no LoRA there; remove it",
        "speculative_config: {decoding_type: MTP, speculative_model: x}": (
            "speculative_config.speculative_model: the MTP layers are the directory's own"
        ),
        "scheduler_config: {dynamic_batch_config: {}}": (
            "scheduler_config.dynamic_batch_config: the PyTorch backend ignores it; remove it"
        ),
        "kv_cache_config: {dtype: int8}": (
            "kv_cache_config.dtype: the PyTorch backend has no INT8 KV cache; use auto or fp8"
        ),
        "kv_cache_config: {dtype: bf16}": "kv_cache_config.dtype: BF16 is called auto there",
        "kv_cache_config: {dtype: fp16}": (
            "kv_cache_config.dtype: Input should be 'auto', 'fp8' or 'nvfp4', not 'fp16'"
        ),
        "kv_cache_config: 3": "kv_cache_config: Input should be a mapping, not 3",
        "kv_cache_config: null": "kv_cache_config: the loader takes no null here; remove it",
        "tensor_parallel_size: null": "tensor_parallel_size: the loader takes no null here",
        "tensor_parallel_size: '8'": "size: Input should be a valid integer, not '8'",
        "tensor_parallel_size: 8.0": "size: Input should be a valid integer, not 8.0",
        "tensor_parallel_size: true": "size: Input should be a valid integer, not T",
        "tensor_parallel_size: 0": "size: Input should be greater than or equal to 1",
        "tensor_parallel_size: 1:30": "which YAML reads as a number of base 60",
        "enable_chunked_prefill: 'true'": "enable_chunked_prefill: Input should be a valid boolean",
        "load_format: DUMMY": "load_format: Input should be 'auto' or 'dummy', not 'DUMMY'",
        "load_format: gms": "load_format: Input should be 'auto' or 'dummy', not 'gms'",
        "backend: tensorrt": "backend: Input should be 'pytorch', not 'tensorrt'",
        "scheduler_config: {capacity_scheduler_policy: MAX}": (
            "scheduler_config.capacity_scheduler_policy: Input should be 'GUARANTEED_NO_EVICT', "
        ),
        "speculative_config: {decoding_type: Eagle3}": (
            "speculative_config.decoding_type: Input should be 'MTP', not 'Eagle3'"
        ),
        "speculative_config: {}": "speculative_config.decoding_type: Field required",
        "cuda_graph_config: {batch_sizes: []}": "sizes: Input should be a list of 1 to 512 items",
        "cuda_graph_config: {batch_sizes: [" + "1, " * 513 + "]}": "should be a list of 1 to 512",
        "cuda_graph_config: {batch_sizes: [1, '2']}": "sizes: Input should be a valid integer",
        "cuda_graph_config: {batch_sizes: [1, true]}": "sizes: Input should be a valid integer",
        "cuda_graph_config: {batch_sizes: 8}": "cuda_graph_config.batch_sizes: Input should be",
        "kv_cache_config: {free_gpu_memory_fraction: 1.1}": "should be less than or equal to 1",
        "kv_cache_config: {free_gpu_memory_fraction: .nan}": "holds .nan, which is no finite",
        "max_seq_len: 1000000000000000": "max_seq_len: Input should be less than or equal to",
        "max_seq_len: 1\nmax_seq_len: 2": "gives the key 'max_seq_len' twice (line 2, column 1)",
        "kv_cache_config: {dtype: fp8, dtype: auto}": "gives the key 'dtype' twice",
        "a: !!python/object:os.system {}": "uses the YAML type 'python/object:os.system'",
        BOMB: "holds more than 40000 values",
        "- a": "must hold a mapping of keys to values, not a list",
        "": "must hold a mapping of keys to values, not nothing",
        '"\\e[2J": 1': r"'\x1b[2J' is no",
    }.items()
}
REFUSED['"\\e[2J": 1'] = (r"'\x1b[2J' is no argument", r"'\x1b[2J' is not known to us")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("text", REFUSED, ids=lambda text: str(text)[:40])
def test_another_name_or_value_is_refused_in_one_sentence(
    text: str, version: EngineVersion, tmp_path: Path
) -> None:
    sentence = REFUSED[text][VERSIONS.index(version)]
    path = tmp_path / LLM_ARGS_FILE
    path.write_text(text)
    if sentence is None:
        read_llm_args(path, version)
        return
    with pytest.raises(DeployError) as caught:
        read_llm_args(path, version)
    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)
    with pytest.raises(DeployError, match="^of the engine"):
        llm_args_of(text.encode(), version, where="of the engine")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_refused_argument_may_have_the_value_that_does_nothing(version: EngineVersion) -> None:
    neutral: dict[str, Any] = dict.fromkeys(
        ("tokenizer", "custom_tokenizer", "checkpoint_loader", "kv_connector_config", "lora_config")
    )
    neutral |= {"trust_remote_code": False, "enable_lora": False, "mm_encoder_only": False}
    neutral |= {"kv_cache_config": {"sink_token_length": None, "max_tokens": None}}
    neutral |= {"cuda_graph_config": None, "speculative_config": None, "max_seq_len": None}
    assert given_args(parse_llm_args(neutral, version, where="f")) == neutral


def test_a_link_out_of_the_directory_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    (tmp_path / "other.yaml").write_text("max_seq_len: 1")
    (engine / LLM_ARGS_FILE).symlink_to(tmp_path / "other.yaml")
    with pytest.raises(DeployError, match="is a link to a file outside its directory"):
        read_llm_args(engine / LLM_ARGS_FILE, "1.2.1", root=engine)
    with pytest.raises(DeployError, match="cannot be read"):
        read_llm_args(engine / "absent.yaml", "1.2.1")
