"""Step time against batch and context as a picture, and as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.decoding.growth import Point
from bench.decoding.report import table


def context_table(points: Sequence[Point]) -> str:
    """Milliseconds per token and bytes of context at batch 1."""
    at_one = [point for point in points if point.batch == 1]
    contexts = sorted({point.context for point in at_one})
    rows = []
    for name, kv_cache in _models(points):
        of_model = {p.context: p for p in at_one if (p.model, p.kv_cache) == (name, kv_cache)}
        size = next(point.bytes // point.context for point in of_model.values())
        cells = [
            f"{1e3 * of_model[context].seconds:.1f}" if context in of_model else "-"
            for context in contexts
        ]
        rows.append([f"{name}, KV {kv_cache}", f"{size:,}", *cells])
    heads = [f"{context:,} tokens" for context in contexts]
    return table(["ms a token at batch 1", "bytes of a token's context", *heads], rows)


def batch_table(points: Sequence[Point]) -> str:
    """Milliseconds of a step, by batch, and the exponent of its growth: 1 is linear."""
    base = min(point.context for point in points if point.batch == max(p.batch for p in points))
    batches = sorted({point.batch for point in points if point.context == base})
    rows = []
    for name, kv_cache in _models(points):
        of_model = {
            p.batch: p for p in points if (p.model, p.kv_cache, p.context) == (name, kv_cache, base)
        }
        steps = [of_model[batch].seconds for batch in batches]
        cells = [f"{1e3 * seconds:.1f}" for seconds in steps]
        worst = max(
            (later / steps[i] / (batches[i + 1] / batches[i]) for i, later in enumerate(steps[1:])),
            default=0.0,
        )
        rows.append([f"{name}, KV {kv_cache}", *cells, f"{worst:.2f}"])
    heads = [f"batch {batch}" for batch in batches]
    return table([f"ms a step, context {base}", *heads, "worst growth over linear"], rows)


def draw(points: Sequence[Point], path: Path) -> None:
    """Write the picture; both axes of both halves are logarithmic, so a straight line of slope one
    is linear growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    base = min(point.context for point in points)
    for name, kv_cache in _models(points):
        own = [p for p in points if (p.model, p.kv_cache) == (name, kv_cache)]
        label = f"{name}, KV {kv_cache}"
        by_batch = sorted((p.batch, 1e3 * p.seconds) for p in own if p.context == base)
        left.plot(*zip(*by_batch, strict=True), marker="o", label=label)
        by_context = sorted((p.context, 1e3 * p.seconds) for p in own if p.batch == 1)
        right.plot(*zip(*by_context, strict=True), marker="o", label=label)
    left.set(xlabel=f"batch (context {base})", ylabel="step, ms")
    right.set(xlabel="context (batch 1), tokens", ylabel="step, ms")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _models(points: Sequence[Point]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((point.model, point.kv_cache) for point in points))
