"""An engine is served only with a passing verdict of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek.artifact.verdict import GateVerdict, read_verdict, require_passed, write_verdict
from deepseek.errors import ArtifactError
from deepseek.recipe import GateLimits

LIMITS = GateLimits(max_perplexity_ratio=1.1, max_mean_kl=0.1, min_top1=0.9)


def verdict(*, passed: bool = True, reasons: tuple[str, ...] = ()) -> GateVerdict:
    return GateVerdict(
        passed=passed,
        artifact_digest="a" * 64,
        engine_digest="e" * 64,
        measured={"perplexity": 12.5, "mean_kl": 0.02, "top1": 0.97},
        limits=LIMITS,
        reasons=reasons,
    )


def require(directory: Path, *, engine: str = "e", artifact: str = "a") -> GateVerdict:
    return require_passed(directory, engine_digest=engine * 64, artifact_digest=artifact * 64)


def test_a_passing_verdict_about_this_engine_and_artifact_opens_the_door(tmp_path: Path) -> None:
    write_verdict(tmp_path, verdict())
    assert require(tmp_path) == verdict()
    assert read_verdict(tmp_path).measured["top1"] == 0.97


def test_an_engine_that_was_never_gated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="it was never gated"):
        require(tmp_path)


def test_a_failed_verdict_is_refused_with_its_reasons(tmp_path: Path) -> None:
    write_verdict(tmp_path, verdict(passed=False, reasons=("top1 0.7 is below 0.9",)))
    with pytest.raises(ArtifactError, match=r"failed its accuracy gate: top1 0\.7 is below 0\.9"):
        require(tmp_path)


@pytest.mark.parametrize(
    ("engine", "artifact", "what"), [("x", "a", "engine"), ("e", "x", "artif")]
)
def test_a_verdict_about_something_else_is_refused(
    tmp_path: Path, engine: str, artifact: str, what: str
) -> None:
    write_verdict(tmp_path, verdict())
    with pytest.raises(ArtifactError, match=f"judges the {what}"):
        require(tmp_path, engine=engine, artifact=artifact)


def test_a_failed_verdict_about_something_else_does_not_say_failed(tmp_path: Path) -> None:
    write_verdict(tmp_path, verdict(passed=False))
    with pytest.raises(ArtifactError, match="judges the engine"):
        require(tmp_path, engine="x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passed": "maybe"}, "passed: "),
        ({"mood": "good"}, "mood: Extra inputs"),
        ({"engine_digest": None}, "engine_digest: "),
        ({"limits": {}}, "limits.max_perplexity_ratio: "),
    ],
)
def test_a_verdict_that_cannot_be_understood_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    write_verdict(tmp_path, verdict())
    raw = json.loads((tmp_path / "gate.json").read_text())
    (tmp_path / "gate.json").write_text(json.dumps(raw | change))
    with pytest.raises(ArtifactError) as caught:
        require(tmp_path)
    assert message in str(caught.value)
    (tmp_path / "gate.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not valid JSON"):
        require(tmp_path)
