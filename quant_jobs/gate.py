"""Step 7, gate: may this engine be served? The recipe's limits against what was measured.

`judge` is a pure function of numbers. Around it: the evaluation must be of this very engine, the
manifest must be the one that the engine was built from, and the text must have been long enough.
Only then is `gate.json` written beside the engine, where `serve_app` looks for it. An evaluation
that cannot be judged writes nothing, so that no verdict is ever about something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek.artifact.manifest import Manifest
from deepseek.artifact.verdict import GateVerdict, write_verdict
from deepseek.errors import ArtifactError
from deepseek.recipe import GateLimits
from quant_jobs.build import read_engine
from quant_jobs.evaluation.record import Evaluation, read_evaluation

#: Fewer judged tokens say nothing: at a KL near 0.01 nats the standard error of the mean would be
#: as large as the difference between a good and a bad recipe.
MIN_TOKENS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The numbers that the limits speak about. `starved_experts` is a share of all routed
    experts; `fallbacks` counts every entry of the manifest's ledger."""

    perplexity_ratio: float
    mean_kl: float
    top1: float
    fallbacks: int
    starved_experts: float


def judge(measured: Measured, limits: GateLimits) -> dict[str, str]:
    """Broken limits: field of `Measured` -> reason, one sentence; empty means pass. Limits are
    inclusive.

    Written as `not (value <= limit)`, so that a NaN fails.
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
    """Share of routed experts that saw fewer than `floor_tokens` calibration tokens; 0 where the
    manifest has no coverage (no calibration, or no MoE layer)."""
    counts = [tokens for experts in coverage.values() for tokens in experts]
    return sum(tokens < floor_tokens for tokens in counts) / len(counts) if counts else 0.0


def measure(evaluation: Evaluation, manifest: Manifest) -> Measured:
    """Collect the judged numbers from the two documents."""
    floor = manifest.recipe.expert_coverage.floor_tokens
    return Measured(
        perplexity_ratio=evaluation.perplexity_ratio.value,
        mean_kl=evaluation.kl.mean.value,
        top1=evaluation.top1.value,
        fallbacks=sum(fallback.count for fallback in manifest.fallbacks),
        starved_experts=starved_share(manifest.coverage, floor),
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict and the evaluation behind it."""

    verdict: GateVerdict
    evaluation: Evaluation

    def summary(self) -> dict[str, Any]:
        """What `gate --json` prints: the verdict, and one row of the demo's table."""
        result, speed = self.evaluation, self.evaluation.speed
        return {
            "verdict": "pass" if self.verdict.passed else "fail",
            "reasons": list(self.verdict.reasons),
            "recipe": result.recipe,
            "engine_digest": result.engine_digest,
            "artifact_digest": result.artifact_digest,
            "bytes": result.artifact_bytes,
            "bf16_bytes": result.bf16_bytes,
            "perplexity": result.perplexity,
            "source_perplexity": result.source_perplexity,
            "perplexity_ratio": result.perplexity_ratio.value,
            "kl": result.kl.mean.value,
            "top1": result.top1.value,
            "decode_tokens_per_s": speed[0].tokens_per_s if speed else None,
            "bf16_decode_tokens_per_s": speed[0].source_tokens_per_s if speed else None,
        }

    def describe(self) -> list[str]:
        """`PASS recipe`, or `FAIL recipe` and one line per reason."""
        if self.verdict.passed:
            return [f"PASS {self.evaluation.recipe}"]
        return [f"FAIL {self.evaluation.recipe}", *(f"  {text}" for text in self.verdict.reasons)]


def run_gate(engine_dir: Path, evaluation_dir: Path) -> Outcome:
    """Judge, and write ENGINE/gate.json atomically.

    Raises:
        ArtifactError: the evaluation is of another engine or artifact, judged fewer than
            MIN_TOKENS tokens, or the engine is of an unquantized source.
    """
    engine = read_engine(engine_dir)
    evaluation = read_evaluation(evaluation_dir)
    if evaluation.engine_digest != engine.digest:
        raise ArtifactError(
            f"{evaluation_dir} is an evaluation of engine {evaluation.engine_digest[:16]}, not of "
            f"{engine_dir} ({engine.digest[:16]}); evaluate this engine"
        )
    if engine.manifest is None:
        raise ArtifactError(
            f"{engine_dir} was built from an unquantized source: there is no recipe whose limits "
            "it could be judged by; serve it with --allow-ungated"
        )
    assert evaluation.artifact_digest == engine.manifest.digest, "the engine's digest covers this"
    if evaluation.data.judged_tokens < MIN_TOKENS:
        raise ArtifactError(
            f"{evaluation_dir} judged {evaluation.data.judged_tokens} tokens, a verdict needs "
            f"{MIN_TOKENS}; evaluate with more --num-blocks or --block-tokens"
        )
    limits = engine.manifest.recipe.gate
    measured = measure(evaluation, engine.manifest)
    reasons = tuple(judge(measured, limits).values())
    verdict = GateVerdict(
        passed=not reasons,
        artifact_digest=engine.manifest.digest,
        engine_digest=engine.digest,
        measured=asdict(measured)
        | {
            "perplexity": evaluation.perplexity,
            "source_perplexity": evaluation.source_perplexity,
            "judged_tokens": evaluation.data.judged_tokens,
        },
        limits=limits,
        reasons=reasons,
    )
    write_verdict(engine_dir, verdict)
    return Outcome(verdict, evaluation)
