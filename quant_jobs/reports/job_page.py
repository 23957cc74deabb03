"""The page about a quantize run, `job_report.html`: its plots, tables and sentences.

Everything is taken from the record (`job_record.py`); nothing is measured or read here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from deepseek.artifact.input_maxima import OUTLIER_RATIO
from deepseek.artifact.manifest import Fallback
from deepseek.inventory import HEAD, expert_of, layer_of
from quant_jobs.reports import figures, job_figures
from quant_jobs.reports.job_record import JobRecord
from quant_jobs.reports.page import render_page, show_bytes

NUM_WORST = 20
#: Experts listed per layer; all are in the JSON.
NUM_STARVED = 24


def render(record: JobRecord) -> str:
    """The page: self-contained, no script, nothing fetched."""
    # Our own SVG, not user text: the one thing on the page that must not be escaped.
    plots = {name: Markup(svg) for name, svg in _figures(record)}
    return render_page(
        "job_report.html.j2",
        record=record,
        tiles=_tiles(record),
        figures=plots,
        resumed=_resumed(record),
        time_note=_time_note(record),
        worst=_worst(record),
        head_error=record.errors.get(HEAD),
        starved=_starved(record),
        outliers=_outliers(record),
        num_outliers=len(record.input_outliers),
        outlier_ratio=OUTLIER_RATIO,
        ledger=_ledger(record),
    )


def _figures(record: JobRecord) -> Iterator[tuple[str, str]]:
    """Name and SVG of each plot; the SVG is empty where there is nothing to draw."""
    workers, errors, coverage = record.workers, record.errors, record.coverage
    timed = [*(worker.seconds for worker in workers), *(entry.seconds for entry in record.layers)]
    colors = job_figures.step_colors(step for seconds in timed for step in seconds)
    yield "errors", figures.layer_errors(errors) if errors else ""
    yield "coverage", figures.coverage(coverage, record.floor_tokens) if coverage else ""
    maxima = record.input_maxima
    yield "maxima", job_figures.input_maxima(maxima) if maxima.layers else ""
    times = {entry.layer: entry.seconds for entry in record.layers if entry.layer != "globals"}
    yield "layers", job_figures.layer_times(times, colors) if any(times.values()) else ""
    rows = {f"{w.index} · {w.node}": (w.seconds, w.peak_rss_bytes) for w in workers}
    yield (
        "workers",
        job_figures.workers(rows, record.driver_peak_rss_bytes, colors, record.wall_s),
    )
    own = [entry for entry in record.layers if entry.is_of_this_run]
    bars = {
        "source of what was published": [sum(entry.source_bytes for entry in own)],
        "read, by worker and driver": [
            *(worker.bytes_read for worker in workers),
            record.driver_bytes_read,
        ],
        "artifact files published": [sum(entry.num_bytes for entry in own)],
        "written, boundaries included": [
            *(worker.bytes_written for worker in workers),
            record.driver_bytes_written,
        ],
    }
    yield "bytes", job_figures.moved_bytes(bars)


# --- tables and sentences ---


def _tiles(record: JobRecord) -> list[dict[str, str]]:
    """The headline figures: time, memory, size, errors, fallbacks, starved experts."""
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
    if record.input_maxima.layers:
        outliers = record.input_outliers
        largest = max((outlier.ratio for outlier in outliers), default=0.0)
        note = f"up to {largest:.3g} x the median" if outliers else "of the experts' inputs"
        tiles.append(("Input outliers", f"{len(outliers):,}", note))
    if experts:
        tiles.append(("Starved experts", f"{starved:,}", f"of {experts:,}, below "
                      f"{record.floor_tokens} tokens"))  # fmt: skip
    return [{"name": name, "value": value, "note": note} for name, value, note in tiles]


def _resumed(record: JobRecord) -> str:
    """A sentence about the figures that are of this run alone; empty where no earlier run published
    a file."""
    earlier = [entry for entry in record.layers if not entry.is_of_this_run]
    if not earlier:
        return ""
    return (
        f"Resumed at layer {record.started_at_layer}: {len(earlier)} of {len(record.layers)} files "
        "were published by an earlier run, so that times, memory and bytes below are of the rest. "
        "Errors, coverage and fallbacks are of all."
    )


def _time_note(record: JobRecord) -> str:
    """The share of each step in the workers' time, in words; empty where no worker answered."""
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
    """The linears with the largest errors, with the calibration tokens of their expert."""
    coverage = record.coverage
    order = sorted(record.errors.items(), key=lambda item: -item[1])[:NUM_WORST]
    return [
        {"module": module, "error": error, "tokens": _tokens_of(module, coverage)}
        for module, error in order
    ]


def _tokens_of(module: str, coverage: dict[int, tuple[int, ...]]) -> int | None:
    """Calibration tokens of the routed expert that a linear belongs to, None for other linears."""
    expert = expert_of(module)
    return None if expert is None else coverage[layer_of(module)][expert]


def _starved(record: JobRecord) -> list[dict[str, Any]]:
    """One row per layer with starved experts; within a row, those with the fewest tokens first."""
    rows = []
    for layer, experts in record.starved.items():
        order = sorted(experts.items(), key=lambda item: (item[1], item[0]))
        names = ", ".join(f"{expert} ({tokens})" for expert, tokens in order[:NUM_STARVED])
        more = f", and {len(order) - NUM_STARVED} more" if len(order) > NUM_STARVED else ""
        rows.append({"layer": layer, "count": len(order), "experts": names + more})
    return rows


def _outliers(record: JobRecord) -> list[dict[str, Any]]:
    """The experts whose inputs are far above the others' of their layer, the farthest first."""
    order = sorted(record.input_outliers, key=lambda outlier: -outlier.ratio)[:NUM_WORST]
    coverage, maxima = record.coverage, record.input_maxima.layers
    return [
        {
            "layer": outlier.layer,
            "input": "gate and up" if outlier.input == "gate_up" else "down",
            "expert": outlier.expert,
            "largest": maxima[outlier.layer].of(outlier.input)[outlier.expert],
            "ratio": outlier.ratio,
            "tokens": coverage[outlier.layer][outlier.expert],
        }
        for outlier in order
    ]


def _ledger(record: JobRecord) -> list[dict[str, Any]]:
    """One row per kind of fallback, the most frequent first."""
    kinds: dict[str, list[Fallback]] = defaultdict(list)
    for item in record.fallbacks:
        kinds[item.kind].append(item)
    rows = [
        {
            "kind": kind,
            "meaning": items[0].detail,
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
