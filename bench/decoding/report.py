"""The Markdown tables of bench/peers_decode.py, for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.decoding.ceilings import Ceilings
from bench.decoding.rounds import PREFILL, Figures
from bench.decoding.traffic import Stored, step_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What was measured: contenders' names in order, how each stores the model, figures."""

    names: Sequence[str]
    stored: Mapping[str, Stored]
    words: Mapping[str, str]
    figures: Figures
    batches: Sequence[int]
    context: int
    ceilings: Ceilings
    num_experts: int
    per_token: int

    def rate(self, name: str, batch: int) -> float | None:
        """Tokens per second: of the prompt, or decoded for all sequences together."""
        seconds = self.figures.median(name, batch)
        return None if seconds is None else (batch or self.context) / seconds

    def bytes(self, name: str, batch: int) -> float:
        """Bytes of one step; the context has grown to its middle while it was timed."""
        return step_bytes(
            self.stored[name],
            batch=batch,
            context=self.context,
            num_experts=self.num_experts,
            per_token=self.per_token,
        )

    def share(self, name: str, batch: int) -> float | None:
        """Of the bandwidth ceiling of all threads."""
        seconds = self.figures.median(name, batch)
        if seconds is None:
            return None
        return self.bytes(name, batch) / seconds / self.ceilings.bandwidth[self.ceilings.threads]


def rates(run: Run) -> str:
    """Tokens per second, with half the range over the rounds in percent of the median."""
    columns = (PREFILL, *run.batches)
    heads = [_head(run, batch) for batch in columns]
    rows = []
    for name in run.names:
        cells = []
        for batch in columns:
            rate = run.rate(name, batch)
            cells.append(
                "-" if rate is None else f"{_number(rate)} ±{run.figures.spread(name, batch):.0%}"
            )
        rows.append([name, *cells])
    return table(["tokens/s", *heads], rows)


def ratios(run: Run, pairs: Sequence[tuple[str, str]]) -> str:
    """Speeds of contenders over others', where both were measured."""
    columns = (PREFILL, *run.batches)
    rows = []
    for name, other in pairs:
        cells = []
        for batch in columns:
            rate, base = run.rate(name, batch), run.rate(other, batch)
            cells.append("-" if rate is None or base is None else f"{rate / base:.2f}x")
        if any(cell != "-" for cell in cells):
            rows.append([f"{name} / {other}", *cells])
    return table(["speed", *(_head(run, batch) for batch in columns)], rows)


def bandwidth(run: Run) -> str:
    """Bytes of a token at batch 1 and what the memory makes of it."""
    speed = run.ceilings.bandwidth[run.ceilings.threads]
    rows = []
    for name in run.names:
        rate, share = run.rate(name, 1), run.share(name, 1)
        if rate is None or share is None:
            continue
        size = run.bytes(name, 1)
        cells = [f"{size / 1e6:.0f}", _number(speed / size), _number(rate), f"{share:.0%}"]
        rows.append([name, *cells, run.words[name]])
    return table(
        ["batch 1", "MB a token", "ceiling, tokens/s", "reached", "share", "how it runs"], rows
    )


def ceilings(found: Ceilings) -> str:
    rows = [
        [f"memory read, {count} thread{'s' if count > 1 else ''}", f"{rate / 1e9:.1f} GB/s"]
        for count, rate in found.bandwidth.items()
    ]
    rows += [
        [f"{name} product, {found.threads} threads", f"{rate / 1e9:,.0f} Gop/s"]
        for name, rate in found.operations.items()
    ]
    return table(["ceiling", "measured"], rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text and the others are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _head(run: Run, batch: int) -> str:
    return f"prefill {run.context}" if batch == PREFILL else f"batch {batch}"


def _number(value: float) -> str:
    """Three digits, as many as five rounds are good for."""
    digits = 0 if value >= 99.95 else 1
    return f"{value:,.{digits}f}"
