"""The plots of a quantize run's account, as SVG in the style of `figures.py`.

Made for 61 layers x 256 experts x dozens of workers: an error plot holds three numbers per layer
and group, the heat map is one embedded picture. Called by `job_report` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.colors import LinearSegmentedColormap, LogNorm

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
)

#: A zero (a weight that the format holds exactly) has no place on a logarithmic axis.
_SMALLEST_ERROR = 1e-6
_STARVED = "#c0392b"
#: Few tokens to many; below the floor it is _STARVED. Readable on light and on dark paper.
_TOKENS = LinearSegmentedColormap.from_list(
    "tokens", ["#f3e9d2", "#d9b26f", "#5f9ea0", "#2f6690", "#16324f"]
).with_extremes(under=_STARVED)


def step_colors(steps: Iterable[str]) -> dict[str, str]:
    """A color for each step, in order of appearance: the same step has one color on the page."""
    colors = (FIRST, THIRD, SECOND, FOURTH, FIFTH, SIXTH, INK, MUTED)
    busy = [step for step in dict.fromkeys(steps) if step != "wait"]
    chosen = {step: colors[index % len(colors)] for index, step in enumerate(busy)}
    return chosen | {"wait": PALE}


def errors(groups: Mapping[str, Mapping[int, Sequence[float]]]) -> str:
    """Relative output error by layer, one panel per group: smallest to largest, and the median."""

    def paint(figure: Any) -> None:
        panels = figure.subplots(
            (len(groups) + 1) // 2, 2, sharex=True, sharey=True, squeeze=False
        ).flat
        colors = (FIRST, THIRD, SECOND, FOURTH)
        for axes, (group, layers), color in zip(panels, groups.items(), colors, strict=False):
            numbers = list(layers)
            values = [sorted(max(e, _SMALLEST_ERROR) for e in layers[n]) for n in numbers]
            axes.vlines(
                numbers, [v[0] for v in values], [v[-1] for v in values], color=color,
                linewidth=max(2.0, 7.0 - 0.1 * len(numbers)), alpha=0.3,
            )  # fmt: skip
            axes.plot(
                numbers, [median(v) for v in values], color=color, linewidth=1.4, marker="o",
                markersize=5 if len(numbers) < 16 else 2.5,
            )  # fmt: skip
            axes.set_title(group, loc="left", fontsize=9.5, color=INK)
            axes.set_yscale("log")
            axes.grid(axis="y")
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in panels[len(groups) :]:
            axes.set_visible(False)
        figure.supxlabel("layer", fontsize=9.5, color=MUTED)
        figure.supylabel("relative output error", fontsize=9.5, color=MUTED)

    return draw_figure("errors", 7.2, 2.1 * ((len(groups) + 1) // 2) + 0.3, paint)


def coverage(counts: Mapping[int, Sequence[int]], floor_tokens: int) -> str:
    """Calibration tokens per expert (columns) and layer (rows); below the floor in red."""

    def paint(axes: Any) -> None:
        rows = [list(experts) for experts in counts.values()]
        floor = max(floor_tokens, 1)
        norm = LogNorm(floor, max(floor + 1, *map(max, rows)))
        # One pixel per expert, enlarged by the browser; 0 has no logarithm, but is below the floor.
        picture = axes.imshow(
            [[max(tokens, 0.5) for tokens in row] for row in rows],
            aspect="auto", cmap=_TOKENS, norm=norm, interpolation="none",
        )  # fmt: skip
        few = len(rows) <= 16
        ticks = range(0, len(rows), 1 if few else 5)
        axes.set_yticks(list(ticks), [str(list(counts)[row]) for row in ticks])
        axes.set_xlabel("routed expert")
        axes.set_ylabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = axes.figure.colorbar(picture, ax=axes, pad=0.02, aspect=14 if few else 30,
                                   extend="min")  # fmt: skip
        bar.set_label("tokens")
        bar.outline.set_visible(False)

    return draw("coverage", 7.2, min(7.5, 0.3 * len(counts) + 1.3), paint)


def layer_times(layers: Mapping[int, Mapping[str, float]], colors: Mapping[str, str]) -> str:
    """Driver's wall seconds per layer, by step. What an earlier run did is hatched."""

    def paint(axes: Any) -> None:
        numbers = list(layers)
        base = [0.0] * len(numbers)
        for step, color in colors.items():
            values = [layers[number].get(step, 0.0) for number in numbers]
            if any(values):
                axes.bar(numbers, values, bottom=base, color=color, width=0.8, label=step)
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
    others: Mapping[str, int],
    colors: Mapping[str, str],
    wall_s: float,
) -> str:
    """Each worker's seconds by step (left, the wall time as a line) and peak bytes (right), with
    the memory of `others`, which have no time of their own here."""
    names = [*rows, *others]
    size = 9.0 if len(names) <= 20 else 6.5

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        places = range(len(rows))
        base = [0.0] * len(rows)
        for step, color in colors.items():
            values = [seconds.get(step, 0.0) for seconds, _ in rows.values()]
            if any(values):
                left.barh(places, values, left=base, color=color, height=0.72, label=step)
            base = [low + value for low, value in zip(base, values, strict=True)]
        left.axvline(wall_s, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), label="wall time")
        left.set_yticks(range(len(names)), names, fontsize=size)
        left.tick_params(axis="y", length=0, labelcolor=INK)
        left.invert_yaxis()
        left.set_xlabel("seconds")
        left.legend(frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0.0, 1.0), fontsize=9)
        peaks = [peak for _, peak in rows.values()] + list(others.values())
        unit, divisor = _unit(max(peaks))
        tones = [FIRST] * len(rows) + [PALE] * len(others)
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
    """One bar per name, of one segment per process: equal lengths say that no byte moved twice."""

    def paint(axes: Any) -> None:
        totals = [sum(parts) for parts in bars.values()]
        unit, divisor = _unit(max(totals))
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


def _unit(largest: int) -> tuple[str, float]:
    """GB for a real model, MB for a small one."""
    return ("GB", 1e9) if largest >= 2e9 else ("MB", 1e6)
