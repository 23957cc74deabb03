"""sglang.yaml: what `python -m sglang.launch_server --model-path DIR --config DIR/sglang.yaml`
takes, made from the plan.

Its parser (`ConfigArgumentMerger`) turns every key into the command-line option of that name; a
flag takes `true`. The keys here are a closed set, by the names of 0.5.23's `ServerArgs` (read in
`arg_groups/fields`). `disable-shared-experts-fusion` is set where the shared expert has another
format than the routed ones: SGLang would take it for one of them (it knows that of w4afp8 itself,
not of packed groups).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.errors import DeployError, first_problem
from deepseek.inventory import expert_of
from deepseek.recipe import Scheme
from deepseek.sglang.layout import Dialect
from deepseek.untrusted import UnusableFileError
from deepseek.yaml_files import parse_yaml_mapping

LAUNCH_FILE = "sglang.yaml"
#: KV format of a recipe -> `--kv-cache-dtype`.
KV_DTYPES: dict[str, Literal["bf16", "fp8_e4m3"]] = {"bf16": "bf16", "fp8": "fp8_e4m3"}
#: GPUs of one node.
GPUS_PER_NODE = 8
#: Dialects that a flag says, not config.json: SGLang reads the others' method there, and does not
#: take `blockwise_int8` as a flag at all.
FLAGS: dict[Dialect, Literal["w8a8_int8"]] = {"w8a8_int8": "w8a8_int8"}


def _key(name: str) -> str:
    return name.replace("_", "-")


class Launch(BaseModel):
    """The whole of sglang.yaml; keys are written with dashes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, alias_generator=_key, populate_by_name=True
    )

    quantization: Literal["w8a8_int8"] | None = None
    dtype: Literal["bfloat16"]
    load_format: Literal["safetensors"]
    tensor_parallel_size: int = Field(ge=1)
    expert_parallel_size: int = Field(ge=1)
    nnodes: int | None = Field(default=None, ge=2)
    kv_cache_dtype: Literal["bf16", "fp8_e4m3"]
    context_length: int = Field(ge=1)
    max_running_requests: int = Field(ge=1)
    chunked_prefill_size: int = Field(ge=1)
    mem_fraction_static: float = Field(gt=0.0, le=1.0)
    disable_shared_experts_fusion: bool = False
    speculative_algorithm: Literal["EAGLE"] | None = None
    speculative_num_steps: int | None = Field(default=None, ge=1)
    speculative_eagle_topk: int | None = Field(default=None, ge=1)
    speculative_num_draft_tokens: int | None = Field(default=None, ge=1)


def keeps_shared_experts_apart(stored: Mapping[str, Scheme]) -> bool:
    """Whether a layer's shared expert has another format than its routed ones."""
    formats: dict[bool, set[str]] = {True: set(), False: set()}
    for module, scheme in stored.items():
        if expert_of(module) is not None or ".mlp.shared_experts." in module:
            formats[expert_of(module) is not None].add(scheme.label)
    return bool(formats[False]) and len(formats[True] | formats[False]) > 1


def make_launch(
    ranks: RankLayout,
    dialect: Dialect,
    *,
    kv_cache: str,
    context_length: int,
    max_running_requests: int,
    chunked_prefill_size: int,
    memory_fraction: float,
    shared_apart: bool,
    mtp: bool,
) -> Launch:
    """The arguments of one replica. `memory_fraction` is the share of each GPU's memory that SGLang
    takes for weights and KV cache; with `mtp` the MTP layer drafts one token.

    Raises:
        DeployError: SGLang has no such KV cache for this model.
    """
    if kv_cache not in KV_DTYPES:
        raise DeployError(
            f"SGLang has no {kv_cache} KV cache for this model; give --kv-cache fp8 or bf16"
        )
    drafts = (
        {
            "speculative_algorithm": "EAGLE",
            "speculative_num_steps": 1,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": 2,
        }
        if mtp
        else {}
    )
    nodes = -(-ranks.tp // GPUS_PER_NODE)
    return Launch.model_validate(
        {
            "quantization": FLAGS.get(dialect),
            "dtype": "bfloat16",
            "load_format": "safetensors",
            "tensor_parallel_size": ranks.tp,
            "expert_parallel_size": ranks.ep,
            "nnodes": nodes if nodes > 1 else None,
            "kv_cache_dtype": KV_DTYPES[kv_cache],
            "context_length": context_length,
            "max_running_requests": max_running_requests,
            "chunked_prefill_size": chunked_prefill_size,
            "mem_fraction_static": round(memory_fraction, 4),
            "disable_shared_experts_fusion": shared_apart,
            **drafts,
        }
    )


def launch_yaml(launch: Launch, version: str) -> bytes:
    """The file of `launch`, the same bytes always."""
    comments = [
        f"Arguments of SGLang {version}, made by IntServe. Serve this directory DIR with:",
        f"  python -m sglang.launch_server --model-path DIR --config DIR/{LAUNCH_FILE}",
    ]
    if launch.nnodes is not None:
        comments.append("On every node add --node-rank N and --dist-init-addr HOST:PORT.")
    given = launch.model_dump(mode="json", by_alias=True, exclude_none=True)
    if not launch.disable_shared_experts_fusion:
        del given["disable-shared-experts-fusion"]
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
    launch: Launch,
    ranks: RankLayout,
    dialect: Dialect,
    *,
    kv_cache: str,
    mtp: bool,
    context: int,
    shared_apart: bool,
) -> Iterator[str]:
    """Where the arguments are not those of the engine: a sentence each. `context` is the model's
    longest request."""
    if launch.quantization != FLAGS.get(dialect):
        yield (
            f"quantization is {launch.quantization or 'absent'}, but the dialect {dialect} needs "
            f"{FLAGS.get(dialect) or 'what config.json says'}; build again"
        )
    given = launch.tensor_parallel_size, launch.expert_parallel_size
    if given != (ranks.tp, ranks.ep):
        yield (
            f"tensor-parallel-size {given[0]} and expert-parallel-size {given[1]} are not those "
            f"that the engine was built for, {ranks.tp} and {ranks.ep}; build again with --tp "
            "and --ep"
        )
    if launch.kv_cache_dtype != KV_DTYPES.get(kv_cache):
        yield (
            f"kv-cache-dtype is {launch.kv_cache_dtype}, but the engine was built and is judged "
            f"with a KV cache in {kv_cache}; build again with --kv-cache"
        )
    if launch.context_length > context:
        yield f"context-length {launch.context_length} exceeds the model's {context}; lower it"
    if shared_apart and not launch.disable_shared_experts_fusion:
        yield (
            "disable-shared-experts-fusion is not set, but the shared expert has another format "
            "than the routed ones, and SGLang would load it as one of them; build again"
        )
    if launch.speculative_algorithm is not None and not mtp:
        yield "speculative-algorithm needs the MTP layers, which were left out; build with --mtp"
