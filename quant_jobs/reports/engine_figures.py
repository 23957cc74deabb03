"""The plots of the page about an engine that no other page has: KL, added loss, sizes.

Called by `engine_page.py` alone; the style and the shared plots are in `figures.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from quant_jobs.evaluation.record import Evaluation, GroupBytes
from quant_jobs.reports.figures import FIRST, INK, MUTED, PALE, SECOND, draw, unit_of


def sizes(groups: Sequence[GroupBytes]) -> str:
    """Bytes by group of the model: in BF16, as the source stores them, and quantized."""
    unit, divisor = unit_of(max(group.bf16_bytes for group in groups))

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


def kl_histogram(kl: Tensor, evaluation: Evaluation) -> str:
    """Distribution of the KL per token, on a logarithmic axis; [tokens] nats."""
    smallest = 1e-9  # exact agreement (an engine of the source) has no place on a logarithmic axis

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
    """Loss of the quantized engine minus the source's by block of text, [blocks] nats per token, in
    text order. `ratio` is the perplexity ratio, whose logarithm is the mean."""

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
