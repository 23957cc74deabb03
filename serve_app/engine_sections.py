"""The engines that a pool may have: one strict, frozen section for each `kind`.

What all of them are a part of is in sections.py. `embedded` and `echo` run in the replica's own
process; `trtllm` and `vllm` in a process and a Python environment of their own (`make engine-env`),
on GPUs that placement.py reserves.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Discriminator, Field, Tag

from serve_app.setting_types import (
    Count,
    DirectoryPath,
    FilePath,
    Seconds,
    SecondsOrZero,
    Section,
    Tokens,
)

_MaxModelLen = Annotated[int, Field(ge=2)]
_LEN = "tokens of the longest request, completion included"
_DIRECTORY = "engine directory that `build` made, at the same path on each node"
_STAGED = (
    "directory of each node where `build --stage` has put a copy of the engine, with `{node}` as "
    "there for Ray's id of the node; a copy that is the same engine, whole, is loaded instead"
)
_PYTHON = (
    "Python of the engine's own environment, at the same path on each node: "
    "`make engine-env TARGET=%s` makes one and prints it"
)
_LOAD = (
    "seconds that loading and warming up may take; a load that takes longer is given up, and told "
    "with what it was doing"
)


class EchoOptions(Section):
    """The echo engine: says the prompt back, one token (a byte) at a time. It has no model."""

    # The default is for code that makes one; a file must say it.
    model_config = ConfigDict(json_schema_extra={"required": ["kind"]})

    kind: Literal["echo"] = Field(default="echo", description="selects this engine")
    ttft_s: SecondsOrZero = Field(default=0.0, description="seconds to the first token")
    itl_s: SecondsOrZero = Field(default=0.0, description="seconds between tokens")
    max_running: Count = Field(default=256, description="sequences that run at a time")
    max_model_len: int = Field(default=4096, ge=2, description=_LEN)
    kv_tokens: Tokens | None = Field(
        default=None,
        description="KV tokens that it says to have; null: `max_running` of the longest requests",
    )


class EmbeddedOptions(Section):
    """The embedded engine, which runs on CPUs. A setting that is null keeps what the engine was
    built with, or its default."""

    model_config = ConfigDict(json_schema_extra={"required": ["kind", "directory"]})

    kind: Literal["embedded"] = Field(default="embedded", description="selects this engine")
    directory: DirectoryPath = Field(description=_DIRECTORY)
    staged: DirectoryPath | None = Field(default=None, description=_STAGED)
    max_model_len: _MaxModelLen | None = Field(default=None, description=_LEN)
    kv_tokens: Tokens | None = Field(default=None, description="size of the KV cache, in tokens")
    kv_cache: Literal["bf16", "fp8", "int8"] | None = Field(
        default=None,
        description="format of KV pages; another one than the gate judged counts as ungated",
    )
    prefix_cache: bool = Field(
        default=True,
        description="keep the KV pages of finished requests until their room is needed, for "
        "requests of the same key that begin with the same tokens",
    )
    max_batch_size: Count | None = Field(default=None, description="sequences of one step")
    max_batched_tokens: Count | None = Field(default=None, description="tokens of one step")
    num_threads: Count | None = Field(
        default=None,
        description="CPU threads of one replica; null: as many as the pool's `cpus`, or all cores "
        "but one where those are less than one",
    )
    kernels: Literal["auto", "native", "torch"] = Field(
        default="auto",
        description="`native` is the compiled extension, `torch` the slow reference; `auto` takes "
        "the extension where it was built",
    )
    huge_pages: bool = Field(
        default=True,
        description="copy the weights of `native` kernels into huge pages, which are read faster; "
        "false leaves them mapped from the directory, so that replicas of one node share them",
    )


class TrtllmOptions(Section):
    """TensorRT-LLM, on one node: a GPU for each rank that the directory was built for. Its other
    arguments are in the directory's `llm_args.yaml`."""

    model_config = ConfigDict(json_schema_extra={"required": ["kind", "directory", "python"]})

    kind: Literal["trtllm"] = Field(default="trtllm", description="selects this engine")
    directory: DirectoryPath = Field(description=_DIRECTORY)
    staged: DirectoryPath | None = Field(default=None, description=_STAGED)
    python: FilePath = Field(description=_PYTHON % "trtllm")
    kv_cache: Literal["bf16", "fp8"] | None = Field(
        default=None,
        description="format of the KV cache, null: as built; another one counts as ungated",
    )
    max_model_len: _MaxModelLen | None = Field(
        default=None, description=f"{_LEN}; null: as `llm_args.yaml` has it"
    )
    load_timeout_s: Seconds = Field(default=3600.0, description=_LOAD)


class VllmOptions(Section):
    """vLLM, on one GPU for each rank. A setting that is null keeps what the directory's `vllm.yaml`
    says."""

    model_config = ConfigDict(json_schema_extra={"required": ["kind", "directory", "python"]})

    kind: Literal["vllm"] = Field(default="vllm", description="selects this engine")
    directory: DirectoryPath = Field(description=_DIRECTORY)
    staged: DirectoryPath | None = Field(default=None, description=_STAGED)
    python: FilePath = Field(description=_PYTHON % "vllm")
    tensor_parallel_size: Count | None = Field(
        default=None,
        description="ranks that share each layer; null: as many as the directory was built for",
    )
    pipeline_parallel_size: Count = Field(
        default=1, description="groups of such ranks, each with a part of the layers"
    )
    kv_cache: Literal["bf16", "fp8"] | None = Field(
        default=None,
        description="format of the KV cache, null: as built; another one counts as ungated",
    )
    max_model_len: _MaxModelLen | None = Field(default=None, description=_LEN)
    max_batch_size: Count | None = Field(default=None, description="sequences of one step")
    cpu: bool = Field(
        default=False,
        description="the environment has vLLM's build for CPUs: replicas get no GPUs",
    )
    load_timeout_s: Seconds = Field(default=3600.0, description=_LOAD)


#: Options of the engines that have a directory.
DirectoryOptions = EmbeddedOptions | TrtllmOptions | VllmOptions
#: Options of the engines that run in a process of their own.
RemoteOptions = TrtllmOptions | VllmOptions


def _kind(given: Any) -> Any:
    return given.get("kind") if isinstance(given, dict) else getattr(given, "kind", None)


EngineSection = Annotated[
    Annotated[EmbeddedOptions, Tag("embedded")]
    | Annotated[TrtllmOptions, Tag("trtllm")]
    | Annotated[VllmOptions, Tag("vllm")]
    | Annotated[EchoOptions, Tag("echo")],
    Discriminator(
        _kind,
        custom_error_type="engine_kind",
        custom_error_message=(
            "kind must be embedded, trtllm, vllm or echo; write {kind: embedded, directory: DIR} "
            "or {kind: echo}"
        ),
    ),
]

#: The kinds whose engines have a directory: each is the target that the directory is built for.
DIRECTORY_KINDS: tuple[str, ...] = tuple(
    options.model_fields["kind"].default for options in get_args(DirectoryOptions)
)
