"""What a run was worth: goodput under the SLO, GPU hours, direction changes, latency."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .fleet import Run

GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What one request shall have: seconds to its first token, and between tokens."""

    ttft_s: float = 2.0
    itl_s: float = 0.08


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row. Shares are of all requests that ended; latencies of those that were served."""

    trace: str
    nodes: int
    scaler: str
    requests: int
    goodput: float
    refused: float
    ttft_p99_s: float
    itl_p99_s: float
    gpu_hours: float
    turns: int
    moves: int
    most: int

    def row(self) -> str:
        """A line of the Markdown table."""
        return (
            f"| {self.trace} | {self.nodes} | {self.scaler} | {self.requests:,} | "
            f"{self.goodput:.1%} | {self.refused:.1%} | {self.ttft_p99_s:.2f} s | "
            f"{self.itl_p99_s * 1e3:.0f} ms | {self.gpu_hours:,.1f} | {self.turns} | "
            f"{self.moves} | {self.most} |"
        )


HEAD = (
    "| trace | nodes | policy | requests | goodput | refused | TTFT p99 | ITL p99 | GPU hours | "
    "turns | moves | most |\n" + "|---" * 12 + "|"
)


def result(trace: str, nodes: int, scaler: str, run: Run, slo: Slo) -> Result:
    """The figures of a run."""
    ended = len(run.served) + len(run.refused)
    ttfts = sorted(r.ttft_s for r in run.served if r.ttft_s is not None)
    itls = sorted(r.itl_s for r in run.served if r.itl_s is not None)
    good = sum(
        r.ttft_s is not None and r.ttft_s <= slo.ttft_s and (r.itl_s or 0.0) <= slo.itl_s
        for r in run.served
    )
    return Result(
        trace=trace,
        nodes=nodes,
        scaler=scaler,
        requests=ended,
        goodput=good / max(1, ended),
        refused=len(run.refused) / max(1, ended),
        ttft_p99_s=percentile(ttfts, 0.99),
        itl_p99_s=percentile(itls, 0.99),
        gpu_hours=run.replica_s / 3600.0 * GPUS_PER_NODE,
        turns=run.direction_changes,
        moves=max(0, len(run.targets) - 1),
        most=max((count for _, count in run.targets), default=0),
    )


def percentile(ordered: list[float], share: float) -> float:
    """The value that so many of the ordered values do not exceed; 0 of none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def as_json(results: list[Result]) -> list[dict[str, Any]]:
    return [asdict(row) for row in results]


def plot(runs: dict[tuple[str, int, str], Run], horizon_s: float, path: Path) -> None:
    """The provisioned replicas over time: one panel per trace and size, one line per policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(trace for trace, _, _ in runs))
    sizes = list(dict.fromkeys(nodes for _, nodes, _ in runs))
    figure, axes = pyplot.subplots(
        len(names), len(sizes), figsize=(4.5 * len(sizes), 2.6 * len(names)), squeeze=False
    )
    for (trace, nodes, scaler), run in runs.items():
        panel = axes[names.index(trace)][sizes.index(nodes)]
        times = [time_s / 60.0 for time_s, _ in run.targets] + [horizon_s / 60.0]
        counts = [count for _, count in run.targets]
        panel.step(times, [*counts, counts[-1]], where="post", label=scaler, linewidth=1.0)
        panel.set_title(f"{trace}, {nodes} node{'s' * (nodes > 1)}", fontsize=9)
        panel.set_ylim(bottom=0)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("minutes")
    figure.supylabel("replicas, loading ones included")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
