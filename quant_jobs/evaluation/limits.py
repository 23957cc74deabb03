"""Compares measured figures with the limits of a recipe: pure functions of numbers, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deepseek.artifact.manifest import Manifest
from deepseek.recipe import GateLimits
from quant_jobs.evaluation.record import Evaluation

#: Fewest judged tokens of a verdict. With fewer, at a KL near 0.01 nats, the standard error of the
#: mean is as large as the difference between a good and a bad recipe.
MIN_TOKENS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The figures that have limits. `mean_kl` is in nats per token, `top1` is a share of the judged
    tokens, `starved_experts` a share of all routed experts; `fallbacks` is the sum of the counts in
    the manifest's ledger."""

    perplexity_ratio: float
    mean_kl: float
    top1: float
    fallbacks: int
    starved_experts: float


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
    return broken


def starved_share(coverage: Mapping[int, Sequence[int]], floor_tokens: int) -> float:
    """Share of routed experts that fewer than `floor_tokens` calibration tokens reached; 0 where
    the manifest has no coverage (no calibration, or no MoE layer)."""
    counts = [tokens for experts in coverage.values() for tokens in experts]
    return sum(tokens < floor_tokens for tokens in counts) / len(counts) if counts else 0.0


def measure(evaluation: Evaluation, manifest: Manifest) -> Measured:
    """Collect the figures that have limits from the two documents."""
    floor = manifest.recipe.expert_coverage.floor_tokens
    return Measured(
        perplexity_ratio=evaluation.perplexity_ratio.value,
        mean_kl=evaluation.kl.mean.value,
        top1=evaluation.top1.value,
        fallbacks=sum(fallback.count for fallback in manifest.fallbacks),
        starved_experts=starved_share(manifest.coverage, floor),
    )
