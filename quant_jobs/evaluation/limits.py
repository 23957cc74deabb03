"""Compares measured figures with the limits of a recipe: pure functions of numbers, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from deepseek.artifact.built_engine import BuiltEngine
from deepseek.artifact.input_maxima import InputOutlier
from deepseek.inventory import linears
from deepseek.recipe import GateLimits
from quant_jobs.evaluation.record import Evaluation

#: Fewest judged tokens of a verdict. With fewer, at a KL near 0.01 nats, the standard error of the
#: mean is as large as the difference between a good and a bad recipe.
MIN_TOKENS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The figures that have limits. `mean_kl` is in nats per token, `top1` is a share of the judged
    tokens, `starved_experts` a share of all routed experts; `fallbacks` is the sum of the counts in
    the manifest's ledger. `input_outliers` are the experts' inputs that set the static FP8 scale of
    their layer far above what the other experts need; none where the engine has no such scales."""

    perplexity_ratio: float
    mean_kl: float
    top1: float
    fallbacks: int
    starved_experts: float
    input_outliers: tuple[InputOutlier, ...] = ()

    def figures(self) -> dict[str, float]:
        """The figures by name, as a verdict records them."""
        return asdict(self) | {"input_outliers": len(self.input_outliers)}


def judge(measured: Measured, limits: GateLimits) -> dict[str, str]:
    """The broken limits: field of `Measured` -> reason, one sentence. Empty means pass. Limits are
    inclusive.

    The comparisons are `not (value <= limit)`, so that a NaN fails.
    """
    broken = {}
    if not measured.perplexity_ratio <= limits.max_perplexity_ratio:
        broken["perplexity_ratio"] = (
            f"perplexity ratio {measured.perplexity_ratio:.5f} is above "
            f"{limits.max_perplexity_ratio:g}"
        )
    if not measured.mean_kl <= limits.max_mean_kl:
        broken["mean_kl"] = (
            f"mean KL {measured.mean_kl:.5f} is above {limits.max_mean_kl:g} nats per token"
        )
    if not measured.top1 >= limits.min_top1:
        broken["top1"] = f"top-1 agreement {measured.top1:.4f} is below {limits.min_top1:g}"
    if not measured.fallbacks <= limits.max_fallbacks:
        broken["fallbacks"] = (
            f"fallbacks in the ledger: {measured.fallbacks}, more than {limits.max_fallbacks}"
        )
    if not measured.starved_experts <= limits.max_starved_experts:
        broken["starved_experts"] = (
            f"{measured.starved_experts:.1%} of the experts saw too few calibration tokens, more "
            f"than {limits.max_starved_experts:.1%}"
        )
    outliers = measured.input_outliers
    if not len(outliers) <= limits.max_input_outliers:
        worst = max(outliers, key=lambda outlier: outlier.ratio)
        broken["input_outliers"] = (
            f"outliers among the inputs of the experts: {len(outliers)}, more than "
            f"{limits.max_input_outliers}; the largest: {worst.describe()}"
        )
    return broken


def starved_share(coverage: Mapping[int, Sequence[int]], floor_tokens: int) -> float:
    """Share of routed experts that fewer than `floor_tokens` calibration tokens reached; 0 where
    the manifest has no coverage (no calibration, or no MoE layer)."""
    counts = [tokens for experts in coverage.values() for tokens in experts]
    return sum(tokens < floor_tokens for tokens in counts) / len(counts) if counts else 0.0


def static_input_outliers(engine: BuiltEngine) -> tuple[InputOutlier, ...]:
    """The outliers of the layers whose routed experts have static FP8 inputs in this engine: where
    the recipe gives them such inputs, and where the target does so with all INT4 experts, as
    TensorRT-LLM and SGLang's `w4afp8` do."""
    assert engine.manifest is not None
    layers = {
        layer
        for layer in {outlier.layer for outlier in engine.manifest.input_outliers}
        for spec in linears(engine.config, layer)
        if spec.expert is not None
        and (scheme := engine.schemes[spec.module]).is_quantized
        and (
            scheme.activations == "fp8"
            or (scheme.bits == 4 and layer in engine.static_input_layers)
        )
    }
    return tuple(outlier for outlier in engine.manifest.input_outliers if outlier.layer in layers)


def measure(evaluation: Evaluation, engine: BuiltEngine) -> Measured:
    """Collect the figures that have limits from the evaluation and the documents of the engine,
    which is of a quantized checkpoint."""
    manifest = engine.manifest
    assert manifest is not None
    floor = manifest.recipe.expert_coverage.floor_tokens
    return Measured(
        perplexity_ratio=evaluation.perplexity_ratio.value,
        mean_kl=evaluation.kl.mean.value,
        top1=evaluation.top1.value,
        fallbacks=sum(fallback.count for fallback in manifest.fallbacks),
        starved_experts=starved_share(manifest.coverage, floor),
        input_outliers=static_input_outliers(engine),
    )
