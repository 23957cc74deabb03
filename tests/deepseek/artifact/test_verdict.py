"""An engine is served only with a passing verdict of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek.artifact.engine_manifest import EngineManifest, write_engine_manifest
from deepseek.artifact.verdict import GateVerdict, read_verdict, require_passed, write_verdict
from deepseek.errors import ArtifactError
from deepseek.recipe import GateLimits

LIMITS = GateLimits(max_perplexity_ratio=1.1, max_mean_kl=0.1, min_top1=0.9)


def verdict(*, passed: bool = True, reasons: tuple[str, ...] = ()) -> GateVerdict:
    return GateVerdict(
        passed=passed,
        artifact_digest="a" * 64,
        engine_digest="e" * 64,
        target="embedded",
        arithmetic="embedded",
        executed_by="embedded",
        kv_cache="bf16",
        measured={"perplexity": 12.5, "mean_kl": 0.02, "top1": 0.97},
        limits=LIMITS,
        reasons=reasons,
    )


def require(
    directory: Path,
    *,
    engine: str = "e",
    artifact: str = "a",
    target: str = "embedded",
    arithmetic: str = "embedded",
    kv_cache: str = "bf16",
) -> GateVerdict:
    return require_passed(
        directory,
        engine_digest=engine * 64,
        artifact_digest=artifact * 64,
        target=target,
        arithmetic=arithmetic,
        kv_cache=kv_cache,
    )


def test_a_passing_verdict_about_this_engine_and_artifact_opens_the_door(tmp_path: Path) -> None:
    write_verdict(tmp_path, verdict())
    assert require(tmp_path) == verdict()
    assert read_verdict(tmp_path).measured["top1"] == 0.97


def manifest(kv_cache: str = "bf16", target: str = "embedded") -> EngineManifest:
    return EngineManifest.model_validate(
        {
            "target": target,
            "ranks": {"tp": 1, "ep": 1},
            "recipe": "int8",
            "artifact_digest": "a" * 64,
            "source_fingerprint": "f" * 64,
            "kv_cache": kv_cache,
            "schemes": {},
            "versions": {},
            "plan": {"rank_weight_bytes": [1]},
            "files": {},
            "tensor_files": {},
            "target_fields": {},
        }
    )


@pytest.mark.parametrize("form", [1, 2])
def test_a_verdict_of_an_older_form_judged_the_engine_as_it_was_built(
    tmp_path: Path, form: int
) -> None:
    """Only the embedded engine was evaluated then, and with no KV format but its own."""
    engine = manifest("int8")
    write_engine_manifest(tmp_path, engine)
    write_verdict(tmp_path, verdict().model_copy(update={"engine_digest": engine.digest}))
    raw = json.loads((tmp_path / "gate.json").read_text())
    later = ("target", "arithmetic", "executed_by", "kv_cache", "format_version")
    old = {k: v for k, v in raw.items() if k not in later}
    old |= {} if form == 1 else {"format_version": 2}
    del old["limits"]["max_input_outliers"]  # came with form 4
    (tmp_path / "gate.json").write_text(json.dumps(old))
    served = {"engine_digest": engine.digest, "artifact_digest": "a" * 64}
    served |= {"target": "embedded", "arithmetic": "embedded"}
    judged = require_passed(tmp_path, **served, kv_cache="int8")
    assert (judged.target, judged.arithmetic, judged.executed_by) == ("embedded",) * 3
    assert (judged.kv_cache, judged.format_version) == ("int8", 5)
    with pytest.raises(ArtifactError, match="judges int8 KV pages, but bf16 ones"):
        require_passed(tmp_path, **served, kv_cache="bf16")
    with pytest.raises(ArtifactError, match="judges an engine for embedded, but this one is for t"):
        require_passed(tmp_path, **served | {"target": "trtllm"}, kv_cache="int8")
    (tmp_path / "engine.json").unlink()
    with pytest.raises(ArtifactError, match="is not an engine"):
        read_verdict(tmp_path)


def test_a_verdict_of_form_3_is_read_and_cannot_claim_a_later_limit(tmp_path: Path) -> None:
    """No artifact that was judged then kept maxima, so there was no outlier to count."""
    write_verdict(tmp_path, verdict())
    raw = json.loads((tmp_path / "gate.json").read_text()) | {"format_version": 3}
    del raw["target"], raw["executed_by"]  # came with form 5
    (tmp_path / "gate.json").write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="max_input_outliers is no field of its format_ver"):
        require(tmp_path)
    del raw["limits"]["max_input_outliers"]
    (tmp_path / "gate.json").write_text(json.dumps(raw))
    assert require(tmp_path).limits.max_input_outliers == 8


def test_a_verdict_of_form_4_judged_the_embedded_engine_and_cannot_claim_another(
    tmp_path: Path,
) -> None:
    write_verdict(tmp_path, verdict())
    raw = json.loads((tmp_path / "gate.json").read_text()) | {"format_version": 4}
    for field in ("executed_by", "target"):
        (tmp_path / "gate.json").write_text(json.dumps(raw))
        with pytest.raises(ArtifactError, match=f"{field} is no field of its format_version"):
            require(tmp_path)
        del raw[field]
    (tmp_path / "gate.json").write_text(json.dumps(raw))
    assert require(tmp_path) == verdict()
    with pytest.raises(ArtifactError, match="judges an engine for embedded, but this one is for s"):
        require(tmp_path, target="sglang", arithmetic="sglang")


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


@pytest.mark.parametrize("passed", [True, False])
def test_a_verdict_on_other_kernels_or_kv_pages_is_refused_with_the_remedy(
    tmp_path: Path, passed: bool
) -> None:
    write_verdict(tmp_path, verdict(passed=passed))
    with pytest.raises(ArtifactError) as refused:
        require(tmp_path, kv_cache="int8")
    assert str(refused.value) == (
        f"{tmp_path}: gate.json judges bf16 KV pages, but int8 ones would be served; serve with "
        "kv_cache bf16, or evaluate with --kv-cache int8 and gate again"
    )
    with pytest.raises(ArtifactError) as refused:
        require(tmp_path, arithmetic="trtllm")
    assert str(refused.value) == (
        f"{tmp_path}: gate.json judges the arithmetic of embedded, but trtllm would serve; run "
        "evaluate and gate again"
    )
    with pytest.raises(ArtifactError) as refused:
        require(tmp_path, target="vllm", arithmetic="vllm")
    assert str(refused.value) == (
        f"{tmp_path}: gate.json judges an engine for embedded, but this one is for vllm; run "
        "evaluate and gate again"
    )


def test_a_verdict_by_emulation_admits_the_target_that_it_judges_and_says_so(
    tmp_path: Path,
) -> None:
    emulated = {"target": "trtllm", "arithmetic": "trtllm"}
    write_verdict(tmp_path, verdict().model_copy(update=emulated))
    assert require(tmp_path, **emulated).is_emulated
    assert not verdict().is_emulated
    with pytest.raises(ArtifactError, match="judges an engine for trtllm, but this one is for emb"):
        require(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passed": "maybe"}, "passed: "),
        ({"kv_cache": "int3"}, "kv_cache: "),
        ({"kv_cache": None}, "kv_cache: "),
        ({"arithmetic": "\x1b[31m"}, "arithmetic: "),
        ({"target": ""}, "target: "),
        ({"executed_by": None}, "executed_by: "),
        ({"format_version": 2}, "arithmetic is no field of its format_version"),
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
    write_engine_manifest(tmp_path, manifest())
    (tmp_path / "gate.json").write_text(json.dumps(raw | change))
    with pytest.raises(ArtifactError) as caught:
        require(tmp_path)
    assert message in str(caught.value)
    (tmp_path / "gate.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not valid JSON"):
        require(tmp_path)
