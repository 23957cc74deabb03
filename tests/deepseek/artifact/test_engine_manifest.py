"""engine.json: one form for every target, and format 1 refused in one sentence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.format_1 import write_format_1_engine
from support.synthetic import config_dict

from deepseek.artifact.built_engine import read_engine
from deepseek.artifact.engine_manifest import (
    ENGINE_FILE,
    UNQUANTIZED,
    EngineManifest,
    EnginePlan,
    RankLayout,
    TensorFile,
    read_documents,
    read_engine_manifest,
    write_engine_manifest,
)
from deepseek.errors import ArtifactError
from deepseek.recipe import Scheme


def trtllm_manifest(**changes: Any) -> EngineManifest:
    """A Hugging Face directory for TensorRT-LLM at TP-8 x EP-8."""
    shards = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    fields: dict[str, Any] = {
        "target": "trtllm",
        "ranks": RankLayout(tp=8, ep=8),
        "recipe": UNQUANTIZED,
        "artifact_digest": "a" * 64,
        "source_fingerprint": "a" * 64,
        "kv_cache": "fp8",
        "schemes": {"model.layers.0.mlp.down_proj": Scheme(weights="int4", group_size=128)},
        "versions": {"intserve": "0.1.0", "tensorrt_llm": "1.2.1"},
        "plan": EnginePlan(rank_weight_bytes=(48_000_000_000,) * 8),
        "files": {},
        "tensor_files": {name: TensorFile(num_bytes=1000, sha256="b" * 64) for name in shards},
        "target_fields": {"dialect": "mixed-precision", "llm_args": {"max_seq_len": 4096}},
    }
    return EngineManifest(**fields | changes)


def test_an_engine_of_another_target_is_read_without_knowing_its_own_fields(tmp_path: Path) -> None:
    config = json.dumps(config_dict()).encode()
    (tmp_path / "config.json").write_bytes(config)
    manifest = trtllm_manifest(files={"config.json": hashlib.sha256(config).hexdigest()})
    for name in manifest.tensor_files:
        (tmp_path / name).write_bytes(bytes(1000))
    write_engine_manifest(tmp_path, manifest)
    assert read_engine_manifest(tmp_path) == manifest
    assert read_documents(tmp_path, manifest) == {"config.json": config}
    engine = read_engine(tmp_path)
    assert (engine.digest, engine.num_bytes, engine.manifest) == (manifest.digest, 3000, None)


def test_the_digest_covers_the_fields_of_the_target() -> None:
    manifest, other = trtllm_manifest(), trtllm_manifest(target_fields={"dialect": "fp8-block"})
    assert manifest.digest != other.digest


def test_a_changed_field_of_the_target_is_noticed(tmp_path: Path) -> None:
    write_engine_manifest(tmp_path, trtllm_manifest())
    path = tmp_path / ENGINE_FILE
    path.write_text(path.read_text().replace("4096", "8192"))
    with pytest.raises(ArtifactError, match="changed after it was written"):
        read_engine_manifest(tmp_path)


def test_a_layout_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValidationError, match="ep 3 must divide tp 8"):
        RankLayout(tp=8, ep=3)
    with pytest.raises(ValidationError, match="the plan has 1 ranks, the layout 8"):
        trtllm_manifest(plan=EnginePlan(rank_weight_bytes=(1,)))


def test_the_file_holds_no_times_and_no_paths(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_engine_manifest(tmp_path / folder, trtllm_manifest())
    text = (tmp_path / "a" / ENGINE_FILE).read_text()
    assert text == (tmp_path / "b" / ENGINE_FILE).read_text()
    assert str(tmp_path) not in text


def test_a_format_1_engine_is_refused_in_one_sentence(tmp_path: Path) -> None:
    write_format_1_engine(tmp_path)
    assert json.loads((tmp_path / ENGINE_FILE).read_text())["format_version"] == 1
    with pytest.raises(ArtifactError, match="format_version 1 is not supported") as refused:
        read_engine_manifest(tmp_path)
    assert "build again" in str(refused.value)
    assert "\n" not in str(refused.value)
