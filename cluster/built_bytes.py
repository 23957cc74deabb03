"""What `build --target trtllm` lays out of the full DeepSeek-V3, from shapes alone: bytes in all,
on each rank, and the nodes that hold it.

The bytes are those of the directory (`deepseek/trtllm/layout.py`); whether a node holds them is the
planner's answer for one request of 8192 tokens. A section of docs/deployability.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster.choice import tally_of
from cluster.hardware import parse_hardware
from cluster.plan import DEFAULT_CONTEXT, Plan, make_plan
from deepseek.artifact.engine_manifest import RankLayout
from deepseek.config import ModelConfig
from deepseek.models import DEEPSEEK_V3
from deepseek.recipe import GateLimits, Recipe, Rule, load_recipe
from deepseek.trtllm.layout import Dialect, rank_weight_bytes, stored_schemes, total_bytes

#: Ranks by the column's heading.
RANKS = {
    "TP8 x EP8": RankLayout(tp=8, ep=8),
    "TP8 x MoE-TP8": RankLayout(tp=8, ep=1),
    "TP16 x EP16": RankLayout(tp=16, ep=16),
}
#: Nodes by the column's heading.
NODES = {
    "8 x 80 GB": "8xH800-80GB",
    "8 x 96 GB": "8xH20-96GB",
    "8 x 141 GB": "8xH200-141GB",
    "16 x 80 GB": "16xH800-80GB",
}
#: The release as it is: nothing is quantized.
RELEASE = Recipe(
    name="released",
    description="Everything as the source has it.",
    rules=(Rule(match="*", weights="source"),),
    gate=GateLimits(max_perplexity_ratio=1.0, max_mean_kl=1.0, min_top1=0.0),
)
#: Recipe -> the dialects that it is built in. GPTQ and AWQ variants of `int4` are laid out as it.
BUILT: dict[str, tuple[Dialect, ...]] = {
    "int4": ("mixed", "single"),
    "w4a8": ("mixed", "single"),
    "int8-experts": ("mixed", "single"),
    RELEASE.name: ("released",),
}


@dataclass(frozen=True, slots=True)
class BuiltBytes:
    """One row: bytes of all tensors, of each rank by the name of the layout, and the plan on each
    kind of node."""

    recipe: str
    dialect: Dialect
    total: int
    per_rank: Mapping[str, int]
    plans: Mapping[str, Plan]


def built_bytes(config: ModelConfig = DEEPSEEK_V3) -> Iterator[BuiltBytes]:
    """The rows, without MTP layers."""
    for name, dialects in BUILT.items():
        recipe = RELEASE if name == RELEASE.name else load_recipe(name)
        schemes = tally_of(config, recipe).schemes
        for dialect in dialects:
            stored = stored_schemes(config, schemes, dialect)
            yield BuiltBytes(
                recipe=name,
                dialect=dialect,
                total=total_bytes(config, stored),
                per_rank={
                    heading: rank_weight_bytes(config, stored, ranks)
                    for heading, ranks in RANKS.items()
                },
                plans={
                    heading: make_plan(
                        config,
                        recipe,
                        parse_hardware(hardware),
                        target="trtllm",
                        dialect=None if dialect == "released" else dialect,
                    )
                    for heading, hardware in NODES.items()
                },
            )


def built_bytes_section() -> list[str]:
    """Lines of Markdown."""
    rows = list(built_bytes())
    return [
        "## What `build --target trtllm` lays out of DeepSeek-V3",
        "",
        "GB are 1e9 bytes, from shapes alone, without the MTP layer. *mixed* has FP8 blocks beside "
        "quantized experts, *single* BF16. `int4-gptq` and `int4-awq` are laid out as `int4`. A "
        "rank holds the whole embedding and its share of the rest; MoE-TP8 divides every expert "
        f"over all ranks. Nodes: tokens of KV cache (BF16) beside weights and workspace, of which "
        f"one request of {DEFAULT_CONTEXT} must fit.",
        "",
        f"| recipe | dialect | GB | {' | '.join(RANKS)} | {' | '.join(NODES)} |",
        f"|---|---|---:|{'---:|' * (len(RANKS) + len(NODES))}",
        *(_row(row) for row in rows),
        "",
        *_int8_sentences(rows),
        "",
    ]


def _row(row: BuiltBytes) -> str:
    cells = [
        f"`{row.recipe}`",
        row.dialect,
        f"{row.total / 1e9:.1f}",
        *(f"{size / 1e9:.1f}" for size in row.per_rank.values()),
        *(f"{plan.kv_tokens:,}" if plan.good else "no" for plan in row.plans.values()),
    ]
    return f"| {' | '.join(cells)} |"


def _int8_sentences(rows: list[BuiltBytes]) -> list[str]:
    """Where INT8 fits, for who asks for INT8 first."""
    mixed, single = (row for row in rows if row.recipe == "int8-experts")
    fits = [heading for heading, plan in mixed.plans.items() if plan.good]
    tight = [heading for heading in fits if not single.plans[heading].good]
    sentence = f"INT8 first: `int8-experts` fits {_or(fits)}"
    if tight:
        sentence += f", on {_or(tight)} in the dialect mixed only"
    return [
        f"{sentence}. One node of 80 GB cards holds INT4 experts; all linears in INT8 (`int8`, "
        "`int8-weight-only`) load in no dialect.",
    ]


def _or(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
