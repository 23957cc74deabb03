"""Step 8, report: one HTML page for people, one JSON file for machines, from what the steps left.

Reads, decides nothing: the manifest, the evaluation and the verdict are on disk by now. The page is
self-contained (inline SVG and CSS, no script, nothing fetched) and works on light and dark paper.
Held-out text is shown where the two models disagree; it is public by nature. No prompt is.
"""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict
from tokenizers import Tokenizer
from torch import Tensor

from deepseek.errors import ArtifactError
from deepseek.files import write_atomic
from deepseek.inventory import linears
from deepseek.manifest import Manifest, read_manifest
from deepseek.verdict import VERDICT_FILE, GateVerdict, read_verdict
from quant_jobs import figures
from quant_jobs.build import BuiltEngine, read_engine
from quant_jobs.evaluation import Evaluation, read_evaluation, read_tokens
from quant_jobs.gate import judge, measure

TEMPLATES = Path(__file__).resolve().parent / "templates"
NUM_WORST = 12
CONTEXT_TOKENS = 10


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Check(_Strict):
    """One limit, as text: what was measured, its interval, the limit, and whether it is kept."""

    name: str
    measured: str
    interval: str
    limit: str
    kept: bool


class WorstToken(_Strict):
    """A held-out token on which the two models disagree, with the text before it."""

    block: int
    position: int
    before: str
    text: str
    kl: float
    source_nll: float
    quantized_nll: float


class RuleRow(_Strict):
    """One rule of the recipe and how many linears it decided."""

    match: str
    format: str
    activations: str
    algorithm: str
    linears: int


class FallbackRow(_Strict):
    """One entry of the manifest's ledger."""

    kind: str
    layer: str
    module: str
    count: int
    detail: str


class Report(_Strict):
    """`report.json`. `coverage` is calibration tokens per routed expert, by layer."""

    format_version: Literal[1] = 1
    title: str
    description: str
    verdict: Literal["pass", "fail", "open"]
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]
    coverage: dict[int, tuple[int, ...]]
    coverage_note: str
    errors: dict[str, float]
    worst_tokens: tuple[WorstToken, ...]
    rules: tuple[RuleRow, ...]
    fallbacks: tuple[FallbackRow, ...]
    provenance: dict[str, str]
    evaluation: Evaluation


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


def assemble(
    engine: BuiltEngine,
    evaluation: Evaluation,
    tokens: dict[str, Tensor],
    verdict: GateVerdict | None,
) -> Report:
    """Everything the page says, as data."""
    manifest = engine.manifest
    state: Literal["pass", "fail", "open"] = "open"
    if verdict is not None:
        state = "pass" if verdict.passed else "fail"
    return Report(
        title=f"{engine.directory.resolve().parent.name}: {evaluation.recipe or 'unquantized'}",
        description=manifest.recipe.description if manifest else "Engine of the source itself.",
        verdict=state,
        reasons=tuple(verdict.reasons) if verdict else (),
        checks=_checks(evaluation, manifest) if manifest else (),
        coverage=manifest.coverage if manifest else {},
        coverage_note=_coverage_note(manifest) if manifest else "",
        errors=_errors(manifest) if manifest else {},
        worst_tokens=_worst_tokens(tokens, engine.directory),
        rules=_rules(engine, manifest) if manifest else (),
        fallbacks=_fallbacks(manifest) if manifest else (),
        provenance=_provenance(engine, evaluation),
        evaluation=evaluation,
    )


