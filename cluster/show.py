"""Shows a plan: a table and sentences for people, one JSON object for machines.

GB are decimal (1e9 bytes) everywhere; `per GPU` is the fullest GPU. The JSON keys are frozen by a
test: scripts read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.choice import GPU_TARGETS
from cluster.memory import Footprint
from cluster.plan import DialectPlan, Plan
from deepseek.cli import print_line

_NAMES = {
    "embeddings": "embeddings, head",
    "mtp": "MTP layer",
    "dense_mlp": "dense MLP",
    "scales": "scales, zero points",
}


def as_json(plan: Plan, model: str, alternatives: Sequence[Plan]) -> dict[str, Any]:
    """What `plan --json` prints."""
    smallest = plan.smallest_fit
    return {
        "model": model,
        "recipe": plan.recipe,
        "hardware": plan.machines.label,
        "target": plan.target,
        "engine_version": plan.engine_version or None,
        "dialect": plan.dialect,
        "fits": plan.fits,
        "loads": plan.loads,
        "gpus": plan.machines.num_gpus,
        "context": plan.context,
        "concurrency": plan.concurrency,
        "mtp": plan.mtp,
        "kv_cache": plan.kv_format,
        "kv_layout": plan.kv_layout,
        "weights_gb": _gb(plan.footprint.weights),
        "weights_gb_per_gpu": _gb(plan.footprint.weights_per_gpu),
        "workspace_gb_per_gpu": _gb(plan.footprint.workspace_per_gpu),
        "usable_gb_per_gpu": _gb(plan.machines.hardware.usable_bytes),
        "kv_bytes_per_token": plan.footprint.kv_bytes_per_token,
        "kv_gb_per_gpu": _gb(_kv_bytes(plan)),
        "kv_tokens": plan.kv_tokens,
        "max_concurrency": plan.max_concurrency,
        "groups": [
            {
                "name": line.name,
                "total_gb": _gb(line.total_bytes),
                "per_gpu_gb": _gb(line.per_gpu_bytes),
                "loaded": line.name != "mtp" or plan.mtp,
            }
            for line in plan.lines
        ],
        "dialects": [
            {
                "name": other.dialect,
                "weights_gb": _gb(other.footprint.weights),
                "weights_gb_per_gpu": _gb(other.footprint.weights_per_gpu),
                "dense_gb": _gb(_read(other.footprint)[0]),
                "dense_gb_per_gpu": _gb(_read(other.footprint)[1]),
                "fits": other.fits,
                "loads": not other.refusals,
            }
            for other in plan.dialects
        ],
        "smallest_fit": smallest
        and {
            "gpus": smallest.gpus,
            "hardware": smallest.hardware,
            "weights_gb_per_gpu": _gb(smallest.weights_per_gpu),
        },
        "fitting_recipes": [other.recipe for other in alternatives],
        "refusals": [
            {
                "target": refusal.target,
                "part": refusal.part,
                "reason": refusal.reason,
                "change": refusal.change,
                "evidence": refusal.evidence,
            }
            for refusal in plan.refusals
        ],
        "warnings": list(plan.warnings),
    }


def print_plan(plan: Plan, model: str, alternatives: Sequence[Plan], console: Console) -> None:
    """The byte table, then one sentence per fact."""
    title = f"{model}, recipe {plan.recipe}, on {plan.machines.label}, target {plan.target}"
    print_line(console, title, style="bold")
    console.print(_table(plan))
    for sentence in sentences(plan, alternatives):
        print_line(console, sentence)


def sentences(plan: Plan, alternatives: Sequence[Plan]) -> list[str]:
    """Verdict first, then KV room, refusals and notes."""
    return [
        _memory_sentence(plan, alternatives),
        *_kv_sentences(plan),
        *_target_sentences(plan, alternatives),
        *(_dialect_sentence(plan, other) for other in plan.dialects),
        *(f"Note: {warning}." for warning in plan.warnings),
    ]


def _table(plan: Plan) -> Table:
    unit, device = _unit(plan), _device(plan)
    table = Table()
    table.add_column("group")
    table.add_column(f"total {unit}", justify="right")
    table.add_column(f"{unit} per {device}", justify="right")

    def row(name: str, total: int | None, per_device: int | None, style: str | None = None) -> None:
        cells = [
            ("-" if per_device is None else "") if size is None else _in(unit, size, 2)
            for size in (total, per_device)
        ]
        table.add_row(name, *cells, style=style)

    for line in plan.lines:
        name = _NAMES.get(line.name, line.name.replace("_", " "))
        if line.name == "mtp" and not plan.mtp:
            row(f"{name} (not loaded)", line.total_bytes, None)
        else:
            row(name, line.total_bytes, line.per_gpu_bytes)
    table.add_section()
    footprint, kv = plan.footprint, _kv_bytes(plan)
    row("weights", footprint.weights, footprint.weights_per_gpu, "bold")
    row("workspace", None, footprint.workspace_per_gpu)
    row(f"KV, {plan.concurrency} x {plan.context} tokens", None, kv)
    table.add_section()
    row("needed", None, footprint.weights_per_gpu + footprint.workspace_per_gpu + kv, "bold")
    row("usable", None, plan.machines.hardware.usable_bytes)
    return table


def _memory_sentence(plan: Plan, alternatives: Sequence[Plan]) -> str:
    unit = _unit(plan)
    numbers = (
        f"{_in(unit, plan.footprint.weights_per_gpu)} {unit} of weights per {_device(plan)}, "
        f"{_in(unit, plan.machines.hardware.usable_bytes)} {unit} usable"
    )
    if plan.fits:
        return f"Fits: {numbers}."
    return f"Does not fit: {numbers}. {_what_would_fit(plan, alternatives)}"


def _what_would_fit(plan: Plan, alternatives: Sequence[Plan]) -> str:
    smallest = plan.smallest_fit
    ways = []
    if smallest and plan.machines.hardware.is_gpu:
        ways.append(
            f"{smallest.gpus} GPUs are needed: {smallest.hardware}, "
            f"{_in('GB', smallest.weights_per_gpu)} GB of weights per GPU"
        )
    if alternatives:
        best = alternatives[0]
        ways.append(
            f"{plan.machines.label} holds the recipe {best.recipe} "
            f"({_in('GB', best.footprint.weights_per_gpu)} GB)"
        )
    if ways:
        return f"{'; or '.join(ways)}."
    if not plan.machines.hardware.is_gpu:
        return "Use a host with more memory, or --hardware with GPUs."
    return (
        f"No number of GPUs holds {plan.concurrency} x {plan.context} tokens, since each holds the "
        "whole KV cache: lower --concurrency and run more replicas."
    )


def _kv_sentences(plan: Plan) -> list[str]:
    if not plan.kv_tokens:
        return []
    per_token = f"{plan.footprint.kv_bytes_per_token:,} bytes per token"
    where = ", the same on every GPU" if plan.machines.num_gpus > 1 else ""
    return [
        f"KV cache: {_kv_name(plan)}, {per_token}{where}; room for {plan.kv_tokens:,} tokens, "
        f"{plan.max_concurrency:,} requests of {plan.context} tokens at once."
    ]


def _kv_name(plan: Plan) -> str:
    """The KV format, and the target's layout of it where that has a name of its own."""
    if plan.kv_layout == plan.kv_format:
        return plan.kv_format
    return f"{plan.kv_format} as {plan.kv_layout}"


