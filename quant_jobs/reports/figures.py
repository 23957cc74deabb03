"""The report's plots, as SVG that takes its colors from the page.

matplotlib draws with marker colors that are replaced by CSS variables, so that one drawing works on
light and dark paper; text stays text. No pyplot: no global state, no display. The same numbers give
the same bytes. The plots of a quantize run's account are in `job_figures.py`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from quant_jobs.evaluation.record import Evaluation, GroupBytes

# Drawn color -> CSS variable of templates/style.css.j2.
INK, MUTED, GRID, PALE = "#010101", "#020202", "#030303", "#080808"
FIRST, SECOND, THIRD, FOURTH = "#040404", "#050505", "#060606", "#070707"
FIFTH, SIXTH = "#090909", "#0a0a0a"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--rule",
    PALE: "--c0",
    FIRST: "--c1",
    SECOND: "--c2",
    THIRD: "--c3",
    FOURTH: "--c4",
    FIFTH: "--c5",
    SIXTH: "--c6",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "intserve",
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
}
#: Few tokens to many; readable on light and on dark paper.
_COVERAGE = LinearSegmentedColormap.from_list(
    "coverage", ["#f3e9d2", "#d9b26f", "#5f9ea0", "#2f6690", "#16324f"]
)


def draw(name: str, width: float, height: float, paint: Callable[[Any], None]) -> str:
    """One figure with one axes, painted by `paint(axes)`, as an inline <svg> element. `name` makes
    its ids unique on the page."""
    return draw_figure(name, width, height, lambda figure: paint(figure.add_subplot()))


def draw_figure(name: str, width: float, height: float, paint: Callable[[Any], None]) -> str:
    """The same with any number of axes, which `paint(figure)` makes."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """Strip what only a stand-alone file needs; colors to variables; ids to unique ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"<style.*?</style>\s*", "", svg, flags=re.S)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+)px '[^;\"]*", r"font-size: \1px", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    head, rest = svg.split(">", 1)
    # The page sets the width; the viewBox keeps the proportions.
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", head) + ">" + rest
    return svg.replace("<svg", f'<svg role="img" class="figure" data-name="{name}"', 1)


def sizes(groups: Sequence[GroupBytes]) -> str:
    """Bytes by group: BF16, as the source stores it, as quantized."""
    unit, divisor = _unit(max(group.bf16_bytes for group in groups))

    def paint(axes: Any) -> None:
        series = (("BF16", "bf16_bytes", PALE), ("source", "source_bytes", FIRST),
                  ("quantized", "artifact_bytes", SECOND))  # fmt: skip
        for index, (label, key, color) in enumerate(series):
            values = [getattr(group, key) / divisor for group in groups]
            rows = [row + (index - 1) * 0.27 for row in range(len(groups))]
            axes.barh(rows, values, height=0.23, color=color, label=label)
            if key == "artifact_bytes":
                for row, value in zip(rows, values, strict=True):
                    axes.annotate(
                        f"{value:.3g}", (value, row), (3, 0), textcoords="offset points",
                        va="center", fontsize=8, color=INK,
                    )  # fmt: skip
        axes.set_yticks(range(len(groups)), [group.group.replace("_", " ") for group in groups])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.legend(frameon=False, loc="lower right")

    return draw("sizes", 7.2, 0.5 * len(groups) + 0.9, paint)


