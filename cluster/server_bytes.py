"""What `build` for other servers than TensorRT-LLM lays out of the full DeepSeek-V3, from shapes
alone: bytes in all and on each rank, beside what the planner counts for a GPU.

The bytes are those of the directory (`deepseek/vllm/layout.py`). A section of
docs/deployability.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster.built_bytes import RANKS
from cluster.choice import tally_of
from cluster.deployability import check, served_schemes
from cluster.matrix import Target
from deepseek.config import ModelConfig
from deepseek.models import DEEPSEEK_V3
from deepseek.recipe import Recipe, load_recipe
from deepseek.vllm import layout as vllm

#: Recipes whose tensors differ; GPTQ, AWQ and SmoothQuant variants are laid out as these.
RECIPES = ("int4", "int4-all", "int4-asym", "int8", "int8-weight-only", "int8-experts")


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
    """The rows, without MTP layers, of the recipes that the target loads."""
    for name in RECIPES:
        recipe = load_recipe(name)
        schemes = served_schemes(config, tally_of(config, recipe).schemes)
        if not check(schemes, recipe.kv_cache, "vllm", "sm90"):
            yield _vllm(config, recipe)


def _vllm(config: ModelConfig, recipe: Recipe) -> ServerBytes:
    tally = tally_of(config, recipe)
    stored = vllm.stored_schemes(config, tally.schemes)
    return ServerBytes(
        target="vllm",
        recipe=recipe.name,
        total=vllm.total_bytes(config, stored),
        per_rank={
            heading: max(vllm.rank_weight_bytes(config, stored, ranks))
            for heading, ranks in RANKS.items()
        },
        planned={
            heading: tally.gpu_footprint(ranks.tp, "bf16", target="vllm").weights_per_gpu
            for heading, ranks in RANKS.items()
        },
    )


def server_bytes_section() -> list[str]:
    """Lines of Markdown."""
    return [
        "## What `build --target vllm` lays out of DeepSeek-V3",
        "",
        "As above. MoE-TP8 is vLLM without --enable-expert-parallel. In parentheses what the "
        "planner counts per GPU, with whole experts on each.",
        "",
        f"| recipe | GB | {' | '.join(RANKS)} |",
        f"|---|---:|{'---:|' * len(RANKS)}",
        *(_row(row) for row in server_bytes()),
        "",
    ]


def _row(row: ServerBytes) -> str:
    cells = [f"`{row.recipe}`", f"{row.total / 1e9:.1f}"]
    cells += [
        f"{size / 1e9:.1f} ({row.planned[heading] / 1e9:.1f})"
        for heading, size in row.per_rank.items()
    ]
    return f"| {' | '.join(cells)} |"
