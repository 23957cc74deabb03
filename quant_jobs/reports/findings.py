"""The content of `report.json`, from which the page about an engine is made.

Collected from the manifest, the evaluation and the verdict; nothing is decided here. The report
shows pieces of the held-out text, where the two models disagree; that text is public, and no
prompt of a user is shown. Called by `report` alone.
"""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from deepseek.artifact.built_engine import BuiltEngine
from deepseek.artifact.manifest import Manifest
from deepseek.artifact.verdict import GateVerdict
from deepseek.config import ModelConfig
from deepseek.engine.detokenizer import engine_tokenizer
from deepseek.inventory import linears
from deepseek.recipe import ActivationFormat, GateLimits, Recipe
from quant_jobs.evaluation.limits import judge, measure
from quant_jobs.evaluation.record import Evaluation
from quant_jobs.reports.page import show_bytes

NUM_WORST = 12
CONTEXT_TOKENS = 10

#: How each activation format is called on the page.
ACTIVATIONS: dict[ActivationFormat, str] = {
    "none": "none",
    "int8": "dynamic int8 per token",
    "fp8": "static fp8 per tensor",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Check(_Strict):
    """One limit of the gate, as text: the measured value, its 95 % interval and the limit; `kept`
    says whether the value is within it."""

    name: str
    measured: str
    interval: str
    limit: str
    kept: bool


class WorstToken(_Strict):
    """A held-out token on which the two models disagree, with the text before it. `kl` and the
    losses are in nats."""

    block: int
    position: int
    before: str
    text: str
    kl: float
    source_nll: float
    quantized_nll: float


class RuleRow(_Strict):
    """One rule of the recipe and the number of linears that it decided."""

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
    """The content of `report.json`. `coverage` maps a layer to the calibration tokens of each
    routed expert, `errors` the module name of a linear to its relative output error."""

    format_version: Literal[3] = 3
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


def assemble(
    engine: BuiltEngine,
    evaluation: Evaluation,
    tokens: dict[str, Tensor],
    verdict: GateVerdict | None,
) -> Report:
    """The report of one engine; `verdict` is None where `gate` has not run.

    `tokens` holds the evaluation's results per token (`read_tokens`): `token_ids` [B, T], and `kl`,
    `source_nll` and `quantized_nll` in nats, [B, T - 1].
    """
    manifest = engine.manifest
    state: Literal["pass", "fail", "open"] = "open"
    if verdict is not None:
        state = "pass" if verdict.passed else "fail"
    return Report(
        title=evaluation.recipe,
        description=manifest.recipe.description if manifest else "Engine of the source itself.",
        verdict=state,
        reasons=tuple(verdict.reasons) if verdict else (),
        checks=_checks(evaluation, engine, manifest.recipe.gate) if manifest else (),
        coverage=manifest.coverage if manifest else {},
        coverage_note=_coverage_note(manifest) if manifest else "",
        errors=_errors(manifest) if manifest else {},
        worst_tokens=_worst_tokens(tokens, engine),
        rules=rule_rows(manifest.recipe, engine.config) if manifest else (),
        fallbacks=_fallbacks(manifest) if manifest else (),
        provenance=_provenance(engine, evaluation),
        evaluation=evaluation,
    )


def _checks(evaluation: Evaluation, engine: BuiltEngine, limits: GateLimits) -> tuple[Check, ...]:
    """One row per limit. `kept` comes from the gate's own comparison."""
    measured = measure(evaluation, engine)
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
        ("input_outliers", "Input outliers", str(len(measured.input_outliers)), "",
         f"≤ {limits.max_input_outliers}"),
    ]  # fmt: skip
    return tuple(
        Check(name=name, measured=value, interval=interval, limit=limit, kept=key not in broken)
        for key, name, value, interval, limit in rows
    )


def _coverage_note(manifest: Manifest) -> str:
    """One sentence about the experts below the recipe's floor."""
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
    return f"{len(starved)} saw fewer than {floor} and are red (layer.expert: {names})."


def _errors(manifest: Manifest) -> dict[str, float]:
    """Relative output error by module, over all layers."""
    return {module: error for layer in manifest.layers for module, error in layer.errors.items()}


def _worst_tokens(tokens: dict[str, Tensor], engine: BuiltEngine) -> tuple[WorstToken, ...]:
    """The tokens with the largest KL. The logits at position t are about token t+1, hence `+ 1`.
    Without a tokenizer they are shown as ids."""
    tokenizer = engine_tokenizer(engine.directory, engine.documents)

    def show(ids: list[int], *, skip_special_tokens: bool) -> str:
        if tokenizer is None:
            return " ".join(map(str, ids))
        return _visible(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

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
                before=show(before, skip_special_tokens=False),
                text=show([int(ids_BT[block, position])], skip_special_tokens=True),
                kl=float(kl[block, step]),
                source_nll=float(tokens["source_nll"][block, step]),
                quantized_nll=float(tokens["quantized_nll"][block, step]),
            )
        )
    return tuple(rows)


def _visible(text: str) -> str:
    """Replace white space that HTML collapses by visible signs."""
    return text.replace("\n", "⏎").replace("\t", "⇥")


def rule_rows(recipe: Recipe, config: ModelConfig) -> tuple[RuleRow, ...]:
    """The recipe's rules, with the number of linears that each decides: the last match wins.

    Linears of MTP layers and of the indexer are not counted, because they are carried through
    whatever the rules say.
    """
    counts: Counter[int] = Counter()
    for layer in range(config.num_hidden_layers):
        for spec in linears(config, layer):
            if spec.is_carried:
                continue
            matching = [
                index
                for index, rule in enumerate(recipe.rules)
                if fnmatchcase(spec.module, rule.match)
            ]
            counts.update(matching[-1:])
    return tuple(
        RuleRow(
            match=rule.match,
            format=rule.label,
            activations=ACTIVATIONS[rule.activations],
            algorithm=rule.algorithm if rule.is_quantized else "carried through",
            linears=counts[index],
        )
        for index, rule in enumerate(recipe.rules)
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
        "Artifact digest": evaluation.artifact_digest,
        "Source fingerprint": evaluation.reference_fingerprint,
        "Held-out token ids": evaluation.data.digest,
    }
    if engine.manifest and engine.manifest.calibration:
        calibration = engine.manifest.calibration
        facts["Calibration digest"] = calibration.digest
        facts["Calibration tokens"] = f"{calibration.num_tokens:,}"
    facts["Target"] = evaluation.target
    facts["Computed by"] = evaluation.how
    facts["KV cache"] = evaluation.kv_cache
    facts["Engine on disk"] = show_bytes(evaluation.engine_bytes)
    return facts | {f"Tool: {name}": version for name, version in evaluation.tools.items()}
