"""A quantized head under the targets: built and checked for vLLM and transformers, refused in a
sentence elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.quantizing import add_text
from support.synthetic import write_checkpoint
from support.vllm_builds import SHAPE, make_vllm_artifact

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.artifact.reader import ArtifactReader
from deepseek.engine.options import EngineOptions
from deepseek.errors import DeployError
from deepseek.fused_loader.modules import Linear, Plain
from deepseek.recipe import Recipe, parse_recipe
from deepseek.target_engine import load_as_target
from deepseek.vllm.loader import LoaderModel
from quant_jobs.build import run_build
from quant_jobs.build_options import BuildOptions
from quant_jobs.check import run_check

pytestmark = pytest.mark.heavy

GATE = {"max_perplexity_ratio": 1.1, "max_mean_kl": 0.1, "min_top1": 0.9}
EVERY: dict[str, Any] = {"match": "*", "weights": "int4", "group_size": 32}
SMALL = EngineOptions(max_kv_tokens=256, max_model_len=256, num_threads=1)
HEADS: dict[str, dict[str, Any]] = {
    "int8-a8": {"weights": "int8", "activations": "int8"},
    "int8": {"weights": "int8"},
    "int4-a8": {"weights": "int4", "group_size": 32, "activations": "int8"},
}


def recipe_of(name: str) -> Recipe:
    rules = [EVERY, {"match": "lm_head"} | HEADS[name]]
    raw = {"name": name, "description": "", "rules": rules, "gate": GATE}
    return parse_recipe(raw, where="test")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ArtifactReader]:
    root = tmp_path_factory.mktemp("heads")
    write_checkpoint(root / "source", **SHAPE, layers=2, vocab_size=256)
    add_text(root / "source", root / "text.txt")  # an engine wants a tokenizer
    return {name: make_vllm_artifact(root, recipe_of(name)) for name in HEADS}


@pytest.mark.parametrize("target", ["vllm", "transformers"])
@pytest.mark.parametrize("name", HEADS)
def test_a_quantized_head_is_built_checked_and_read_back(
    artifacts: dict[str, ArtifactReader], target: str, name: str, tmp_path: Path
) -> None:
    checkpoint, output = artifacts[name].directory, tmp_path / "engine"
    tp = 2 if target == "vllm" else None
    run_build(checkpoint, target, output, BuildOptions(tp=tp))
    report = run_check(output, checkpoint=checkpoint)
    assert report.compared > 0
    with safe_open(output / "model-globals.safetensors", framework="pt") as file:
        held = {key for key in file.keys() if key.startswith("lm_head.")}  # noqa: SIM118
    plain = target == "vllm" and name == "int8-a8"
    assert ("lm_head.weight" in held) == plain
    assert "lm_head.weight_scale" in held
    ids = torch.arange(40)
    run_build(checkpoint, "embedded", tmp_path / "embedded")
    exact = load_as_target(tmp_path / "embedded", SMALL).score(ids)
    emulated = load_as_target(output, SMALL).score(ids)
    errors = (emulated - exact).norm(dim=1) / exact.norm(dim=1)
    assert errors.median() < 0.05, "BF16 between the kernels, and a few tokens routed otherwise"


def test_the_ranks_of_vllm_divide_the_tokens_of_a_quantized_head(
    artifacts: dict[str, ArtifactReader], tmp_path: Path
) -> None:
    run_build(artifacts["int8"].directory, "vllm", tmp_path / "engine", BuildOptions(tp=2))
    model = LoaderModel(tmp_path / "engine", RankLayout(tp=2, ep=1))
    for rank in (0, 1):
        modules = {module.name: module for module, _ in model.load(rank, "globals")}
        head = modules["lm_head"]
        assert isinstance(head, Linear)
        assert (head.outputs, head.inputs, head.method.kind) == (128, 256, "wna16")
        assert isinstance(modules["model.embed_tokens"], Plain)


def test_a_head_whose_tokens_vllm_would_pad_is_refused(tmp_path: Path) -> None:
    artifact = make_vllm_artifact(tmp_path, recipe_of("int8"), layers=2, vocab_size=192)
    with pytest.raises(DeployError, match="lm_head as int8: its 192 tokens are no multiple of 64"):
        run_build(artifact.directory, "vllm", tmp_path / "engine", BuildOptions(tp=2))


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("trtllm", "its head takes no quantization, and holds BF16"),
        ("sglang", "its own layouts hold the head in BF16"),
    ],
)
def test_who_cannot_load_a_quantized_head_says_so(
    artifacts: dict[str, ArtifactReader], target: str, reason: str, tmp_path: Path
) -> None:
    experts = {"match": "*.mlp.experts.*", "weights": "int4", "group_size": 128}
    rules = [experts, {"match": "lm_head", "weights": "int8"}]
    raw = {"name": "experts", "description": "", "rules": rules, "gate": GATE}
    root = artifacts["int8"].directory.parent
    artifact = make_vllm_artifact(root, parse_recipe(raw, where="test"))
    with pytest.raises(DeployError, match=reason):
        run_build(artifact.directory, target, tmp_path / "engine", BuildOptions(tp=2))
