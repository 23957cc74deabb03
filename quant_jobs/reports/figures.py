"""Plots as SVG that takes its colors from the page: the style, and the plots of both pages.

matplotlib draws with marker colors that are replaced by CSS variables, so that one drawing works on
a light and on a dark page; text stays text. No pyplot: no global state, no display. The same
numbers give the same bytes. Plots of one page alone are in `job_figures.py`, `engine_figures.py`.

The plots are made for 61 layers of 256 experts: an error plot holds three numbers per layer and
group, the heat map is one embedded picture with a pixel per expert.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import matplotlib
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, StrMethodFormatter

from deepseek.inventory import HEAD, group_of, layer_of
from deepseek.text import printable

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
#: Longest label from data, in characters.
_MAX_LABEL = 40
#: Smallest error drawn: a linear whose weight the format holds exactly has error 0, which has no
#: place on a logarithmic axis. 1e-6 lies below every real error (INT8 is at 1e-2) and leaves most
#: of the axis to them.
_SMALLEST_ERROR = 1e-6
#: Experts that something is wrong with: too few tokens, or inputs far above the others'.
STARVED = "#c0392b"
#: Few tokens to many; an expert below the floor is STARVED. Readable on light and dark pages.
_TOKENS = LinearSegmentedColormap.from_list(
    "tokens", ["#f3e9d2", "#d9b26f", "#5f9ea0", "#2f6690", "#16324f"]
).with_extremes(under=STARVED)

#: Panels of the error plot, in order, with their colors. A layer has a dense MLP or a shared
#: expert, never both, so the two share a panel. Routed experts have two panels: the input of
#: `down_proj` is made inside the expert and its errors are larger, so that one median over all
#: three linears would lie where none of them is.
_ERROR_COLORS = {
    "attention": FIRST,
    "dense MLP, shared expert": THIRD,
    "routed gate and up": SECOND,
    "routed down": FOURTH,
}
ERROR_GROUPS = tuple(_ERROR_COLORS)


def draw(name: str, width: float, height: float, paint: Callable[[Any], None]) -> str:
    """A figure with one pair of axes, which `paint(axes)` fills, as an inline <svg> element.

    `width` and `height` are in inches. `name` makes the ids of the figure unique on the page.
    """
    return draw_figure(name, width, height, lambda figure: paint(figure.add_subplot()))


def draw_figure(name: str, width: float, height: float, paint: Callable[[Any], None]) -> str:
    """Like `draw`, with any number of axes, which `paint(figure)` makes."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """An <svg> element for a page from matplotlib's SVG file: without what only a file needs, with
    CSS variables for the marker colors, and with ids that begin with `name`."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"<style.*?</style>\s*", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)  # the text of each label once more
    # Only within tags: between them stands the text of labels. matplotlib escapes `<` and `>` there
    # and in attributes.
    svg = re.sub(r"<[^>]*>", lambda tag: _inline_tag(tag[0], name), svg)
    head, rest = svg.split(">", 1)
    # The page sets the width; the viewBox keeps the proportions.
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", head) + ">" + rest
    return svg.replace("<svg", f'<svg role="img" class="figure" data-name="{name}"', 1)


def _inline_tag(tag: str, name: str) -> str:
    tag = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", tag)
    tag = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', tag)
    tag = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", tag)
    tag = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', tag)
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r"font: ([\d.]+)px '[^;\"]*", r"font-size: \1px", tag)
    for color, variable in _VARIABLES.items():
        tag = tag.replace(color, f"var({variable})")
    return tag


def label(text: str) -> str:
    """Text of data as a label of a plot: one short line in which `$` begins no formula."""
    shown = printable(text)
    if len(shown) > _MAX_LABEL:
        shown = f"{shown[: _MAX_LABEL - 1]}…"
    return shown.replace("$", r"\$")


def error_group(module: str) -> str:
    """The one of ERROR_GROUPS that a quantized linear belongs to, by its module name."""
    match group_of(module):
        case "attention":
            return "attention"
        case "routed_experts":
            return "routed down" if module.endswith(".down_proj") else "routed gate and up"
        case _:
            return "dense MLP, shared expert"


