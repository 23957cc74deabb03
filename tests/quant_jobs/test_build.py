"""Build: the same bytes twice, one engine per folder, and targets refused with their reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.chain import Chain
from support.synthetic import quantize_plainly

from deepseek.artifact.built_engine import read_engine
from deepseek.errors import ArtifactError, DeployError
from deepseek.recipe import load_recipe
from quant_jobs.build import run_build
from quant_jobs.build_options import BuildOptions


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_building_twice_gives_the_same_bytes(chain: Chain, tmp_path: Path) -> None:
    first = run_build(chain.checkpoint, "embedded", tmp_path / "engine")
    before = contents(tmp_path / "engine")
    assert run_build(chain.checkpoint, "embedded", tmp_path / "engine") == first
    assert contents(tmp_path / "engine") == before == contents(chain.engine)


def test_an_engine_knows_its_artifact_and_its_source(chain: Chain) -> None:
    engine = read_engine(chain.engine)
    assert engine.manifest is not None
    assert engine.manifest.recipe.name == "int8-weight-only"
    assert engine.source_fingerprint == engine.manifest.source.fingerprint
    assert engine.config.weight_block_size == (128, 128)


def test_a_folder_of_another_engine_is_refused(chain: Chain, fresh: Chain) -> None:
    before = contents(fresh.engine)
    with pytest.raises(ArtifactError, match="choose another --output"):
        run_build(chain.source, "embedded", fresh.engine)
    assert contents(fresh.engine) == before


def test_a_manifest_swapped_under_an_engine_is_noticed(fresh: Chain, tmp_path: Path) -> None:
    quantize_plainly(fresh.source, load_recipe("int4"), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "intserve.json", fresh.engine / "intserve.json")
    with pytest.raises(ArtifactError, match=r"intserve\.json"):
        read_engine(fresh.engine)


def test_the_matrix_says_why_a_target_cannot_load_it(chain: Chain, tmp_path: Path) -> None:
    """INT8 outside the routed experts has not been tried with TensorRT-LLM's DeepSeek."""
    with pytest.raises(DeployError, match="for routed experts only.*Add to the recipe"):
        run_build(chain.checkpoint, "trtllm", tmp_path / "engine", BuildOptions(tp=8))
    assert not (tmp_path / "engine").exists()


def test_the_embedded_engine_is_built_for_one_device(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="--tp 2 must be 1"):
        run_build(chain.checkpoint, "embedded", tmp_path / "engine", BuildOptions(tp=2))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (BuildOptions(ep=2), "--ep"),
        (BuildOptions(dialect="single"), "--dialect"),
        (BuildOptions(engine_version="1.2.1"), "--engine-version"),
        (BuildOptions(mtp=True), "--mtp"),
        (BuildOptions(context=64), "--context"),
        (BuildOptions(concurrency=4), "--concurrency"),
        (BuildOptions(workers=2), "--workers"),
    ],
)
def test_an_option_of_another_target_is_refused(
    chain: Chain, tmp_path: Path, options: BuildOptions, named: str
) -> None:
    with pytest.raises(DeployError, match=f"{named} means nothing to target embedded"):
        run_build(chain.checkpoint, "embedded", tmp_path / "engine", options)
    assert not (tmp_path / "engine").exists()


def test_an_unknown_target_is_named(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="target 'onnx' is unknown; use one of"):
        run_build(chain.checkpoint, "onnx", tmp_path / "engine")
