"""All pools serve one model; each engine is admitted at the KV format of its pool."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.configs import make_config
from support.engines import make_engine
from typer.testing import CliRunner

from deepseek.artifact.engine_manifest import read_engine_manifest
from deepseek.artifact.verdict import GateLimits, GateVerdict, write_verdict
from deepseek.errors import ArtifactError
from serve_app.__main__ import app
from serve_app.config import EchoOptions, ServeConfig
from serve_app.gating import Admitted
from serve_app.one_model import admit_pools, check_kind, check_same

ADMITTED = Admitted(
    engine_digest="e",
    arithmetic="embedded",
    kv_cache="bf16",
    gated=True,
    documents={"tokenizer.json": b"{}", "config.json": b"1"},
    source_fingerprint="f",
)


def pass_gate(directory: Path, kv_cache: str) -> None:
    """Write the verdict of a gate that judged the engine on these KV pages."""
    manifest = read_engine_manifest(directory)
    verdict = GateVerdict(
        passed=True,
        artifact_digest=manifest.artifact_digest,
        engine_digest=manifest.digest,
        target="embedded",
        arithmetic="embedded",
        executed_by="embedded",
        kv_cache=kv_cache,  # type: ignore[arg-type]
        measured={"perplexity": 3.0},
        limits=GateLimits(max_perplexity_ratio=1.1, max_mean_kl=0.1, min_top1=0.9),
        reasons=(),
    )
    write_verdict(directory, verdict)


@pytest.mark.parametrize(
    ("kind", "target", "says"),
    [
        ("embedded", "trtllm", "write kind: trtllm, or build with --target embedded"),
        ("vllm", "trtllm", "write kind: trtllm, or build with --target vllm"),
        ("trtllm", "sglang", "build with --target trtllm"),
    ],
)
def test_a_directory_of_another_target_than_the_pools_kind_is_refused(
    kind: str, target: str, says: str
) -> None:
    engine = {"kind": kind, "directory": "/d"} | ({} if kind == "embedded" else {"python": "/p"})
    pool = ServeConfig.model_validate({"pools": {"a": {"engine": engine}}}).pool
    with pytest.raises(ArtifactError) as caught:
        check_kind("a", pool, replace(ADMITTED, arithmetic=target))
    assert str(caught.value) == (
        f"pools.a.engine: /d was built for {target}, and the kind is {kind}; {says}"
    )
    check_kind("a", pool, replace(ADMITTED, arithmetic=kind))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"source_fingerprint": "g"},
            "pools a and b serve different models: their engines were built from other source "
            "checkpoints; build both from the same",
        ),
        (
            {"documents": {"tokenizer.json": b"[]"}},
            "pools a and b serve different models: tokenizer.json of their engines is not the "
            "same; build both from the same checkpoint",
        ),
        (
            {"documents": {**ADMITTED.documents, "chat_template.jinja": b"x"}},
            "pools a and b serve different models: chat_template.jinja of their engines is not the "
            "same; build both from the same checkpoint",
        ),
    ],
)
def test_pools_of_different_models_are_refused_in_one_sentence(
    change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ArtifactError) as refused:
        check_same({"a": ADMITTED, "b": replace(ADMITTED, **change)})
    assert str(refused.value) == sentence


def test_engines_of_one_model_may_be_quantized_in_different_ways() -> None:
    other = replace(ADMITTED, engine_digest="d", kv_cache="int8")
    check_same({"a": ADMITTED, "b": replace(other, documents=ADMITTED.documents)})
    check_same({"a": ADMITTED})
    check_same({})
    assert admit_pools(make_config(echo=EchoOptions())) == {}


@pytest.mark.heavy
def test_the_example_is_valid_and_each_pool_is_admitted_at_its_own_kv_format(
    root: Path, tiny_model: Path, tmp_path: Path
) -> None:
    given = yaml.safe_load((root / "examples" / "serve" / "pools.yaml").read_text("utf-8"))
    for pool, recipe in (("standard", "int4"), ("long", "int8")):
        directory = make_engine(tiny_model, recipe, tmp_path / pool)
        given["pools"][pool]["engine"]["directory"] = str(directory)
        pass_gate(directory, "bf16")
    path = tmp_path / "pools.yaml"
    path.write_text(yaml.safe_dump(given))
    config = ServeConfig.model_validate(given)
    with pytest.raises(ArtifactError, match="judges bf16 KV pages, but int8 ones would be served"):
        admit_pools(config)
    long = config.pools["long"].directory
    assert long is not None
    pass_gate(long, "int8")
    found = admit_pools(config)
    assert {name: one.kv_cache for name, one in found.items()} == {
        "standard": "bf16",
        "long": "int8",
    }
    checked = CliRunner().invoke(app, ["--check", "--config", str(path)], catch_exceptions=False)
    assert checked.output == f"{path}: valid, serves deepseek-v3-int4\n"