def errors_by_group(errors: Mapping[str, float]) -> dict[str, dict[int, list[float]]]:
    """error group -> layer -> errors of its linears, from errors by module name
    (`model.layers.N...`); groups and layers in order, groups without a linear left out. The head
    is in no layer."""
    grouped: dict[str, dict[int, list[float]]] = {group: {} for group in ERROR_GROUPS}
    for module, error in errors.items():
        if module == HEAD:
            continue
        grouped[error_group(module)].setdefault(layer_of(module), []).append(error)
    return {group: dict(sorted(layers.items())) for group, layers in grouped.items() if layers}


def layer_errors(errors: Mapping[str, float]) -> str:
    """Relative output error by layer, one panel per error group: the range from the smallest to the
    largest, and the median. `errors` maps the module name of a linear to its error. Empty where no
    layer has one."""
    groups = errors_by_group(errors)
    if not groups:
        return ""
    num_rows = (len(groups) + 1) // 2

    def paint(figure: Any) -> None:
        panels = figure.subplots(num_rows, 2, sharex=True, sharey=True, squeeze=False).flat
        for axes, (group, layers) in zip(panels, groups.items(), strict=False):
            color, numbers = _ERROR_COLORS[group], list(layers)
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
        if len(groups) % 2:  # the last place is empty: the panel above it is the lowest there
            panels[-1].set_visible(False)
            if num_rows > 1:
                panels[-3].xaxis.set_tick_params(labelbottom=True)
        figure.supxlabel("layer", fontsize=9.5, color=MUTED)
        figure.supylabel("relative output error", fontsize=9.5, color=MUTED)

    return draw_figure("errors", 7.2, 2.1 * num_rows + 0.3, paint)


def coverage(counts: Mapping[int, Sequence[int]], floor_tokens: int) -> str:
    """Calibration tokens per routed expert (columns) and layer (rows), on a logarithmic scale from
    the floor, or from the smallest count where all reach it. Experts below the floor or without
    tokens are red."""
    rows = [list(experts) for experts in counts.values()]
    smallest, largest = min(map(min, rows)), max(map(max, rows))
    low = max(smallest, floor_tokens, 1)
    high = max(low + 1, largest)
    few = len(rows) <= 16

    def paint(axes: Any) -> None:
        # One pixel per expert, enlarged by the browser. Starved experts get one value well below
        # the scale, and the scale begins a little below `low`: the logarithm of `low` itself may
        # round to either side of the limit.
        picture = axes.imshow(
            [[tokens if tokens >= low else low / 2 for tokens in row] for row in rows],
            aspect="auto", cmap=_TOKENS, norm=LogNorm(0.99 * low, high), interpolation="none",
        )  # fmt: skip
        ticks = range(0, len(rows), 1 if few else 5)
        axes.set_yticks(list(ticks), [str(list(counts)[row]) for row in ticks])
        axes.set_xlabel("routed expert")
        axes.set_ylabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = axes.figure.colorbar(
            picture, ax=axes, pad=0.02, aspect=14 if few else 30, ticks=_count_ticks(high / low),
            format=StrMethodFormatter("{x:,.0f}"), extend="min" if smallest < low else "neither",
        )  # fmt: skip
        bar.minorticks_off()
        bar.set_label("calibration tokens")
        bar.outline.set_visible(False)

    return draw("coverage", 7.2, min(7.5, 0.3 * len(counts) + 1.3), paint)


def _count_ticks(ratio: float) -> Locator:
    """A few whole numbers on a logarithmic scale whose ends have this ratio."""
    if ratio < 10:
        return MaxNLocator(5, integer=True, min_n_ticks=1)
    return LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 100 else (1.0,))


def unit_of(largest: int) -> tuple[str, float]:
    """The unit for an axis up to `largest` bytes, and its bytes: GB for a real model, MB for a
    small one."""
    return ("GB", 1e9) if largest >= 2e9 else ("MB", 1e6)
