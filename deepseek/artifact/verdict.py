"""The gate's verdict on an engine. The server serves an engine only with a passing verdict.

`gate` writes gate.json into the engine directory that was evaluated; `serve_app` requires it. A
verdict names the digests of the artifact and of the engine, so it is refused beside another engine.
This file imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from deepseek.errors import ArtifactError, first_problem
from deepseek.files import write_json
from deepseek.recipe import GateLimits

VERDICT_FILE = "gate.json"


class GateVerdict(BaseModel):
    """What was measured on one engine, the limits, and the decision.

    `artifact_digest` is the quantized checkpoint's (or, for an unquantized engine, the source's
    fingerprint). `measured` maps names to figures: perplexity, mean_kl, top1, and others.
    `reasons` holds one sentence for each broken limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    passed: bool
    artifact_digest: str
    engine_digest: str
    measured: dict[str, float]
    limits: GateLimits
    reasons: tuple[str, ...]


def write_verdict(engine_dir: Path | str, verdict: GateVerdict) -> None:
    """Write gate.json into the engine directory, atomically."""
    write_json(Path(engine_dir) / VERDICT_FILE, verdict.model_dump(mode="json"))


def read_verdict(engine_dir: Path | str) -> GateVerdict:
    """Read the verdict of an engine directory.

    Raises:
        ArtifactError: there is none, or it cannot be understood.
    """
    path = Path(engine_dir) / VERDICT_FILE
    try:
        return GateVerdict.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{engine_dir} has no {VERDICT_FILE}: it was never gated; run `python -m quant_jobs "
            "evaluate` and `gate` first"
        ) from error
    except ValidationError as error:
        raise ArtifactError(f"{path}: {first_problem(error)}; run the gate again") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); run the gate again") from error


def require_passed(
    engine_dir: Path | str, *, engine_digest: str, artifact_digest: str
) -> GateVerdict:
    """Read the verdict and check that it passed and is about exactly this engine and artifact.

    Raises:
        ArtifactError: no verdict, a failed one, or one about another engine or artifact.
    """
    verdict = read_verdict(engine_dir)
    for subject, judged, present in (
        ("engine", verdict.engine_digest, engine_digest),
        ("artifact", verdict.artifact_digest, artifact_digest),
    ):
        if judged != present:
            raise ArtifactError(
                f"{engine_dir}: {VERDICT_FILE} judges the {subject} {judged[:16]}, but this one is "
                f"{present[:16]}; run evaluate and gate again"
            )
    if not verdict.passed:
        reasons = "; ".join(verdict.reasons) or "no reason was recorded"
        raise ArtifactError(f"{engine_dir} failed its accuracy gate: {reasons}")
    return verdict
