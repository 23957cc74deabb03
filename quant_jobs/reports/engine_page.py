"""The page about an engine, `report.html`: its plots and headline figures.

Everything is taken from the report (`findings.py`) and the evaluation's per-token results. The page
is self-contained (inline SVG and CSS, no script, nothing fetched), for light and dark screens.
"""

from __future__ import annotations

from markupsafe import Markup
from torch import Tensor

from deepseek.artifact.manifest import Manifest
from deepseek.inventory import HEAD
from quant_jobs.evaluation.record import Evaluation
from quant_jobs.reports import engine_figures, figures
from quant_jobs.reports.findings import Report
from quant_jobs.reports.page import render_page, show_bytes


def draw_figures(
    report: Report, manifest: Manifest | None, tokens: dict[str, Tensor]
) -> dict[str, Markup]:
    """The page's plots by name. `errors` and `coverage` are empty for an engine without a manifest.

    `tokens` holds the evaluation's results per token (`read_tokens`): `kl`, `source_nll` and
    `quantized_nll` in nats, [B, T - 1].
    """
    evaluation = report.evaluation
    difference_BT = tokens["quantized_nll"].double() - tokens["source_nll"].double()
    drawn = {
        "kl": engine_figures.kl_histogram(tokens["kl"].flatten(), evaluation),
        "blocks": engine_figures.block_differences(
            difference_BT.mean(dim=1), evaluation.perplexity_ratio.value
        ),
        "sizes": engine_figures.sizes(evaluation.sizes),
        "errors": "",
        "coverage": "",
    }
    if report.errors:
        drawn["errors"] = figures.layer_errors(report.errors)
    if report.coverage and manifest:
        floor = manifest.recipe.expert_coverage.floor_tokens
        drawn["coverage"] = figures.coverage(report.coverage, floor)
    # Our own SVG, not user text: the one thing on the page that must not be escaped.
    return {name: Markup(svg) for name, svg in drawn.items()}


def render(report: Report, drawn: dict[str, Markup]) -> str:
    """The page, from the report and its plots. Everything but the plots is escaped."""
    return render_page(
        "report.html.j2",
        report=report,
        evaluation=report.evaluation,
        tiles=_tiles(report.evaluation),
        figures=drawn,
        head_error=report.errors.get(HEAD),
    )


def _tiles(result: Evaluation) -> list[dict[str, str]]:
    """The headline figures: quality, size and, where it was measured, speed."""
    ratio, kl, top1 = result.perplexity_ratio, result.kl, result.top1
    tiles = [
        {
            "name": "Perplexity ratio",
            "value": f"{ratio.value:.4f}",
            "note": f"{result.source_perplexity:.3f} → {result.perplexity:.3f} "
            f"(±{1.96 * ratio.standard_error:.4f})",
        },
        {
            "name": "KL to the source",
            "value": f"{kl.mean.value:.4f}",
            "note": f"nats per token, p99 {kl.p99:.3f}",
        },
        {
            "name": "Top-1 agreement",
            "value": f"{top1.value:.2%}",
            "note": f"{top1.low:.2%} to {top1.high:.2%}",
        },
        {
            "name": "Size",
            "value": f"{result.artifact_bytes / result.bf16_bytes:.1%}",
            "note": f"{show_bytes(result.artifact_bytes)}, BF16 {show_bytes(result.bf16_bytes)}",
        },
    ]
    if result.speed:
        speed = result.speed[0]
        tiles.append(
            {
                "name": "Decode speed",
                "value": f"{speed.tokens_per_s / speed.source_tokens_per_s:.2f}x",
                "note": f"{speed.tokens_per_s:.0f} tokens/s at batch {speed.batch_size}",
            }
        )
    return tiles
