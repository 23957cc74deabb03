"""Step 7, gate: compares an evaluation with the limits of the recipe; may this engine be served?

`evaluation/limits.py` compares. Before that, the evaluation must be of this very engine, the
manifest must be the one that the engine was built from, and the text must be long enough. Then
`gate.json` is written beside the engine, where `serve_app` requires it. No verdict is written for
an evaluation that cannot be judged. This file imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.artifact.built_engine import read_engine
from deepseek.artifact.signature import read_private_key
from deepseek.artifact.verdict import GateVerdict, write_verdict
from deepseek.errors import ArtifactError
from quant_jobs.evaluation.limits import MIN_TOKENS, judge, measure
from quant_jobs.evaluation.record import Evaluation, read_evaluation


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict and the evaluation behind it."""

    verdict: GateVerdict
    evaluation: Evaluation

    def summary(self) -> dict[str, Any]:
        """What `gate --json` prints: the verdict and the figures of the demo's table."""
        result, speed = self.evaluation, self.evaluation.speed
        return {
            "verdict": "pass" if self.verdict.passed else "fail",
            "reasons": list(self.verdict.reasons),
            "recipe": result.recipe,
            "target": self.verdict.target,
            "arithmetic": self.verdict.arithmetic,
            "executed_by": self.verdict.executed_by,
            "kv_cache": self.verdict.kv_cache,
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
        """`PASS recipe` or `FAIL recipe` with what was judged, and one line per reason."""
        word = "PASS" if self.verdict.passed else "FAIL"
        judged = f"{self.evaluation.how}, KV {self.verdict.kv_cache}"
        reasons = (f"  {text}" for text in self.verdict.reasons)
        return [f"{word} {self.evaluation.recipe} ({judged})", *reasons]


def run_gate(engine_dir: Path, evaluation_dir: Path, *, sign_key: Path | None = None) -> Outcome:
    """Judge an evaluation and write ENGINE/gate.json atomically. With `sign_key`, the PEM file of
    an Ed25519 private key, the verdict is signed, pass or fail: ENGINE/gate.json.sig.

    Raises:
        ArtifactError: the evaluation is of another engine or artifact, judged fewer than
            MIN_TOKENS tokens, or the engine is of an unquantized source; or the key cannot be used.
        OutputError: gate.json cannot be written into the engine's directory.
    """
    key = None if sign_key is None else read_private_key(sign_key)
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
    if evaluation.target != engine.target:
        raise ArtifactError(
            f"{evaluation_dir} is an evaluation of an engine for {evaluation.target}, but "
            f"{engine_dir} is one for {engine.target}; evaluate this engine"
        )
    limits = engine.manifest.recipe.gate
    measured = measure(evaluation, engine)
    reasons = tuple(judge(measured, limits).values())
    verdict = GateVerdict(
        passed=not reasons,
        artifact_digest=engine.manifest.digest,
        engine_digest=engine.digest,
        target=evaluation.target,
        arithmetic=evaluation.arithmetic,
        executed_by=evaluation.executed_by,
        kv_cache=evaluation.kv_cache,
        measured=measured.figures()
        | {
            "perplexity": evaluation.perplexity,
            "source_perplexity": evaluation.source_perplexity,
            "judged_tokens": evaluation.data.judged_tokens,
        },
        limits=limits,
        reasons=reasons,
    )
    write_verdict(engine_dir, verdict, key)
    return Outcome(verdict, evaluation)