def _target_sentences(plan: Plan, alternatives: Sequence[Plan]) -> list[str]:
    verdict = []
    if plan.loads and plan.asked_auto and plan.machines.hardware.is_gpu:
        verdict.append(
            f"Target: {plan.target}, the first of {', '.join(GPU_TARGETS)} that loads this recipe."
        )
    elif plan.loads:
        verdict.append(f"Target: {plan.target} loads this recipe.")
    else:
        others = ", ".join(other.recipe for other in alternatives)
        hint = f" Recipes that fit and load here: {others}." if others else ""
        verdict.append(f"Refused: no target asked for loads this recipe.{hint}")
    return verdict + [refusal.sentence() for refusal in plan.refusals]


def _dialect_sentence(plan: Plan, other: DialectPlan) -> str:
    """What a dialect of TensorRT-LLM's directory costs, and whether it would do."""
    unit, footprint = _unit(plan), other.footprint
    read, read_per_gpu = _read(footprint)
    chosen = " (planned here)" if other.dialect == plan.dialect else ""
    would = "fits" if other.fits else "does not fit"
    if other.refusals:
        would += f"; refused, because {other.refusals[0].reason}"
    return (
        f"Dialect {other.dialect}{chosen}: {_in(unit, footprint.weights)} {unit} of weights, "
        f"{_in(unit, footprint.weights_per_gpu)} {unit} per GPU, {would}; every decoding step "
        f"reads {_in(unit, read)} {unit} of dense linears, {_in(unit, read_per_gpu)} {unit} per "
        "GPU."
    )


def _read(footprint: Footprint) -> tuple[int, int]:
    """Bytes of dense linears that a decoding step reads, of all GPUs once and on one GPU."""
    dense = footprint.dense
    return dense.values + dense.scales, dense.values_per_gpu + dense.scales_per_gpu


def _kv_bytes(plan: Plan) -> int:
    """KV bytes per GPU of the planned requests, each in whole KV pages."""
    page = plan.footprint.page_tokens
    return plan.footprint.kv_bytes(-(-plan.context // page) * page * plan.concurrency)


def _gb(num_bytes: int) -> float:
    return round(num_bytes / 1e9, 3)


def _device(plan: Plan) -> str:
    return "GPU" if plan.machines.hardware.is_gpu else "host"


def _unit(plan: Plan) -> str:
    return "GB" if plan.footprint.weights >= 1e9 else "MB"


def _in(unit: str, num_bytes: int, digits: int = 1) -> str:
    return f"{num_bytes / {'GB': 1e9, 'MB': 1e6}[unit]:.{digits}f}"
