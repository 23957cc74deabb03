"""Building the embedded engine: the same bytes every time, whole or absent."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.disks import NotPermitted, limited_files, mounted
from support.engines import make_artifact, make_engine, request, run
from support.quantizing import flip_byte

from deepseek.artifact.engine_manifest import read_engine_manifest
from deepseek.artifact.reader import ArtifactReader
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.packed_layout import planned_bytes
from deepseek.errors import ArtifactError, DeployError, OutputError
from quant_jobs.targets.embedded import pack_engine


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_building_twice_gives_the_same_bytes(tiny_model: Path, base: Path, tmp_path: Path) -> None:
    artifact = make_artifact(tiny_model, "int4-asym", base)
    first = make_engine(tiny_model, "int4-asym", base)
    pack_engine(ArtifactReader(artifact), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(first)
    assert {path.name for path in tmp_path.iterdir()} == {"again"}  # no temporary left behind


def test_building_into_the_same_engine_verifies_and_keeps_it(
    tiny_model: Path, base: Path, int4_engine: Path
) -> None:
    artifact = make_artifact(tiny_model, "int4", base)
    (int4_engine / "gate.json").write_text("{}")
    before = contents(int4_engine)
    manifest = pack_engine(ArtifactReader(artifact), int4_engine)
    assert manifest == read_engine_manifest(int4_engine)
    assert contents(int4_engine) == before


@pytest.mark.parametrize("lost", ["rank-0.safetensors", "config.json", "both"])
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_an_engine_that_lost_files_gets_them_back_and_keeps_its_verdict(
    tiny_model: Path, base: Path, int4_engine: Path, lost: str, how: str
) -> None:
    artifact = ArtifactReader(make_artifact(tiny_model, "int4", base))
    (int4_engine / "gate.json").write_text("{}")
    before = contents(int4_engine)
    for name in ("rank-0.safetensors", "config.json") if lost == "both" else (lost,):
        if how == "missing":
            (int4_engine / name).unlink()
        else:
            flip_byte(int4_engine / name)
    pack_engine(artifact, int4_engine)
    assert contents(int4_engine) == before
    assert not list(int4_engine.parent.glob(".*.tmp"))


def test_a_damaged_engine_manifest_says_what_to_delete(
    tiny_model: Path, base: Path, int4_engine: Path
) -> None:
    flip_byte(int4_engine / "engine.json", -500)
    artifact = ArtifactReader(make_artifact(tiny_model, "int4", base))
    with pytest.raises(ArtifactError, match=f"engine.json .*; delete {int4_engine} first"):
        pack_engine(artifact, int4_engine)


@pytest.mark.parametrize("limit_bytes", [10, 5_000, 1_000_000])
def test_a_refused_engine_leaves_nothing_and_is_built_by_the_next_run(
    tiny_model: Path, base: Path, tmp_path: Path, limit_bytes: int
) -> None:
    """The largest file is refused first, whatever the limit."""
    artifact = make_artifact(tiny_model, "int4-asym", base)
    output = tmp_path / "engine"
    with (
        limited_files(limit_bytes),
        pytest.raises(OutputError, match=r"rank-0\.safetensors cannot be written: .* same comm"),
    ):
        pack_engine(ArtifactReader(artifact), output)
    assert not list(tmp_path.iterdir())
    pack_engine(ArtifactReader(artifact), output)
    assert contents(output) == contents(make_engine(tiny_model, "int4-asym", base))


def test_an_engine_that_does_not_fit_is_refused_before_it_is_packed(
    tiny_model: Path, base: Path, tmp_path: Path
) -> None:
    artifact = ArtifactReader(make_artifact(tiny_model, "int4-asym", base))
    layers = []
    try:
        with mounted(tmp_path / "disk", "size=100k") as disk:
            with pytest.raises(OutputError, match=r"engine needs .* MB more .* only 10\d\.\d kB"):
                pack_engine(artifact, disk / "engine", progress=lambda *done: layers.append(done))
            assert not list(disk.iterdir())
    except NotPermitted as error:
        pytest.skip(str(error))
    assert not layers


def test_an_engine_inside_its_checkpoint_is_refused(tiny_model: Path, base: Path) -> None:
    artifact = ArtifactReader(make_artifact(tiny_model, "int4-asym", base))
    with pytest.raises(OutputError, match="engine is inside the checkpoint; choose another"):
        pack_engine(artifact, artifact.directory / "engine")


def test_building_over_another_engine_or_other_files_is_refused(
    tiny_model: Path, base: Path, int4_engine: Path, tmp_path: Path
) -> None:
    other = ArtifactReader(make_artifact(tiny_model, "int8", base))
    with pytest.raises(ArtifactError, match="holds an engine whose recipe differs"):
        pack_engine(other, int4_engine)
    same = ArtifactReader(make_artifact(tiny_model, "int4", base))
    with pytest.raises(ArtifactError, match="kv_cache differs"):
        pack_engine(same, int4_engine, kv_cache="int8")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="something else"):
        pack_engine(other, tmp_path / "notes")
    with pytest.raises(OutputError, match="is a file"):
        pack_engine(other, tmp_path / "notes" / "a.txt")


def test_a_damaged_artifact_leaves_no_engine_behind(
    tiny_model: Path, base: Path, tmp_path: Path
) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(make_artifact(tiny_model, "int8", base), artifact)
    shard = artifact / "model-layer-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-7] ^= 4
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match="is damaged"):
        pack_engine(ArtifactReader(artifact), tmp_path / "out" / "engine")
    assert not (tmp_path / "out").exists()


def test_what_the_engine_cannot_compute_is_refused_when_it_is_built(
    tiny_model: Path, base: Path, tmp_path: Path
) -> None:
    artifact = make_artifact(tiny_model, "int8", base)
    with pytest.raises(DeployError, match="no fp4 KV cache; use bf16, fp8 or int8"):
        pack_engine(ArtifactReader(artifact), tmp_path / "a", kv_cache="fp4")
    with pytest.raises(DeployError, match="--tp 2"):
        pack_engine(ArtifactReader(artifact), tmp_path / "b", tp=2)
    with pytest.raises(DeployError, match="page_tokens"):
        pack_engine(ArtifactReader(artifact), tmp_path / "c", page_tokens=24)
    assert not list(tmp_path.iterdir())


def test_an_engine_for_an_fp8_kv_cache_holds_what_is_planned(
    tiny_model: Path, base: Path, tmp_path: Path
) -> None:
    artifact = ArtifactReader(make_artifact(tiny_model, "int8", base))
    manifest = pack_engine(artifact, tmp_path / "engine", kv_cache="fp8")
    assert manifest.kv_cache == "fp8"
    engine = LLMEngine.load(
        tmp_path / "engine", EngineOptions(max_kv_tokens=512, max_model_len=64, page_tokens=16)
    )
    assert (engine.identity.kv_cache, engine.identity.arithmetic) == ("fp8", "embedded")
    planned = planned_bytes(
        artifact.config, artifact.schemes, kv_cache="fp8", num_pages=32, page_tokens=16
    )
    assert engine.allocated_bytes() == planned
    latent, rope = artifact.config.kv_lora_rank, artifact.config.qk_rope_head_dim
    assert planned["kv_cache"] == 33 * 16 * 4 * (latent + 4 * (latent // 128) + 2 * rope)
    [output] = run(engine, [request("a", [1, 2, 3], max_tokens=4)])["a"][-1:]
    assert output.finish_reason == "length"
