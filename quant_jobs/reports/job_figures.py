"""The plots of the page about a job that no other page has: time, memory and bytes moved.

Made for 61 layers and dozens of workers. Called by `job_page.py` alone; the style and the shared
plots are in `figures.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.ticker import LogFormatter

from deepseek.artifact.input_maxima import INPUTS, OUTLIER_RATIO, ExpertInput, InputMaxima
from quant_jobs.reports.figures import (
    FIFTH,
    FIRST,
    FOURTH,
    GRID,
    INK,
    MUTED,
    PALE,
    SECOND,
    SIXTH,
    STARVED,
    THIRD,
    draw,
    draw_figure,
    label,
    unit_of,
)


def step_colors(steps: Iterable[str]) -> dict[str, str]:
    """step -> color, in order of appearance, so that a step has one color on the whole page."""
    colors = (FIRST, THIRD, SECOND, FOURTH, FIFTH, SIXTH, INK, MUTED)
    busy = [step for step in dict.fromkeys(steps) if step != "wait"]
    chosen = {step: colors[index % len(colors)] for index, step in enumerate(busy)}
    return chosen | {"wait": PALE}


def layer_times(layers: Mapping[int, Mapping[str, float]], colors: Mapping[str, str]) -> str:
    """The driver's wall seconds by layer and step. Layers that an earlier run did are hatched."""

    def paint(axes: Any) -> None:
        numbers = list(layers)
        base = [0.0] * len(numbers)
        for step, color in colors.items():
            values = [layers[number].get(step, 0.0) for number in numbers]
            if any(values):
                axes.bar(numbers, values, bottom=base, color=color, width=0.8, label=label(step))
            base = [low + value for low, value in zip(base, values, strict=True)]
        earlier = [number for number in numbers if not layers[number]]
        if earlier:
            axes.bar(
                earlier, [max(base)] * len(earlier), color="none", edgecolor=GRID, hatch="////",
                width=0.8, linewidth=0, label="done by an earlier run, time not known",
            )  # fmt: skip
        axes.set_xlabel("layer")
        axes.set_ylabel("seconds")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")
        axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0))

    return draw("layers", 7.2, 3.1, paint)


def workers(
    rows: Mapping[str, tuple[Mapping[str, float], int]],
    driver_peak_bytes: int,
    colors: Mapping[str, str],
    wall_s: float,
) -> str:
    """Seconds of each worker by step (left, with the wall time as a line) and its peak bytes
    (right). The driver has a memory bar only: its time is in the plot by layer."""
    names = [*map(label, rows), "driver"]
    size = 9.0 if len(names) <= 20 else 6.5

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        places = range(len(rows))
        base = [0.0] * len(rows)
        for step, color in colors.items():
            values = [seconds.get(step, 0.0) for seconds, _ in rows.values()]
            if any(values):
                left.barh(places, values, left=base, color=color, height=0.72, label=label(step))
            base = [low + value for low, value in zip(base, values, strict=True)]
        left.axvline(wall_s, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), label="wall time")
        left.set_yticks(range(len(names)), names, fontsize=size)
        left.tick_params(axis="y", length=0, labelcolor=INK)
        left.invert_yaxis()
        left.set_xlabel("seconds")
        # Of the figure, not of the axes: a legend wider than its axes would make them narrower.
        figure.legend(frameon=False, ncols=5, loc="outside upper left", fontsize=9)
        peaks = [*(peak for _, peak in rows.values()), driver_peak_bytes]
        unit, divisor = unit_of(max(peaks))
        tones = [*([FIRST] * len(rows)), PALE]
        right.barh(range(len(names)), [peak / divisor for peak in peaks], color=tones, height=0.72)
        for place, peak in enumerate(peaks):
            right.annotate(
                f"{peak / divisor:.3g}", (peak / divisor, place), (3, 0),
                textcoords="offset points", va="center", fontsize=size - 1, color=INK,
            )  # fmt: skip
        right.set_xlabel(f"peak memory, {unit}")
        right.tick_params(axis="y", length=0)
        for axes in (left, right):
            axes.grid(axis="x")
            axes.spines["left"].set_visible(False)

    return draw_figure("workers", 7.2, min(11.0, size / 35 * len(names) + 1.3), paint)


def moved_bytes(bars: Mapping[str, Sequence[int]]) -> str:
    """One bar per name, with one segment per process. Equal lengths of what was published and what
    was moved for it show that no byte moved twice."""

    def paint(axes: Any) -> None:
        totals = [sum(parts) for parts in bars.values()]
        unit, divisor = unit_of(max(totals))
        for place, (parts, total) in enumerate(zip(bars.values(), totals, strict=True)):
            start, color = 0.0, (FIRST, FIRST, SECOND, SECOND)[place]
            for index, part in enumerate(part for part in parts if part):
                axes.barh(
                    place, part / divisor, left=start, height=0.66, color=color,
                    alpha=1.0 if index % 2 == 0 else 0.6, linewidth=0,
                )  # fmt: skip
                start += part / divisor
            axes.annotate(
                f"{total / divisor:.4g}", (total / divisor, place), (4, 0),
                textcoords="offset points", va="center", fontsize=8.5, color=INK,
            )  # fmt: skip
        axes.set_yticks(range(len(bars)), list(bars))
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.set_xlim(0, 1.1 * max(1, *totals) / divisor)  # an earlier run may have done it all
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)

    return draw("bytes", 7.2, 2.1, paint)


_INPUT_TITLES: dict[ExpertInput, str] = {"gate_up": "input of gate and up", "down": "input of down"}


def input_maxima(maxima: InputMaxima) -> str:
    """The largest input of each routed expert by layer, one panel per input: the range over the
    experts that saw anything but zeros, their median, and each outlier in red with its expert's
    number. Empty where no expert saw anything."""
    numbers = [n for n, values in maxima.layers.items() if any(values.gate_up) and any(values.down)]
    if not numbers:
        return ""
    few = len(numbers) < 16

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, kind, color in zip(panels, INPUTS, (SECOND, FOURTH), strict=True):
            rows = [[v for v in maxima.layers[n].of(kind) if v > 0] for n in numbers]
            middles = [median(row) for row in rows]
            axes.vlines(
                numbers, list(map(min, rows)), list(map(max, rows)), color=color,
                linewidth=max(2.0, 7.0 - 0.1 * len(numbers)), alpha=0.3,
            )  # fmt: skip
            axes.plot(
                numbers, middles, color=color, linewidth=1.4, marker="o",
                markersize=5 if few else 2.5,
            )  # fmt: skip
            for layer, middle in zip(numbers, middles, strict=True):
                for expert, value in enumerate(maxima.layers[layer].of(kind)):
                    if value > OUTLIER_RATIO * middle:
                        axes.plot([layer], [value], "o", color=STARVED, markersize=4)
                        axes.annotate(
                            str(expert), (layer, value), (4, 0), textcoords="offset points",
                            va="center", fontsize=8, color=STARVED,
                        )  # fmt: skip
            axes.set_title(_INPUT_TITLES[kind], loc="left", fontsize=9.5, color=INK)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())  # 100, not a power of ten
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.4)))
            axes.margins(x=0.08, y=0.12)
            axes.grid(axis="y")
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.supxlabel("layer", fontsize=9.5, color=MUTED)
        figure.supylabel("largest magnitude", fontsize=9.5, color=MUTED)

    return draw_figure("maxima", 7.2, 2.7, paint)
