"""Kimi-K2 and Moonlight from source to verdict: each command on a small model of its structure."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.chain import Ended
from support.family import END_OF_TURN, NAMES, Name, family_model
from support.quantizing import small_recipe

from deepseek.artifact.built_engine import read_engine
from deepseek.artifact.reader import ArtifactReader
from quant_jobs.build import run_build
from quant_jobs.estimate import run_estimate
from quant_jobs.evaluate import Settings, run_evaluate
from quant_jobs.evaluation.record import read_evaluation
from quant_jobs.evaluation.tokens import read_tokens
from quant_jobs.quantize import run_quantize
from quant_jobs.reports import findings

pytestmark = pytest.mark.heavy

#: Names under which the statistics of the attention's inputs are kept.
ATTENTION_INPUTS = {
    "moonlight": {"q_proj", "kv_b_proj", "o_proj"},
    "kimi-k2": {"q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"},
}


class Made:
    """One small model, its INT4 artifact, engine and evaluation."""

    def __init__(self, name: Name, root: Path, base: Path) -> None:
        self.name, self.model = name, family_model(name, base)
        self.checkpoint, self.engine = root / "checkpoint", root / "engine"
        self.evaluation = root / "evaluation"


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Quantized by GPTQ, built, and evaluated on 22 x 96 tokens."""
    name: Name = request.param
    root = tmp_path_factory.mktemp(name)
    made = Made(name, root, tmp_path_factory.getbasetemp())
    lenient = {"max_perplexity_ratio": 3.0, "max_mean_kl": 1.0, "min_top1": 0.1}
    recipe = small_recipe("int4-gptq", gate=lenient | {"max_starved_experts": 1.0})
    directory = made.model.directory
    run_quantize(directory, recipe, made.model.text, made.checkpoint, 0, lambda _: None)
    run_build(made.checkpoint, "embedded", made.engine)
    settings = Settings(num_blocks=22, block_tokens=96, decode_tokens=2)
    run_evaluate(made.engine, directory, made.model.text, made.evaluation, settings)
    return made


def test_int4_experts_by_gptq_and_the_rest_as_released(made: Made) -> None:
    reader = ArtifactReader(made.checkpoint)
    rest = "fp8-block" if made.name == "kimi-k2" else "bf16"
    assert {scheme.label for scheme in reader.schemes.values()} == {"int4-g128", rest}
    raw = json.loads((made.checkpoint / "config.json").read_text())
    assert raw["model_type"] == ("kimi_k2" if made.name == "kimi-k2" else "deepseek_v3")
    assert ("self_attn.q_proj" in " ".join(reader.schemes)) == (made.name == "moonlight")


def test_sizes_speak_of_no_mtp_layer_that_is_not_there(made: Made) -> None:
    text = " ".join(read_evaluation(made.evaluation).describe())
    assert "of BF16's" in text
    assert "MTP" not in text


def test_the_engine_has_no_mtp_layer_and_the_models_end_tokens(made: Made) -> None:
    engine = json.loads((made.engine / "engine.json").read_text())
    assert engine["target_fields"]["mtp"] == "absent"
    if made.name == "kimi-k2":
        generation = json.loads((made.engine / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [END_OF_TURN]


def test_the_gate_passes_and_the_report_is_written(
    made: Made, command: Callable[..., Ended], tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(made.engine, engine)
    ended = command("gate", "--engine", engine, "--evaluation", made.evaluation)
    assert (ended.code, ended.err) == (0, ""), ended
    page = tmp_path / "report.html"
    places = ("--engine", engine, "--evaluation", made.evaluation, "--output", page)
    ended = command("report", *places, "--checkpoint", made.checkpoint)
    assert ended.code == 0, ended
    assert page.stat().st_size > 10_000


def test_int8_and_every_linear_by_awq_too(
    made: Made, command: Callable[..., Ended], tmp_path: Path
) -> None:
    for name in ("int8", "int4-all-awq"):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(small_recipe(name).model_dump(mode="json")))
        words = ("--model", made.model.directory, "--recipe", recipe, "--workers", 0)
        output = tmp_path / name
        ended = command("quantize", *words, "--calibration", made.model.text, "--output", output)
        assert ended.code == 0, ended
        ended = command("build", "--checkpoint", output, "--output", tmp_path / f"{name}-engine")
        assert ended.code == 0, ended
        errors = {
            module.rpartition(".")[2]
            for record in ArtifactReader(output).manifest.layers
            for module in record.errors
            if "self_attn" in module
        }
        assert ATTENTION_INPUTS[made.name] <= errors


def test_without_a_tokenizer_the_report_shows_ids_and_quantize_says_what_to_do(
    made: Made, command: Callable[..., Ended], tmp_path: Path
) -> None:
    """As both are released: tiktoken.model, and code that reads it."""
    engine = read_engine(made.engine)
    documents = {name: data for name, data in engine.documents.items() if name != "tokenizer.json"}
    tokens = read_tokens(made.evaluation, read_evaluation(made.evaluation))
    worst = findings._worst_tokens(tokens, dataclasses.replace(engine, documents=documents))
    assert all(token.text.isdigit() for token in worst)

    source = shutil.copytree(made.model.directory, tmp_path / "source")
    (source / "tokenizer.json").unlink()
    (source / "tiktoken.model").write_text("IQ== 0\n")
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "output"
    recipe.write_text(yaml.safe_dump(small_recipe("int8").model_dump(mode="json")))
    words = ("--model", source, "--recipe", recipe, "--workers", 0)
    ended = command("quantize", *words, "--calibration", made.model.text, "--output", output)
    assert ended.code == 2
    assert ended.err.strip() == (
        f"error: {source}/tokenizer.json is absent, and tiktoken.model is read by code of the "
        "checkpoint only, which is never run; make a tokenizer.json from it once, as "
        "docs/tokenizer.md says, or the file must hold input_ids"
    )
    assert not list(output.glob("*.safetensors"))


@pytest.mark.parametrize("model", ["kimi-k2", "moonlight"])
def test_built_in_recipes_are_estimated_and_kimi_takes_longer_than_deepseek(model: str) -> None:
    for recipe in ("int8", "int4-gptq"):
        made, v3 = (
            run_estimate(name, recipe, 2, tokens=262144, block_tokens=2048, storage_gb=2.0)
            for name in (model, "deepseek-v3")
        )
        assert made.fits, recipe
        assert (made.expected.total > v3.expected.total) == (model == "kimi-k2"), recipe
