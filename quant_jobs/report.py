"""Step 8, report: one HTML page for people, one JSON file for machines, from what the steps left.

Reads, decides nothing: the manifest, the evaluation and the verdict are on disk by now. The page is
self-contained (inline SVG and CSS, no script, nothing fetched) and works on light and dark paper.
"""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup
from torch import Tensor

from deepseek.artifact.built_engine import BuiltEngine, read_engine
from deepseek.artifact.manifest import Manifest, read_manifest
from deepseek.artifact.verdict import VERDICT_FILE, GateVerdict, read_verdict
from deepseek.errors import ArtifactError
from deepseek.files import write_atomic
from quant_jobs.evaluation.record import Evaluation, read_evaluation
from quant_jobs.evaluation.tokens import read_tokens
from quant_jobs.reports import figures
from quant_jobs.reports.findings import Report, assemble
from quant_jobs.reports.page import render_page, show_bytes


def run_report(
    engine_dir: Path, evaluation_dir: Path, output: Path, *, checkpoint: Path | None = None
) -> Report:
    """Write OUTPUT (HTML) and, beside it, the same with the suffix `.json`.

    Raises:
        ArtifactError: a document is missing or belongs to another engine.
    """
    engine = read_engine(engine_dir)
    evaluation = read_evaluation(evaluation_dir)
    if evaluation.engine_digest != engine.digest:
        raise ArtifactError(
            f"{evaluation_dir} is an evaluation of another engine than {engine_dir}; evaluate it"
        )
    if output.suffix == ".json":
        raise ArtifactError(f"--output {output} is where the JSON would go; name an .html file")
    if checkpoint is not None:
        _check_checkpoint(checkpoint, engine)
    tokens = read_tokens(evaluation_dir)
    report = assemble(engine, evaluation, tokens, _verdict_of(engine, evaluation))
    html = render(report, draw_figures(report, engine.manifest, tokens))
    output.parent.mkdir(parents=True, exist_ok=True)
    text = report.model_dump_json(indent=2) + "\n"
    write_atomic(output.with_suffix(".json"), text.encode())
    write_atomic(output, html.encode())
    return report


def _check_checkpoint(checkpoint: Path, engine: BuiltEngine) -> None:
    digest = read_manifest(checkpoint).digest
    if digest != engine.artifact_digest:
        raise ArtifactError(
            f"{engine.directory} was built from artifact {engine.artifact_digest[:16]}, not from "
            f"{checkpoint} ({digest[:16]}); name its own checkpoint or none"
        )


def _verdict_of(engine: BuiltEngine, evaluation: Evaluation) -> GateVerdict | None:
    """The verdict about this engine and this evaluation; None where `gate` has not run.

    Raises:
        ArtifactError: the verdict is about another engine, or about other measurements.
    """
    if not (engine.directory / VERDICT_FILE).exists():
        return None
    verdict = read_verdict(engine.directory)
    same = verdict.engine_digest == engine.digest
    if not same or verdict.measured.get("mean_kl") != evaluation.kl.mean.value:
        raise ArtifactError(
            f"{engine.directory / VERDICT_FILE} judges another "
            f"{'evaluation' if same else 'engine'}; run `python -m quant_jobs gate` again"
        )
    return verdict


def draw_figures(
    report: Report, manifest: Manifest | None, tokens: dict[str, Tensor]
) -> dict[str, Markup]:
    """The page's plots by name; `errors` and `coverage` are empty where nothing is known."""
    evaluation = report.evaluation
    difference_BT = tokens["quantized_nll"].double() - tokens["source_nll"].double()
    drawn = {
        "kl": figures.kl_histogram(tokens["kl"].flatten(), evaluation),
        "blocks": figures.block_differences(
            difference_BT.mean(dim=1), evaluation.perplexity_ratio.value
        ),
        "sizes": figures.sizes(evaluation.sizes),
        "errors": "",
        "coverage": "",
    }
    if report.errors:
        drawn["errors"] = figures.layer_errors(_errors_by_group(report.errors))
    if report.coverage and manifest:
        floor = manifest.recipe.expert_coverage.floor_tokens
        drawn["coverage"] = figures.coverage(report.coverage, floor)
    # Our own SVG, not user text: the one thing on the page that must not be escaped.
    return {name: Markup(svg) for name, svg in drawn.items()}


def render(report: Report, drawn: dict[str, Markup]) -> str:
    """The page. Everything but the plots is escaped; an unknown name is an error."""
    return render_page(
        "report.html.j2",
        report=report,
        evaluation=report.evaluation,
        tiles=_tiles(report.evaluation),
        figures=drawn,
    )


def _tiles(result: Evaluation) -> list[dict[str, str]]:
    """The five figures that a reader came for."""
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


def _errors_by_group(errors: dict[str, float]) -> dict[str, dict[int, list[float]]]:
    """group -> layer -> errors of its linears, for the plot."""
    grouped: dict[str, dict[int, list[float]]] = {}
    for module, error in errors.items():
        layer = int(module.split(".")[2])
        if ".self_attn." in module:
            group = "attention"
        elif ".experts." in module:
            group = "routed_experts"
        elif ".shared_experts." in module:
            group = "shared_experts"
        else:
            group = "dense_mlp"
        # A zero (a weight that the format holds exactly) has no place on a logarithmic axis.
        grouped.setdefault(group, {}).setdefault(layer, []).append(max(error, 1e-9))
    return {group: dict(sorted(layers.items())) for group, layers in sorted(grouped.items())}