def layer_errors(errors: Mapping[str, Mapping[int, Sequence[float]]]) -> str:
    """Relative output error of each quantized linear: group -> layer -> one value per linear."""

    def paint(axes: Any) -> None:
        colors = (FIRST, SECOND, THIRD, FOURTH)
        offsets = [(index - (len(errors) - 1) / 2) * 0.17 for index in range(len(errors))]
        for (group, layers), color, offset in zip(errors.items(), colors, offsets, strict=False):
            spots = [(layer + offset, value) for layer, vs in layers.items() for value in vs]
            axes.scatter(*zip(*spots, strict=True), s=7, color=color, alpha=0.35, linewidths=0)
            middle = [sorted(vs)[len(vs) // 2] for vs in layers.values()]
            axes.plot(
                [layer + offset for layer in layers], middle, color=color, linewidth=1.4,
                marker="o", markersize=5, label=group.replace("_", " "),
            )  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel("layer")
        axes.set_ylabel("relative output error")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")
        axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return draw("errors", 7.2, 3.4, paint)


def coverage(counts: Mapping[int, Sequence[int]], floor_tokens: int) -> str:
    """Calibration tokens per expert (columns) and layer (rows); starved experts are crossed."""

    def paint(axes: Any) -> None:
        rows = [list(experts) for experts in counts.values()]
        picture = axes.imshow(rows, aspect="auto", cmap=_COVERAGE, vmin=0, interpolation="nearest")
        starved = [
            (expert, row)
            for row, experts in enumerate(rows)
            for expert, tokens in enumerate(experts)
            if tokens < floor_tokens
        ]
        if starved:
            axes.scatter(*zip(*starved, strict=True), marker="x", s=26, color="#c0392b")
        axes.set_yticks(range(len(rows)), [str(layer) for layer in counts])
        axes.set_xlabel("routed expert")
        axes.set_ylabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = axes.figure.colorbar(picture, ax=axes, pad=0.02, aspect=14)
        bar.set_label("calibration tokens")
        bar.outline.set_visible(False)

    return draw("coverage", 7.2, min(9.0, 0.36 * len(counts) + 1.1), paint)


def kl_histogram(kl: Tensor, evaluation: Evaluation) -> str:
    """Distribution of the KL per token, on a logarithmic axis; [tokens] nats."""
    smallest = 1e-9  # exact agreement (an unquantized engine) has no place on a logarithmic axis

    def paint(axes: Any) -> None:
        values = kl.double().clamp_min(smallest)
        exponents = values.log10()
        low, high = float(exponents.min()), float(exponents.max())
        edges = [10 ** (low + (high - low + 1e-6) * step / 48) for step in range(49)]
        axes.hist(values.tolist(), bins=edges, color=FIRST, alpha=0.85)
        axes.set_xscale("log")
        axes.set_ylim(top=axes.get_ylim()[1] * 1.22)  # room for the three labels
        marks = [("mean", evaluation.kl.mean.value), ("p50", evaluation.kl.p50),
                 ("p99", evaluation.kl.p99)]  # fmt: skip
        for row, (label, value) in enumerate(marks):
            axes.axvline(max(value, smallest), color=SECOND, linewidth=1.2)
            axes.annotate(
                label,
                (max(value, smallest), 1.0),
                (3, -9 - 11 * row),  # one below the other, for they may coincide
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=8,
                color=SECOND,
            )
        axes.set_xlabel("KL(source || quantized), nats per token")
        axes.set_ylabel("tokens")
        axes.grid(axis="y")

    return draw("kl", 7.2, 2.7, paint)


def block_differences(difference_B: Tensor, ratio: float) -> str:
    """Loss of the quantized engine minus the source's, per block of text, in text order."""

    def paint(axes: Any) -> None:
        values = difference_B.tolist()
        axes.bar(
            range(len(values)),
            values,
            color=[SECOND if v > 0 else FIRST for v in values],
            width=0.8,
        )
        axes.axhline(0, color=MUTED, linewidth=0.8)
        mean = sum(values) / len(values)
        axes.axhline(mean, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            f"mean: ln {ratio:.5f}", (1.0, 1.0), (0, 2), xycoords="axes fraction",
            textcoords="offset points", ha="right", fontsize=8, color=INK,
        )  # fmt: skip
        axes.set_xlabel("block of held-out text")
        axes.set_ylabel("added loss, nats/token")
        axes.grid(axis="y")

    return draw("blocks", 7.2, 2.4, paint)


def _unit(largest: int) -> tuple[str, float]:
    """GB for a real model, MB for a small one."""
    return ("GB", 1e9) if largest >= 2e9 else ("MB", 1e6)
