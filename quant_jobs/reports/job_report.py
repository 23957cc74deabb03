"""The account of one quantize run: `job_report.json` for machines, `job_report.html` for people.

Written at the end of a run, beside the artifact and no part of it: it holds times and memory, which
never repeat. A resumed run knows errors, coverage and fallbacks of every layer (from what the runs
before it published), but times and bytes only of what it did itself, and says so. How good the
artifact *is* stands in another report, made from an evaluation (`report.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field

from deepseek.artifact.manifest import Fallback, LayerKey
from deepseek.files import write_atomic
from quant_jobs.algorithms.ledger import MEANING, FallbackKind
from quant_jobs.reports import job_figures
from quant_jobs.reports.page import render_page, show_bytes

REPORT_FILE = "job_report.json"
PAGE_FILE = "job_report.html"

NUM_WORST = 20
#: Experts listed per layer; all are in the JSON.
NUM_STARVED = 24

Seconds = dict[str, float]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SourceAccount(_Record):
    """One file of calibration text: its share as asked for, and the blocks and tokens of text that
    it gave. `name` is its path as given, `sha256` of the file."""

    name: str
    weight: float
    blocks: int
    tokens: int
    sha256: str


class CalibrationAccount(_Record):
    """What the statistics are of; `digest` is of the token ids."""

    num_tokens: int
    num_blocks: int
    block_tokens: int
    digest: str
    sources: tuple[SourceAccount, ...]


class LayerAccount(_Record):
    """One published part. `num_bytes` is what it weighs in the artifact, `source_bytes` in the
    source; `errors` is ||y' - y|| / ||y|| by module name; `coverage` is calibration tokens by
    routed expert, empty where the layer has none.

    `seconds` is the driver's wall time by step, of this run alone: empty for a part that an earlier
    run finished, without `write` for one that was only gone through again.
    """

    layer: LayerKey
    seconds: Seconds
    errors: dict[str, float]
    coverage: tuple[int, ...]
    num_bytes: int
    source_bytes: int

    @property
    def is_of_this_run(self) -> bool:
        """Whether this run published it, and so has read its source."""
        return "write" in self.seconds


class WorkerAccount(_Record):
    """One worker as it was at the end: what a worker did that died is not known.

    `seconds` is its own time by step, `wait` what it spent without work; `bytes_read` counts source
    weights, `bytes_written` the files that it wrote, boundaries included.
    """

    index: int
    node: str
    pid: int
    seconds: Seconds
    peak_rss_bytes: int
    bytes_read: int
    bytes_written: int


class JobRecord(_Record):
    """`job_report.json`. `started_at_layer` is where this run took up the work; `floor_tokens` is
    the recipe's, below which an expert is starved. The driver reads and writes what lies outside
    the layers."""

    format_version: Literal[1] = 1
    recipe: str
    model: str
    num_workers: int = Field(ge=1)
    num_nodes: int = Field(ge=1)
    started_at_layer: int = Field(ge=0)
    workers_lost: int = Field(ge=0)
    wall_s: float
    floor_tokens: int
    calibration: CalibrationAccount
    layers: tuple[LayerAccount, ...]
    workers: tuple[WorkerAccount, ...]
    driver_peak_rss_bytes: int
    driver_bytes_read: int
    driver_bytes_written: int
    object_store_bytes: int | None
    fallbacks: tuple[Fallback, ...]

    @property
    def bytes_read(self) -> int:
        """Source bytes that this run read."""
        return self.driver_bytes_read + sum(worker.bytes_read for worker in self.workers)

    @property
    def bytes_written(self) -> int:
        """Bytes that this run wrote."""
        return self.driver_bytes_written + sum(worker.bytes_written for worker in self.workers)

    @property
    def errors(self) -> dict[str, float]:
        """Relative output error by module, over all layers."""
        return {name: error for layer in self.layers for name, error in layer.errors.items()}

    @property
    def coverage(self) -> dict[int, tuple[int, ...]]:
        """Calibration tokens by routed expert, of each MoE layer."""
        return {
            layer.layer: layer.coverage
            for layer in self.layers
            if layer.layer != "globals" and layer.coverage
        }

    @property
    def starved(self) -> dict[int, dict[int, int]]:
        """layer -> expert -> tokens, of the experts below the floor."""
        found = {
            layer: {e: tokens for e, tokens in enumerate(counts) if tokens < self.floor_tokens}
            for layer, counts in self.coverage.items()
        }
        return {layer: experts for layer, experts in found.items() if experts}


def write_job_report(output: Path, record: JobRecord) -> None:
    """Write OUTPUT/job_report.json and OUTPUT/job_report.html, each whole or not at all."""
    write_atomic(output / REPORT_FILE, (record.model_dump_json(indent=1) + "\n").encode())
    write_atomic(output / PAGE_FILE, render(record).encode())


def render(record: JobRecord) -> str:
    """The page: self-contained, no script, nothing fetched."""
    # Our own SVG, not user text: the one thing on the page that must not be escaped.
    figures = {name: Markup(svg) for name, svg in _figures(record)}
    return render_page(
        "job_report.html.j2",
        record=record,
        tiles=_tiles(record),
        figures=figures,
        resumed=_resumed(record),
        time_note=_time_note(record),
        worst=_worst(record),
        starved=_starved(record),
        ledger=_ledger(record),
    )


def _figures(record: JobRecord) -> Iterator[tuple[str, str]]:
    """Name and SVG of each plot; the SVG is empty where there is nothing to draw."""
    workers = record.workers
    steps = [*(one.seconds for one in workers), *(one.seconds for one in record.layers)]
    colors = job_figures.step_colors(step for seconds in steps for step in seconds)
    yield "errors", job_figures.errors(by_group(record)) if record.errors else ""
    coverage = record.coverage
    yield "coverage", job_figures.coverage(coverage, record.floor_tokens) if coverage else ""
    times = {entry.layer: entry.seconds for entry in record.layers if entry.layer != "globals"}
    yield "layers", job_figures.layer_times(times, colors) if any(times.values()) else ""
    rows = {f"{w.index} · {w.node}": (w.seconds, w.peak_rss_bytes) for w in workers}
    others = {"driver": record.driver_peak_rss_bytes}
    if record.object_store_bytes is not None:
        others["object store"] = record.object_store_bytes
    yield "workers", job_figures.workers(rows, others, colors, record.wall_s)
    own = [entry for entry in record.layers if entry.is_of_this_run]
    yield (
        "bytes",
        job_figures.moved_bytes(
            {
                "source of what was published": [sum(entry.source_bytes for entry in own)],
                "read, by worker and driver": [
                    *(w.bytes_read for w in workers),
                    record.driver_bytes_read,
                ],
                "artifact files published": [sum(entry.num_bytes for entry in own)],
                "written, boundaries included": [
                    *(w.bytes_written for w in workers),
                    record.driver_bytes_written,
                ],
            }
        ),
    )


def by_group(record: JobRecord) -> dict[str, dict[int, list[float]]]:
    """group -> layer -> errors of its linears; every layer has an MLP of one kind or another."""
    grouped: dict[str, dict[int, list[float]]] = {name: {} for name in GROUPS}
    for entry in record.layers:
        for module, error in entry.errors.items():
            assert entry.layer != "globals", module
            grouped[group_of(module)].setdefault(entry.layer, []).append(error)
    return {group: layers for group, layers in grouped.items() if layers}


GROUPS = ("attention", "dense MLP, shared expert", "routed gate and up", "routed down")


def group_of(module: str) -> str:
    """The one of GROUPS that a module of the manifest belongs to."""
    if ".self_attn." in module:
        return GROUPS[0]
    if ".experts." not in module:
        return GROUPS[1]
    return GROUPS[3] if module.endswith(".down_proj") else GROUPS[2]


# --- what the page says in words ---


def _tiles(record: JobRecord) -> list[dict[str, str]]:
    """The figures that a reader came for."""
    errors = sorted(record.errors.values())
    starved = sum(map(len, record.starved.values()))
    experts = sum(map(len, record.coverage.values()))
    peak = max((w.peak_rss_bytes for w in record.workers), default=0)
    own = [entry for entry in record.layers if entry.is_of_this_run]
    num_bytes = sum(entry.num_bytes for entry in record.layers)
    source_bytes = sum(entry.source_bytes for entry in record.layers)
    tiles = [
        ("Wall time", show_seconds(record.wall_s), f"{len(own)} of {len(record.layers)} files"),
        ("Peak of a worker", show_bytes(peak),
         f"{record.num_workers} workers, {record.num_nodes} nodes"),
        ("Artifact", show_bytes(num_bytes),
         f"{num_bytes / source_bytes:.0%} of the source's {show_bytes(source_bytes)}"),
        ("Fallbacks", f"{sum(item.count for item in record.fallbacks):,}",
         f"{len({item.kind for item in record.fallbacks})} kinds"),
    ]  # fmt: skip
    if errors:
        middle = errors[len(errors) // 2]
        tiles.insert(1, ("Median output error", f"{middle:.4f}", f"largest {errors[-1]:.4f}"))
    if experts:
        tiles.append(("Starved experts", f"{starved:,}", f"of {experts:,}, below "
                      f"{record.floor_tokens} tokens"))  # fmt: skip
    return [{"name": name, "value": value, "note": note} for name, value, note in tiles]


def _resumed(record: JobRecord) -> str:
    """What is not known of this run because an earlier one did it; empty for a whole run."""
    earlier = [entry for entry in record.layers if not entry.is_of_this_run]
    if not earlier:
        return ""
    return (
        f"Resumed at layer {record.started_at_layer}: {len(earlier)} of {len(record.layers)} files "
        "were published by an earlier run, so that times, memory and bytes below are of the rest. "
        "Errors, coverage and fallbacks are of all."
    )


def _time_note(record: JobRecord) -> str:
    """How the workers' time divides, in one sentence; empty where no worker answered."""
    totals: dict[str, float] = defaultdict(float)
    for worker in record.workers:
        for step, seconds in worker.seconds.items():
            totals[step] += seconds
    whole = sum(totals.values())
    if not whole:
        return ""
    order = sorted(totals.items(), key=lambda item: -item[1])
    return ", ".join(f"{step} {seconds / whole:.0%}" for step, seconds in order if seconds)


