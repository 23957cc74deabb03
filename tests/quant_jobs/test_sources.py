"""Every command that is given a source: the same refusals, and copies all the way through."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.chain import Ended
from support.copies import COPIES, write_copy
from support.quantizing import SmallModel, make_small_model, small_recipe
from support.synthetic import config_dict
from typer.testing import CliRunner

from cluster.__main__ import app as cluster_app
from deepseek.artifact.reader import ArtifactReader
from deepseek.config import ModelConfig
from deepseek.engine.packed import load_packed
from deepseek.errors import IntServeError
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.build import run_build
from quant_jobs.calibration.token_blocks import CalibrationSource
from quant_jobs.evaluate import Settings, run_evaluate
from quant_jobs.quantize import run_quantize
from quant_jobs.submission import make_quantization
from quant_jobs.targets.embedded import pack_engine

Command = Callable[..., Ended]
SHORT = Settings(num_blocks=2, block_tokens=32, decode_tokens=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engine") / "engine"
    pack_engine(CheckpointReader(model.directory), directory)
    return directory


def sentences(
    command: Command, source: Path, model: SmallModel, engine: Path, output: Path
) -> dict[str, str]:
    """What each command says on stderr about this source, by command; all must exit with 2."""
    words = {
        "quantize": ("--model", source, "--recipe", "int8", "--workers", 0, "--calibration"),
        "build": ("--checkpoint", source),
        "evaluate": ("--engine", engine, "--reference", source, "--data", model.text),
        "estimate": ("--model", source, "--recipe", "int8", "--nodes", 1),
        "submit": ("--model", source, "--recipe", "int8", "--calibration", model.text),
    }
    words["quantize"] += (model.text,)
    said: dict[str, str] = {}
    for name, arguments in words.items():
        place = () if name == "estimate" else ("--output", output)
        ended = command(name, *arguments, *place)
        assert ended.code == 2, (name, ended)
        assert ended.out == ""
        said[name] = ended.err
    arguments = ["plan", "--model", str(source), "--recipe", "int8", "--hardware", "cpu"]
    result = CliRunner().invoke(cluster_app, arguments)
    assert isinstance(result.exception, IntServeError)
    said["plan"] = f"error: {result.exception}\n"
    assert not output.exists()
    return said


def test_every_command_refuses_a_quantized_source_in_the_same_sentence(
    command: Command, model: SmallModel, engine: Path, tmp_path: Path
) -> None:
    source = tmp_path / "nvfp4"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config_dict(fp8=False)))
    quantization = {"quantization": {"quant_algo": "NVFP4"}}
    (source / "hf_quant_config.json").write_text(json.dumps(quantization))
    said = sentences(command, source, model, engine, tmp_path / "out")
    assert len(set(said.values())) == 1, said
    assert said["plan"] == (
        f"error: {source} is quantized (modelopt, 'NVFP4', hf_quant_config.json); give the "
        "unquantized release, in FP8 tiles of 128 x 128 or in BF16\n"
    )


def test_every_command_refuses_our_engine_as_a_source(
    command: Command, model: SmallModel, engine: Path, tmp_path: Path
) -> None:
    said = sentences(command, engine, model, engine, tmp_path / "out")
    assert set(said.values()) == {
        f"error: {engine} is an engine that IntServe built, not a source checkpoint; name the "
        "source that it was made from\n"
    }


def test_every_command_refuses_another_architecture_before_anything_runs(
    command: Command, model: SmallModel, engine: Path, tmp_path: Path
) -> None:
    """Also `submit`, which takes a checkpoint that is absent here to be on the nodes."""
    source = tmp_path / "llama"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    said = sentences(command, source, model, engine, tmp_path / "out")
    assert all("'llama'" in sentence for sentence in said.values()), said
    assert len(set(said.values())) == 1


def test_every_command_names_a_config_in_another_encoding(
    command: Command, model: SmallModel, engine: Path, tmp_path: Path
) -> None:
    source = tmp_path / "utf16"
    source.mkdir()
    (source / "config.json").write_bytes(json.dumps(config_dict()).encode("utf-16"))
    said = sentences(command, source, model, engine, tmp_path / "out")
    assert set(said.values()) == {
        f"error: {source}/config.json is not UTF-8 text (byte 0); convert it to UTF-8\n"
    }


def test_every_command_that_reads_weights_names_a_broken_shard(
    command: Command, model: SmallModel, engine: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(model.directory, tmp_path / "broken"))
    shard = min(source.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b'"shape":[', b'"shape":[0.', 1))
    output = tmp_path / "out"
    for words in (
        ("quantize", "--model", source, "--recipe", "int8", "--calibration", model.text),
        ("build", "--checkpoint", source),
        ("evaluate", "--engine", engine, "--reference", source, "--data", model.text),
    ):
        ended = command(*words, "--output", output)
        assert ended.code == 2
        assert ended.err.count("\n") == 1
        assert f"{shard} is not a safetensors file (tensor " in ended.err
        assert not output.exists()


def test_a_source_that_is_not_here_is_submitted_by_its_path(tmp_path: Path) -> None:
    here, there = (
        make_quantization(path, "int8", ["text.txt"], tmp_path / "out", 1, "cpu", 1)
        for path in (tmp_path / "absent", Path("/data/absent"))
    )
    assert here.base_id != there.base_id


@pytest.mark.heavy
@pytest.mark.parametrize("copy", ["both"])  # the others differ in their config only: test_origin.py
def test_a_copy_goes_through_quantize_build_and_evaluate_as_if_its_config_were_true(
    model: SmallModel, tmp_path: Path, copy: str, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = small_recipe("int8-weight-only")
    results = []
    for told in (False, True):
        root = tmp_path / ("told" if told else "found")
        root.mkdir()
        source = write_copy(model, root / "source", copy, told=told)
        caplog.clear()
        text = [CalibrationSource(source.text)]
        run_quantize(source.directory, recipe, text, root / "artifact", 0)
        artifact = ArtifactReader(root / "artifact")
        run_build(root / "artifact", "embedded", root / "engine")
        run_build(source.directory, "embedded", root / "baseline")
        result = run_evaluate(
            root / "engine", source.directory, source.text, root / "evaluation", SHORT
        )
        warned = [record for record in caplog.records if record.levelname == "WARNING"]
        assert len(warned) == (0 if told else len(COPIES[copy][1]))
        truth = CheckpointReader(source.directory).config
        assert artifact.config == truth
        assert ModelConfig.from_directory(root / "artifact").num_nextn_predict_layers == (
            truth.num_nextn_predict_layers
        )
        assert load_packed(root / "engine").config.num_nextn_predict_layers == (
            truth.num_nextn_predict_layers
        )
        assert load_packed(root / "baseline").config == truth
        results.append((artifact, result, root))
    (found, found_result, found_root), (_, told_result, told_root) = results
    assert found_result.perplexity == told_result.perplexity
    assert found_result.kl.mean == told_result.kl.mean
    for record in found.manifest.layers:
        assert (found_root / "artifact" / record.file).read_bytes() == (
            told_root / "artifact" / record.file
        ).read_bytes()
    for root in (found_root, told_root):  # a finished output is found again
        source = root / "source"
        run_quantize(source, recipe, [CalibrationSource(model.text)], root / "artifact", 0)


@pytest.mark.heavy
def test_a_command_shows_its_user_one_line_for_each_difference(
    model: SmallModel, tmp_path: Path, root: Path
) -> None:
    """In a process of its own: pytest catches what is logged here."""
    copy = write_copy(model, tmp_path / "copy", "both")
    words = ["plan", "--model", copy.directory, "--recipe", "int8", "--hardware", "cpu", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "cluster", *map(str, words)],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{copy.directory}: config.json has ") for line in lines)
    json.loads(done.stdout)
