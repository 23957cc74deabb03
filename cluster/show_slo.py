"""Shows what `plan --slo` recommends and what it assumed: sentences for people, one JSON object for
machines, whose keys a test freezes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.slo import PERCENTILE, Fleet, Slo, Workload, show_time
from deepseek.cli import print_line


def slo_json(
    fleets: Sequence[Fleet], model: str, hardware: str, slo: Slo, workload: Workload
) -> dict[str, Any]:
    """What `plan --slo --json` prints. Times are milliseconds."""
    best = fleets[0]
    return {
        "model": model,
        "hardware": hardware,
        "slo": {"ttft_ms": _ms(slo.ttft_s), "tpot_ms": _ms(slo.tpot_s)},
        "rps": workload.rps,
        "isl": workload.isl,
        "osl": workload.osl,
        **_fleet_json(best),
        "alternatives": [_fleet_json(fleet) for fleet in fleets[1:]],
        "assumptions": {
            "efficiency": asdict(best.speed.efficiency),
            "margin": best.margin,
            "ttft_percentile": PERCENTILE,
            "chunk_tokens": best.speed.chunk_tokens,
        },
    }


def print_fleets(
    fleets: Sequence[Fleet],
    model: str,
    hardware: str,
    slo: Slo,
    workload: Workload,
    console: Console,
) -> None:
    """The recommendation, a table of the recipes that would do, and the assumptions."""
    asked = f"ttft {show_time(slo.ttft_s)}, tpot {show_time(slo.tpot_s)}"
    print_line(
        console,
        f"{model} on {hardware}: {workload.rps:g} requests/s of {workload.isl:,} + "
        f"{workload.osl:,} tokens, {asked}",
        style="bold",
    )
    for sentence in fleet_sentences(fleets[0]):
        print_line(console, sentence)
    console.print(_table(fleets))
    for sentence in assumptions(fleets[0]):
        print_line(console, sentence)


def fleet_sentences(fleet: Fleet) -> list[str]:
    """What to run, and how it does there."""
    layout = fleet.speed.layout
    each = f"{layout.gpus} GPU{'s' * (layout.gpus > 1)}"
    return [
        f"Use {_count(fleet.nodes, 'node')}: {_count(fleet.replicas, 'replica')} of {each}, recipe "
        f"{fleet.plan.recipe}, target {fleet.plan.target}, {_layout_words(fleet)}, at most "
        f"{fleet.batch:,} requests on each (limited by {fleet.limited_by}).",
        f"Expected: tpot {show_time(fleet.tpot_s)} with {fleet.running:.1f} requests on a replica, "
        f"{show_time(fleet.full_tpot_s)} when it is full; ttft {show_time(fleet.ttft_s)} at "
        f"p{PERCENTILE * 100:g} ({show_time(fleet.wait_s)} for a place, "
        f"{show_time(fleet.prefill_wait_s)} for earlier prompts, {show_time(fleet.prefill_s)} for "
        "its own, and a step).",
    ]


def assumptions(fleet: Fleet) -> list[str]:
    """What the answer rests on."""
    used, pct = fleet.speed.efficiency, "{:.0%}".format
    chunk = fleet.speed.chunk_tokens
    return [
        f"Assumed: weights and KV read at {pct(used.memory)} of the memory's bandwidth, tensor "
        f"cores at {pct(used.decode)} of their peak in a step and {pct(used.prefill)} in a chunk "
        f"of {chunk:,} prompt tokens, links at {pct(used.link)}, {used.activation_bytes / 1e6:.1f} "
        f"MB of activations per token and layer, {used.layer_s * 1e6:.0f} us per layer, "
        f"{used.hop_s * 1e6:.0f} us per collective between nodes; fitted on published figures, "
        "with errors in docs/roofline.md. Nothing was measured here.",
        f"Assumed: every time is {pct(fleet.margin)} longer than predicted, as it is in the figure "
        "of this kind of attention that the fit is most optimistic about; requests arrive at "
        "random (Poisson), all of one length, with no prefix found in a cache and no speculation; "
        "the wait for a place is Erlang C's over all places of the fleet, that for earlier prompts "
        "M/D/1's on one replica.",
    ]


def _table(fleets: Sequence[Fleet]) -> Table:
    table = Table()
    for name in ("recipe", "target", "layout"):
        table.add_column(name, no_wrap=True)
    for name in ("nodes", "tpot", "full", "ttft"):
        table.add_column(name, justify="right", no_wrap=True)
    for fleet in fleets:
        table.add_row(
            fleet.plan.recipe,
            fleet.plan.target,
            f"{fleet.replicas:,} x {fleet.speed.layout.label}",
            f"{fleet.nodes:,}",
            show_time(fleet.tpot_s),
            show_time(fleet.full_tpot_s),
            show_time(fleet.ttft_s),
        )
    return table


def _fleet_json(fleet: Fleet) -> dict[str, Any]:
    return {
        "nodes": fleet.nodes,
        "gpus": fleet.gpus,
        "replicas": fleet.replicas,
        "gpus_per_replica": fleet.speed.layout.gpus,
        "recipe": fleet.plan.recipe,
        "target": fleet.plan.target,
        "engine_version": fleet.plan.engine_version or None,
        "dialect": fleet.plan.dialect,
        "attention": fleet.speed.layout.attention,
        "expert_parallel": fleet.speed.layout.ep,
        "max_requests": fleet.batch,
        "limited_by": fleet.limited_by,
        "mean_requests": round(fleet.running, 2),
        "tpot_ms": _ms(fleet.tpot_s),
        "full_tpot_ms": _ms(fleet.full_tpot_s),
        "ttft_ms": _ms(fleet.ttft_s),
        "place_wait_ms": _ms(fleet.wait_s),
        "prefill_wait_ms": _ms(fleet.prefill_wait_s),
        "prefill_ms": _ms(fleet.prefill_s),
    }


def _layout_words(fleet: Fleet) -> str:
    layout = fleet.speed.layout
    if layout.gpus == 1:
        return "on one GPU"
    how = "heads" if layout.attention == "tp" else "requests"
    return f"attention split by {how} and whole experts on each GPU ({layout.label})"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)
