"""The plots of the page about a job that no other page has: time, memory and bytes moved.

Made for 61 layers and dozens of workers. Called by `job_page.py` alone; the style and the shared
plots are in `figures.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
