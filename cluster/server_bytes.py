"""What `build` for other servers than TensorRT-LLM lays out of the full DeepSeek-V3, from shapes
alone: bytes in all and on each rank, beside what the planner counts for a GPU.

The bytes are those of the directory (`deepseek/vllm/layout.py`, `deepseek/sglang/layout.py`). A
section of docs/deployability.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cluster.built_bytes import RANKS
from cluster.choice import tally_of
from cluster.matrix import Target
from deepseek.config import ModelConfig
from deepseek.models import DEEPSEEK_V3
from deepseek.recipe import Scheme, load_recipe
from deepseek.sglang import layout as sglang
from deepseek.vllm import layout as vllm

#: Recipes whose tensors differ; GPTQ, AWQ and SmoothQuant variants are laid out as these.
RECIPES: dict[Target, tuple[str, ...]] = {
    "vllm": ("int4", "int4-all", "int4-asym", "int8", "int8-weight-only", "int8-experts"),
    "sglang": ("int4", "w4a8", "int8", "int8-block", "int8-experts"),
}


@dataclass(frozen=True, slots=True)
class ServerBytes:
    """One row: bytes of all tensors, of each rank by the name of the layout, and what the planner
    counts per GPU for as many ranks, with whole experts on each."""

    target: Target
    recipe: str
    total: int
    per_rank: Mapping[str, int]
    planned: Mapping[str, int]


def server_bytes(config: ModelConfig = DEEPSEEK_V3) -> Iterator[ServerBytes]:
    """The rows, without MTP layers."""
    for target, names in RECIPES.items():
        for name in names:
            recipe = load_recipe(name)
            schemes = tally_of(config, recipe).schemes
            total, per_rank = _LAYOUTS[target](config, schemes)
            tally = tally_of(config, recipe)
            yield ServerBytes(
                target=target,
                recipe=name,
                total=total,
                per_rank=per_rank,
                planned={
                    heading: tally.gpu_footprint(ranks.tp, "bf16", target=target).weights_per_gpu
                    for heading, ranks in RANKS.items()
                },
            )


def _vllm(config: ModelConfig, schemes: Mapping[str, Scheme]) -> tuple[int, dict[str, int]]:
    stored = vllm.stored_schemes(config, schemes)
    return vllm.total_bytes(config, stored), {
        heading: max(vllm.rank_weight_bytes(config, stored, ranks))
        for heading, ranks in RANKS.items()
    }


def _sglang(config: ModelConfig, schemes: Mapping[str, Scheme]) -> tuple[int, dict[str, int]]:
    dialect = sglang.fitting_dialect(schemes)
    stored = sglang.stored_schemes(config, schemes, dialect)
    return sglang.total_bytes(config, stored, dialect), {
        heading: max(sglang.rank_weight_bytes(config, stored, ranks, dialect))
        for heading, ranks in RANKS.items()
    }


_LAYOUTS: dict[
    Target, Callable[[ModelConfig, Mapping[str, Scheme]], tuple[int, dict[str, int]]]
] = {"vllm": _vllm, "sglang": _sglang}


def server_bytes_section() -> list[str]:
    """Lines of Markdown."""
    return [
        "## What `build --target vllm` and `sglang` lay out of DeepSeek-V3",
        "",
        "As above; of SGLang in the dialect that fits. MoE-TP8 is vLLM without "
        "--enable-expert-parallel. In parentheses what the planner counts per GPU, with whole "
        "experts on each.",
        "",
        f"| target | recipe | GB | {' | '.join(RANKS)} |",
        f"|---|---|---:|{'---:|' * len(RANKS)}",
        *(_row(row) for row in server_bytes()),
        "",
    ]


def _row(row: ServerBytes) -> str:
    cells = [row.target, f"`{row.recipe}`", f"{row.total / 1e9:.1f}"]
    cells += [
        f"{size / 1e9:.1f} ({row.planned[heading] / 1e9:.1f})"
        for heading, size in row.per_rank.items()
    ]
    return f"| {' | '.join(cells)} |"
