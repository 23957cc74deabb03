"""The words of the deployability matrix: targets, versions, parts, formats, and what a row is.

The rows are data, one file for each target in `cluster/rows/`; `cluster/deployability.py` looks
them up. For a target, version, GPU generation, part and format the first matching row counts. A
target has two lists: `ROWS` say what becomes of what `build --target` makes, `ARTIFACT_ROWS` what
becomes of a quantized artifact that is handed over as it is.

`evidence` says what a row rests on, and no row claims more than that:

    executed  the tool's own config code, choice of schemes, loader and model code ran on an
              artifact of ours, in the version named, by the test named; on a CPU, GPU kernels
              replaced
    read      in the source of that version, or in the documentation inside it
    inferred  follows from what was read; nobody wrote or ran it

A row that loads has two halves: the loader's is `evidence`, the GPU kernel's is `kernels`, which is
never more than read: no GPU has run anything of ours under these engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from cluster.hardware import GpuGeneration
from deepseek.hf.versions import VERSIONS as HF_VERSIONS
from deepseek.sglang.versions import VERSIONS as SGLANG_VERSIONS
from deepseek.trtllm.versions import VERSIONS as TRTLLM_VERSIONS
from deepseek.vllm.versions import VERSIONS as VLLM_VERSIONS

Target = Literal["trtllm", "vllm", "sglang", "transformers", "embedded"]
TARGETS: tuple[Target, ...] = ("trtllm", "vllm", "sglang", "transformers", "embedded")
#: Versions that the rows are about; the first is planned for unless another is asked for. The
#: embedded engine has none: it is this very code.
ENGINE_VERSIONS: dict[Target, tuple[str, ...]] = {
    "trtllm": TRTLLM_VERSIONS,
    "vllm": VLLM_VERSIONS,
    "sglang": SGLANG_VERSIONS,
    "transformers": HF_VERSIONS,
    "embedded": ("",),
}

#: Names of the layouts that a target's directory may have, where there are several.
DIALECTS: dict[Target, tuple[str, ...]] = {
    "trtllm": ("mixed", "single"),
    "sglang": ("w8a8_int8", "blockwise_int8", "compressed-tensors", "w4afp8"),
}

Evidence = Literal["executed", "read", "inferred"]
#: What is known of the GPU kernels that a row needs: "" where no special one is needed.
Kernels = Literal["read", "inferred", ""]

#: What is handed to the target: what `build` makes for it, or the artifact as it is.
Handed = Literal["engine", "artifact"]

KV_CACHE = "kv_cache"
#: Part -> the glob that a recipe rule uses for it. A model has q_a_proj and q_b_proj, or without a
#: query latent q_proj, which every engine loads as a linear of its own, as it does q_b_proj.
GLOBS = {
    "routed_experts": "*.mlp.experts.*",
    "shared_experts": "*.shared_experts.*",
    "dense_mlp": "*.mlp.[gud]*_proj",
    "q_a_proj": "*.q_a_proj",
    "kv_a_proj_with_mqa": "*.kv_a_proj_with_mqa",
    "q_b_proj": "*.q_b_proj",
    "q_proj": "*.q_proj",
    "kv_b_proj": "*.kv_b_proj",
    "o_proj": "*.o_proj",
    "lm_head": "lm_head",
}
#: The language model's head, where a recipe quantizes it. Its rows are its own.
HEAD = frozenset({"lm_head"})
PARTS = frozenset(GLOBS) - HEAD
ROUTED = frozenset({"routed_experts"})
#: The linears of DeepSeek-V3, which interop tests run; q_proj is Moonlight's.
V3_PARTS = PARTS - {"q_proj"}
DENSE = V3_PARTS - ROUTED
#: What TensorRT-LLM's MLA code reads by itself, past its generic linear loader.
MLA = frozenset({"q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"})
GENERIC = PARTS - ROUTED - MLA
KV_B = frozenset({"kv_b_proj"})
#: Fused by every GPU engine where there is a query latent.
QKV_A = frozenset({"q_a_proj", "kv_a_proj_with_mqa"})
#: DeepSeek-V3.2's, which no rule changes: FP8 blocks or BF16, as released.
INDEXER = frozenset({"indexer"})
KV = frozenset({KV_CACHE})
EVERYTHING = PARTS | INDEXER | HEAD | KV

BF16 = frozenset({"bf16"})
FP8 = frozenset({"fp8-block"})
W8A8 = frozenset({"int8-a8"})
#: INT8 weights with one scale per 128x128 tile and INT8 activations.
INT8_BLOCK = frozenset({"int8-block-a8"})
W8A16 = frozenset({"int8"})
INT8_ASYM = frozenset({"int8-asym"})
INT4 = frozenset({"int4-g32", "int4-g64", "int4-g128"})
INT4_ASYM = frozenset({"int4-asym-g32", "int4-asym-g64", "int4-asym-g128"})
G128 = frozenset({"int4-g128"})
ASYM_G128 = frozenset({"int4-asym-g128"})
INT4_OTHER = INT4 - G128
#: INT4 weights with FP8 activations, one static scale per input.
W4A8 = frozenset({"int4-g32-afp8", "int4-g64-afp8", "int4-g128-afp8"})
W4A8_G128 = frozenset({"int4-g128-afp8"})
#: INT4 weights with INT8 activations, one scale per token.
INT4_A8 = frozenset({"int4-g32-a8", "int4-g64-a8", "int4-g128-a8"})
INT4_ASYM_A8 = frozenset({"int4-asym-g32-a8", "int4-asym-g64-a8", "int4-asym-g128-a8"})
W4A8_INT8 = INT4_A8 | INT4_ASYM_A8
#: What compressed-tensors packs into int32 words.
PACKED = W8A16 | INT8_ASYM | INT4 | INT4_ASYM
FORMATS = BF16 | FP8 | W8A8 | INT8_BLOCK | PACKED | W4A8 | W4A8_INT8
#: Formats of a quantized head.
HEAD_FORMATS = W8A8 | W8A16 | INT4 | INT4_A8
KV_FORMATS = frozenset({"bf16", "fp8", "int8"})
ANY = FORMATS | KV_FORMATS

SM80: frozenset[GpuGeneration] = frozenset({"sm80"})
SM90: frozenset[GpuGeneration] = frozenset({"sm90"})
CPU: frozenset[GpuGeneration] = frozenset({"cpu"})

#: What `change` may hold. `{rules}` becomes recipe rules made of the parts' globs and `instead`,
#: for all that the target refuses of a recipe; `{elsewhere}` the targets or machines that load it.
ADD_RULES = "Add to the recipe {rules}"
ELSEWHERE = "Use {elsewhere}"


@dataclass(frozen=True, slots=True)
class Row:
    """One fact. `versions` are of the target; none means all of `ENGINE_VERSIONS`.

    `text` is the reason of a refusal, or the note of a condition ("" for none), which the planner
    prints. `change` says what to change, `instead` the recipe rule that `{rules}` stands for.
    `test` is the interop test of an `executed` row. `stops` says who refuses: the loader, or only
    the GPU kernels, so that the loader takes it. `drops` are tensors of a linear, by the end of
    their names, that the tool leaves unread, as `text` says.
    """

    target: Target
    gpus: frozenset[GpuGeneration]
    parts: frozenset[str]
    formats: frozenset[str]
    loads: bool
    source: str
    evidence: Evidence
    text: str = ""
    change: str = ""
    instead: str = "weights: source"
    versions: tuple[str, ...] = ()
    kernels: Kernels = ""
    stops: Literal["loader", "kernels"] = "loader"
    test: str = ""
    drops: tuple[str, ...] = ()

    def is_about(self, version: str) -> bool:
        """Whether it holds for a version of its target."""
        return not self.versions or version in self.versions


@dataclass(frozen=True, slots=True)
class Mix:
    """Cells (part, format) that one model may combine. BF16 goes with any, unless `plain` is
    False. A target without a Mix combines all formats: per linear or, where it fuses linears, per
    fused unit. The first that fits is built unless another `dialect` is asked for. `recipe` is a
    built-in one of that mix."""

    target: Target
    dialect: str
    name: str
    gpus: frozenset[GpuGeneration]
    cells: frozenset[tuple[str, str]]
    recipe: str
    plain: bool = True


@dataclass(frozen=True, slots=True)
class Uniform:
    """Parts whose quantized linears all have one format in a model, because the target looks it up
    once; `text` is the reason."""

    target: Target
    parts: frozenset[str]
    source: str
    evidence: Evidence
    text: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing that the target cannot load. `part` says which linears and in which format,
    `reason` why, `change` what would make it load; `evidence` as in `Row`."""

    target: Target
    part: str
    reason: str
    change: str
    evidence: Evidence

    def sentence(self) -> str:
        doubt = " (inferred)" if self.evidence == "inferred" else ""
        return f"{self.target} cannot load {self.part}: {self.reason}{doubt}. {self.change}."


def cells(parts: frozenset[str], formats: frozenset[str]) -> frozenset[tuple[str, str]]:
    """Every part in every format."""
    return frozenset(product(parts, formats))
