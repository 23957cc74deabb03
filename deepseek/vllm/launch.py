"""vllm.yaml: what `vllm serve DIR --config DIR/vllm.yaml` takes, made from the plan.

Its parser (`FlexibleArgumentParser.load_config_file`) turns every key into the command-line option
of that name, a mapping into JSON. The keys here are a closed set, by the names of 0.32's
`EngineArgs`; the written file is parsed by vLLM's own parser in `tests/interop`. What a file cannot
say is in its comments: an environment variable.

FP8 tiles. With DeepGEMM, which its CUDA wheel brings along (`has_deep_gemm`), vLLM on Hopper rounds
the scales of FP8 tiles up to powers of two and quantizes the tiles again with them while it loads
(`requant_weight_ue8m0_inplace`, `VLLM_USE_DEEP_GEMM_E8M0`, on by default; read). An evaluation
judges these values (`ARITHMETICS["vllm"]` of `deepseek/engine/arithmetic.py`), because they are
what a plain start serves; the file says how the tiles are served as they are, which is closer to
the source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.errors import DeployError, first_problem
from deepseek.untrusted import UnusableFileError
from deepseek.yaml_files import parse_yaml_mapping

LAUNCH_FILE = "vllm.yaml"
#: KV format of a recipe -> `--kv-cache-dtype`.
KV_DTYPES: dict[str, Literal["bfloat16", "fp8"]] = {"bf16": "bfloat16", "fp8": "fp8"}
#: GPUs of one node; more ranks than that need an executor over nodes.
GPUS_PER_NODE = 8
#: Keeps FP8 tiles as they are stored.
E8M0_OFF = "VLLM_USE_DEEP_GEMM_E8M0=0"


def _key(name: str) -> str:
    return name.replace("_", "-")


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, alias_generator=_key, populate_by_name=True
    )


class Speculative(BaseModel):
    """`--speculative-config`: the MTP layer drafts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    method: Literal["mtp"]
    num_speculative_tokens: int = Field(ge=1)


class Launch(_Strict):
    """The whole of vllm.yaml; keys are written with dashes."""

    dtype: Literal["bfloat16"]
    load_format: Literal["safetensors"]
    tensor_parallel_size: int = Field(ge=1)
    enable_expert_parallel: bool = False
    distributed_executor_backend: Literal["ray"] | None = None
    kv_cache_dtype: Literal["bfloat16", "fp8"]
    max_model_len: int = Field(ge=1)
    max_num_seqs: int = Field(ge=1)
    max_num_batched_tokens: int = Field(ge=1)
    gpu_memory_utilization: float = Field(gt=0.0, le=1.0)
    speculative_config: Speculative | None = None


def make_launch(
    ranks: RankLayout,
    *,
    kv_cache: str,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    memory_fraction: float,
    mtp: bool,
) -> Launch:
    """The arguments of one replica. `memory_fraction` is the share of each GPU's memory that vLLM
    takes for weights, workspace and KV cache; with `mtp` the first MTP layer drafts one token.

    Raises:
        DeployError: vLLM has no such KV cache for this model.
    """
    if kv_cache not in KV_DTYPES:
        raise DeployError(
            f"vLLM has no {kv_cache} KV cache for this model; give --kv-cache fp8 or bf16"
        )
    return Launch(
        dtype="bfloat16",
        load_format="safetensors",
        tensor_parallel_size=ranks.tp,
        enable_expert_parallel=ranks.ep > 1,
        distributed_executor_backend="ray" if ranks.tp > GPUS_PER_NODE else None,
        kv_cache_dtype=KV_DTYPES[kv_cache],
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_batched_tokens, max_num_seqs),
        gpu_memory_utilization=round(memory_fraction, 4),
        speculative_config=(Speculative(method="mtp", num_speculative_tokens=1) if mtp else None),
    )


def launch_yaml(launch: Launch, version: str, *, has_tiles: bool) -> bytes:
    """The file of `launch`, the same bytes always. `has_tiles` says that linears are FP8 tiles."""
    comments = [
        f"Arguments of vLLM {version}, made by IntServe. Serve this directory DIR with:",
        f"  vllm serve DIR --config DIR/{LAUNCH_FILE}",
    ]
    if has_tiles:
        comments.append(
            f"{E8M0_OFF} before it keeps FP8 tiles from being quantized again by DeepGEMM."
        )
    if launch.distributed_executor_backend == "ray":
        comments.append("Its workers run in a Ray cluster over the nodes: start that first.")
    given = launch.model_dump(mode="json", by_alias=True, exclude_none=True)
    if not launch.enable_expert_parallel:
        del given["enable-expert-parallel"]
    body = yaml.safe_dump(given, sort_keys=False, width=100)
    return ("".join(f"# {line}\n" for line in comments) + body).encode()


def launch_of(data: bytes, *, where: str) -> Launch:
    """The arguments of a file whose digest was checked; `where` names it.

    Raises:
        DeployError: it is no plain YAML, has an unknown key, or a wrong value.
    """
    try:
        raw: Mapping[str, Any] = parse_yaml_mapping(data)
    except UnusableFileError as error:
        raise DeployError(f"{where} {error}") from error
    try:
        return Launch.model_validate(dict(raw))
    except ValidationError as error:
        raise DeployError(f"{where}: {first_problem(error)}; build again") from error


def faults(
    launch: Launch, ranks: RankLayout, *, kv_cache: str, mtp: bool, context: int
) -> Iterator[str]:
    """Where the arguments are not those of the engine: a sentence each. `context` is the model's
    longest request."""
    if launch.tensor_parallel_size != ranks.tp:
        yield (
            f"tensor-parallel-size is {launch.tensor_parallel_size}, but the engine was built for "
            f"{ranks.tp} ranks; build again with --tp {launch.tensor_parallel_size}"
        )
    if launch.enable_expert_parallel != (ranks.ep > 1):
        yield "enable-expert-parallel is not what the engine was built for; build again with --ep"
    if launch.kv_cache_dtype != KV_DTYPES.get(kv_cache):
        yield (
            f"kv-cache-dtype is {launch.kv_cache_dtype}, but the engine was built and is judged "
            f"with a KV cache in {kv_cache}; build again with --kv-cache"
        )
    if launch.max_model_len > context:
        yield f"max-model-len {launch.max_model_len} exceeds the model's {context}; lower it"
    if launch.speculative_config is not None and not mtp:
        yield "speculative-config needs the MTP layers, which were left out; build with --mtp"
    if ranks.tp > GPUS_PER_NODE and launch.distributed_executor_backend != "ray":
        yield f"{ranks.tp} ranks need distributed-executor-backend ray, over nodes; build again"