def _check_checkpoint(checkpoint: Path, engine: BuiltEngine) -> None:
    digest = read_manifest(checkpoint).digest
    if digest != engine.artifact_digest:
        raise ArtifactError(
            f"{engine.directory} was not built from {checkpoint}: it is of artifact "
            f"{(engine.artifact_digest or 'none')[:16]}, the checkpoint is {digest[:16]}"
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
    """The page's plots by name; `errors` and `coverage` are empty where there is nothing to draw."""
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
    """The page. Everything but the plots is escaped; an unknown name in the template is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    return template.render(
        report=report, evaluation=report.evaluation, tiles=_tiles(report.evaluation), figures=drawn
    )


# --- what the page says --------------------------------------------------------------------------


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
            "note": f"{_bytes(result.artifact_bytes)} of BF16's {_bytes(result.bf16_bytes)}",
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


def _checks(evaluation: Evaluation, manifest: Manifest) -> tuple[Check, ...]:
    """The limits beside the measured values; `kept` is the gate's own comparison."""
    limits, measured = manifest.recipe.gate, measure(evaluation, manifest)
    broken = judge(measured, limits)
    ratio, kl, top1 = evaluation.perplexity_ratio, evaluation.kl.mean, evaluation.top1
    rows = [
        ("perplexity_ratio", "Perplexity ratio", f"{measured.perplexity_ratio:.5f}",
         f"{ratio.low:.5f} – {ratio.high:.5f}", f"≤ {limits.max_perplexity_ratio:g}"),
        ("mean_kl", "Mean KL, nats per token", f"{measured.mean_kl:.5f}",
         f"{kl.low:.5f} – {kl.high:.5f}", f"≤ {limits.max_mean_kl:g}"),
        ("top1", "Top-1 agreement", f"{measured.top1:.4f}",
         f"{top1.low:.4f} – {top1.high:.4f}", f"≥ {limits.min_top1:g}"),
        ("fallbacks", "Fallbacks", str(measured.fallbacks), "", f"≤ {limits.max_fallbacks}"),
        ("starved_experts", "Starved experts", f"{measured.starved_experts:.1%}", "",
         f"≤ {limits.max_starved_experts:.1%}"),
    ]  # fmt: skip
    return tuple(
        Check(name=name, measured=value, interval=interval, limit=limit, kept=key not in broken)
        for key, name, value, interval, limit in rows
    )


def _coverage_note(manifest: Manifest) -> str:
    floor = manifest.recipe.expert_coverage.floor_tokens
    starved = [
        f"{layer}.{expert}"
        for layer, experts in manifest.coverage.items()
        for expert, tokens in enumerate(experts)
        if tokens < floor
    ]
    if not starved:
        return f"Every expert saw at least {floor} tokens."
    names = ", ".join(starved[:12]) + (", …" if len(starved) > 12 else "")
    return f"{len(starved)} saw fewer than {floor} and are crossed (layer.expert: {names})."


def _errors(manifest: Manifest) -> dict[str, float]:
    """Relative output error by module, over all layers."""
    return {module: error for layer in manifest.layers for module, error in layer.errors.items()}


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


def _worst_tokens(tokens: dict[str, Tensor], engine_dir: Path) -> tuple[WorstToken, ...]:
    """The tokens with the largest KL. Logits at t judge token t+1, hence the shift."""
    tokenizer = Tokenizer.from_file(str(engine_dir / "tokenizer.json"))
    ids_BT, kl = tokens["token_ids"], tokens["kl"]
    worst = kl.flatten().argsort(descending=True, stable=True)[:NUM_WORST].tolist()
    rows = []
    for flat in worst:
        block, step = divmod(flat, kl.shape[1])
        position = step + 1
        before = ids_BT[block, max(0, position - CONTEXT_TOKENS) : position].tolist()
        rows.append(
            WorstToken(
                block=block,
                position=position,
                before=_visible(tokenizer.decode(before, skip_special_tokens=False)),
                text=_visible(tokenizer.decode([int(ids_BT[block, position])])),
                kl=float(kl[block, step]),
                source_nll=float(tokens["source_nll"][block, step]),
                quantized_nll=float(tokens["quantized_nll"][block, step]),
            )
        )
    return tuple(rows)


def _visible(text: str) -> str:
    """White space that a table would swallow, as signs."""
    return text.replace("\n", "⏎").replace("\t", "⇥")


def _rules(engine: BuiltEngine, manifest: Manifest) -> tuple[RuleRow, ...]:
    """The recipe's rules, and how many linears of this model each decided (the MTP layer's are
    carried through, whatever the rules say)."""
    counts: Counter[int] = Counter()
    for layer in range(engine.config.num_hidden_layers):
        for spec in linears(engine.config, layer):
            matching = [
                index
                for index, rule in enumerate(manifest.recipe.rules)
                if fnmatchcase(spec.module, rule.match)
            ]
            counts.update(matching[-1:])
    return tuple(
        RuleRow(
            match=rule.match,
            format=rule.label,
            activations="dynamic int8 per token" if rule.activations == "int8" else "none",
            algorithm=rule.algorithm if rule.is_quantized else "carried through",
            linears=counts[index],
        )
        for index, rule in enumerate(manifest.recipe.rules)
    )


def _fallbacks(manifest: Manifest) -> tuple[FallbackRow, ...]:
    return tuple(
        FallbackRow(
            kind=item.kind,
            layer="" if item.layer is None else str(item.layer),
            module=item.module,
            count=item.count,
            detail=item.detail,
        )
        for item in manifest.fallbacks
    )


def _provenance(engine: BuiltEngine, evaluation: Evaluation) -> dict[str, str]:
    facts = {
        "Engine digest": engine.digest,
        "Artifact digest": evaluation.artifact_digest or "none: unquantized",
        "Source fingerprint": evaluation.reference_fingerprint,
        "Held-out token ids": evaluation.data.digest,
    }
    if engine.manifest and engine.manifest.calibration:
        calibration = engine.manifest.calibration
        facts["Calibration digest"] = calibration.digest
        facts["Calibration tokens"] = f"{calibration.num_tokens:,}"
    facts["KV cache"] = evaluation.kv_cache
    facts["Engine on disk"] = _bytes(evaluation.engine_bytes)
    return facts | {f"Tool: {name}": version for name, version in evaluation.tools.items()}


def _bytes(count: int) -> str:
    """SI units, three digits: 12.3 MB, 356 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
