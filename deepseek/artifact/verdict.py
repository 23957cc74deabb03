"""The gate's verdict, and the rule that the server enforces: no passing verdict, no serving.

`quant_jobs` writes gate.json into the engine directory that it measured; `serve_app` requires it.
A verdict names the digests of the artifact and of the engine, so it cannot be moved to another one.
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
    """What was measured on one engine, against which limits, and what follows.

    `artifact_digest` is the manifest's (or, for an unquantized engine, the source's fingerprint).
    `measured` holds plain figures by name: perplexity, source_perplexity, mean_kl, top1, ...
    `reasons` says, one sentence each, why a failed verdict failed.
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
    """The verdict of an engine directory.

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
    """The verdict, when it passed and is about exactly this engine and this artifact.

    Raises:
        ArtifactError: no verdict, a failed one, or one about another engine or artifact.
    """
    verdict = read_verdict(engine_dir)
    for what, judged, present in (
        ("engine", verdict.engine_digest, engine_digest),
        ("artifact", verdict.artifact_digest, artifact_digest),
    ):
        if judged != present:
            raise ArtifactError(
                f"{engine_dir}: {VERDICT_FILE} judges the {what} {judged[:16]}, but this one is "
                f"{present[:16]}; run evaluate and gate again"
            )
    if not verdict.passed:
        why = "; ".join(verdict.reasons) or "no reason was recorded"
        raise ArtifactError(f"{engine_dir} failed its accuracy gate: {why}")
    return verdict