def _worst(record: JobRecord) -> list[dict[str, Any]]:
    """The modules with the largest error, with the tokens that their expert saw."""
    coverage = record.coverage
    order = sorted(record.errors.items(), key=lambda item: -item[1])[:NUM_WORST]
    return [
        {"module": module, "error": error, "tokens": _tokens_of(module, coverage)}
        for module, error in order
    ]


def _tokens_of(module: str, coverage: dict[int, tuple[int, ...]]) -> int | None:
    """Tokens of the routed expert that a module such as `model.layers.3.mlp.experts.7.up_proj`
    belongs to."""
    layer, _, expert = module.removeprefix("model.layers.").partition(".mlp.experts.")
    return coverage[int(layer)][int(expert.partition(".")[0])] if expert else None


def _starved(record: JobRecord) -> list[dict[str, Any]]:
    """One row per layer with starved experts, the emptiest first."""
    rows = []
    for layer, experts in record.starved.items():
        order = sorted(experts.items(), key=lambda item: (item[1], item[0]))
        names = ", ".join(f"{expert} ({tokens})" for expert, tokens in order[:NUM_STARVED])
        more = f", and {len(order) - NUM_STARVED} more" if len(order) > NUM_STARVED else ""
        rows.append({"layer": layer, "count": len(order), "experts": names + more})
    return rows


def _ledger(record: JobRecord) -> list[dict[str, Any]]:
    """One row per kind of fallback, the most frequent first."""
    kinds: dict[str, list[Fallback]] = defaultdict(list)
    for item in record.fallbacks:
        kinds[item.kind].append(item)
    rows = [
        {
            "kind": kind,
            "meaning": MEANING[cast(FallbackKind, kind)],
            "count": sum(item.count for item in items),
            "modules": len(items),
            "layers": _ranges(sorted({item.layer for item in items if item.layer is not None})),
        }
        for kind, items in kinds.items()
    ]
    return sorted(rows, key=lambda row: (-row["count"], row["kind"]))


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> `1–3, 7`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in spans)


def show_seconds(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
