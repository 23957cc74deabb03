"""DeepSeek-V3.2 from plan to answer, on a small random model of its shape: every step of the
table `{plan, quantize int8, quantize int4-gptq, build, evaluate, serve}`, and what becomes of its
indexer."""

from __future__ import annotations

import json
import logging
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.configs import make_config
from support.quantizing import NUM_LAYERS, SmallModel, make_small_model, small_recipe
from support.serving import LocalEngines, client_of
from support.synthetic import V3_2, write_checkpoint
from typer.testing import CliRunner

from cluster.__main__ import app as cluster_app
from deepseek.artifact.built_engine import read_engine
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import layer_file
from deepseek.cli import run
from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions
from deepseek.errors import ArtifactError, CheckpointError, DeployError, RequestError
from deepseek.inventory import layer_tensors
from deepseek.recipe import builtin_recipes
from deepseek.source.checkpoint import CheckpointReader, scale_name
from quant_jobs.__main__ import app as jobs_app
from quant_jobs.build import run_build
from quant_jobs.cost.shapes import layer_output_bytes, source_bytes
from quant_jobs.evaluate import Settings, run_evaluate
from quant_jobs.evaluation.record import Evaluation
from quant_jobs.gate import run_gate
from quant_jobs.quantize import run_quantize
from quant_jobs.reports.findings import rule_rows
from serve_app.engines.embedded import EmbeddedEngine
from serve_app.openai.service import Service
from serve_app.openai.tokenizer import HfTokenizer
from serve_app.telemetry.tracing import Telemetry

#: Tokens up to which its attention is dense; it has 256 positions.
TOPK = V3_2["index_topk"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """FP8 tiles, one dense layer, two MoE layers, one MTP layer: an indexer in each."""
    return make_small_model(tmp_path_factory.mktemp("v3.2"), **V3_2)


def quantized(model: SmallModel, recipe: str, output: Path) -> Path:
    run_quantize(model.directory, small_recipe(recipe), model.text, output, 0)
    return output


@pytest.fixture(scope="module")
def int8(model: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(model, "int8", tmp_path_factory.mktemp("int8") / "out")


@pytest.fixture(scope="module")
def engine_dir(int8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("engine") / "out"
    run_build(int8, "embedded", output)
    return output


@dataclass(frozen=True)
class Judged:
    directory: Path
    evaluation: Evaluation


@pytest.fixture(scope="module")
def judged(model: SmallModel, engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """On 32 blocks as long as they may be: a verdict needs 2000 tokens."""
    output = tmp_path_factory.mktemp("evaluation")
    heldout = output / "heldout.txt"
    words = random.Random(6).choices([f"w{index}" for index in range(96)], k=32 * TOPK)
    heldout.write_text(" ".join(words), encoding="utf-8")
    settings = Settings(num_blocks=32, block_tokens=TOPK, decode_tokens=0, num_threads=1)
    made = run_evaluate(engine_dir, model.directory, heldout, output, settings)
    return Judged(output, made)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory, by name."""
    files = directory.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_indexers_are_as_released(source: Path, artifact: Path) -> None:
    """The same tensors with the same bits; only the scales of FP8 tiles have another name."""
    wanted, found = stored(source), stored(artifact)
    config = CheckpointReader(source).config
    for layer in range(config.num_layers_with_mtp):
        for spec in layer_tensors(config, layer):
            if not spec.is_indexer:
                continue
            assert found[spec.name].dtype == wanted[spec.name].dtype, spec.name
            as_bytes = [t[spec.name].contiguous().view(torch.uint8) for t in (found, wanted)]
            assert torch.equal(*as_bytes), spec.name
            if scale_name(spec.name) in wanted:
                scale = found[f"{spec.module}.weight_scale"]
                assert torch.equal(scale, wanted[scale_name(spec.name)]), spec.name
    of_indexers = {name for name in found if ".indexer." in name}
    is_fp8 = config.weight_block_size is not None
    assert len(of_indexers) == config.num_layers_with_mtp * (7 if is_fp8 else 5)


# --- plan ---


def test_plan(model: SmallModel) -> None:
    words = ["plan", "--model", str(model.directory), "--recipe", "int8", "--hardware", "cpu"]
    done = CliRunner().invoke(cluster_app, words)
    assert done.exit_code == 0
    assert "Target: embedded loads this recipe." in done.stdout
    assert f"serves {TOPK} tokens of context" in done.stdout


@pytest.mark.heavy
def test_plan_of_the_release_by_name() -> None:
    words = "plan --model deepseek-v3.2 --recipe int4 --hardware 8xH800-80GB --context 163840"
    done = CliRunner().invoke(cluster_app, [*words.split(), "--json"])
    answer = json.loads(done.stdout)
    assert (done.exit_code, answer["fits"], answer["loads"]) == (0, True, True)
    assert answer["kv_bytes_per_token"] == 61 * (1152 + 132)
    (indexer,) = (group for group in answer["groups"] if group["name"] == "indexer")
    assert indexer["per_gpu_gb"] == indexer["total_gb"] == 0.88


# --- quantize ---


@pytest.mark.heavy
def test_quantize_int8(model: SmallModel, int8: Path) -> None:
    assert_indexers_are_as_released(model.directory, int8)
    reader = ArtifactReader(int8)
    assert reader.manifest.layers[0].errors.keys() == {
        module
        for module in reader.schemes
        if module.startswith("model.layers.0.") and ".indexer." not in module
    }
    sizes = [(int8 / layer_file(layer)).stat().st_size for layer in range(NUM_LAYERS)]
    for layer, size in enumerate(sizes):  # the file has a header besides
        planned = layer_output_bytes(model.config, lambda s: reader.schemes[s.module], layer)
        assert 0 < size - planned < 30_000
    assert source_bytes(model.config) == CheckpointReader(model.directory).total_bytes
    (row,) = rule_rows(reader.recipe, model.config)
    main = [m for m in reader.schemes if ".indexer." not in m and f"layers.{NUM_LAYERS}." not in m]
    assert row.linears == len(main)


@pytest.mark.heavy
def test_quantize_int4_gptq(model: SmallModel, tmp_path: Path) -> None:
    output = quantized(model, "int4-gptq", tmp_path / "out")
    assert_indexers_are_as_released(model.directory, output)


@pytest.mark.heavy
def test_quantize_a_bf16_source(tmp_path: Path) -> None:
    model = make_small_model(tmp_path, layers=2, experts=4, fp8=False, **V3_2)
    output = quantized(model, "int8-weight-only", tmp_path / "out")
    assert_indexers_are_as_released(model.directory, output)
    config = json.loads((output / "config.json").read_text())
    assert any("indexer" in entry for entry in config["quantization_config"]["ignore"])
    assert (config["model_type"], config["index_topk"]) == ("deepseek_v32", TOPK)


@pytest.mark.slow
@pytest.mark.parametrize("name", builtin_recipes())
def test_quantize_build_and_score_with_every_built_in_recipe(
    name: str, model: SmallModel, int8: Path, tmp_path: Path
) -> None:
    output = quantized(model, name, tmp_path / "out")
    assert_indexers_are_as_released(model.directory, output)
    run_build(output, "embedded", tmp_path / "engine")
    engine = LLMEngine.load(tmp_path / "engine", EngineOptions(num_threads=1))
    assert engine.score(torch.arange(TOPK) % 96).isfinite().all()
    if name != "int8-smoothquant":
        return
    # No smoothing scale reaches what reads an indexer's norms: rounded like o_proj, as in int8.
    smooth, plain, source = stored(output), stored(int8), stored(model.directory)
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "self_attn.q_a_layernorm"):
            assert torch.equal(smooth[f"{prefix}.{norm}.weight"], source[f"{prefix}.{norm}.weight"])
        for norm in ("post_attention_layernorm", "self_attn.kv_a_layernorm"):
            same = smooth[f"{prefix}.{norm}.weight"] == source[f"{prefix}.{norm}.weight"]
            assert not same.all()
        for role in ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj"):
            module = f"{prefix}.self_attn.{role}"
            assert torch.equal(smooth[f"{module}.weight"], plain[f"{module}.weight"])
    assert not ArtifactReader(output).manifest.fallbacks


def jobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str]:
    """Exit code and stderr of `python -m quant_jobs WORDS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["quant_jobs", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        run(jobs_app)
    code = ended.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().err


LIMIT = (
    f"the {TOPK} tokens (index_topk) within which DeepSeek-V3.2's attention is dense, which is all "
    "that IntServe computes; lower it"
)


def test_blocks_longer_than_the_dense_context_are_refused_before_any_work(
    model: SmallModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The built-in recipes have blocks of 512 tokens."""
    output = tmp_path / "out"
    words = ("--model", model.directory, "--recipe", "int8", "--calibration", model.text)
    answer = jobs(monkeypatch, capsys, "quantize", *words, "--output", output, "--workers", 0)
    assert answer == (2, f"error: block_tokens 512 is more than {LIMIT}\n")
    assert not output.exists()
    words = ("--model", model.directory, "--recipe", "int8", "--nodes", 1)
    answer = jobs(monkeypatch, capsys, "estimate", *words, "--block-tokens", TOPK + 1)
    assert answer == (2, f"error: --block-tokens {TOPK + 1} is more than {LIMIT}\n")
    assert jobs(monkeypatch, capsys, "estimate", *words)[0] == 0


def test_an_indexer_that_is_not_finite_is_refused_by_name(
    model: SmallModel, tmp_path: Path
) -> None:
    directory = tmp_path / "broken"
    config = write_checkpoint(directory, layers=1, fp8=False, **V3_2)
    assert config.has_indexer
    reader = CheckpointReader(directory)
    name = "model.layers.0.self_attn.indexer.wk.weight"
    (shard,) = [path for path in directory.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(shard)
    tensors[name][3, 5] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    assert reader.config == config
    shutil.copy(model.directory / "tokenizer.json", directory)
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN at"):
        run_quantize(directory, small_recipe("int8"), model.text, tmp_path / "out", 0)


# --- build ---


@pytest.mark.heavy
def test_build(engine_dir: Path) -> None:
    assert not any("indexer" in name for name in stored(engine_dir))
    engine = LLMEngine.load(engine_dir, EngineOptions(num_threads=1))
    assert engine.max_model_len == TOPK
    assert "indexer" not in engine.allocated_bytes()
    with pytest.raises(RequestError, match=rf"at most {TOPK} \(it has no sparse attention\)"):
        engine.score(torch.zeros(TOPK + 1, dtype=torch.int64))
    with pytest.raises(DeployError, match=f"max_model_len {TOPK + 1} exceeds the {TOPK} tokens"):
        LLMEngine.load(engine_dir, EngineOptions(max_model_len=TOPK + 1))


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["indexer.wk.weight", "indexer.k_norm.bias"])
def test_build_reads_the_indexer_although_it_drops_it(
    name: str, int8: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "artifact"
    shutil.copytree(int8, damaged)
    file = damaged / layer_file(1)
    raw = bytearray(file.read_bytes())
    header = int.from_bytes(raw[:8], "little")
    tensor = f"model.layers.1.self_attn.{name}"
    first, _ = json.loads(raw[8 : 8 + header])[tensor]["data_offsets"]
    raw[8 + header + first] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ArtifactError, match=f"tensor {tensor} in .* is damaged"):
        run_build(damaged, "embedded", tmp_path / "engine")


# --- evaluate, gate ---


@pytest.mark.heavy
def test_evaluate_and_gate(engine_dir: Path, judged: Judged, tmp_path: Path) -> None:
    assert judged.evaluation.top1.value > 0.8
    groups = {size.group: size for size in judged.evaluation.sizes}
    assert groups["indexer"].source_bytes == groups["indexer"].artifact_bytes > 0
    fresh = tmp_path / "engine"
    shutil.copytree(engine_dir, fresh)
    outcome = run_gate(fresh, judged.directory)
    assert (fresh / "gate.json").exists()
    assert outcome.verdict.engine_digest == judged.evaluation.engine_digest


@pytest.mark.heavy
def test_evaluate_refuses_blocks_longer_than_the_dense_context(
    model: SmallModel,
    engine_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "evaluation"
    words = ("--engine", engine_dir, "--reference", model.directory, "--data", model.text)
    answer = jobs(monkeypatch, capsys, "evaluate", *words, "--output", output)
    assert answer == (2, f"error: block_tokens 512 is more than {LIMIT}\n")
    assert not output.exists()


# --- serve ---


@pytest.mark.heavy
async def test_serve(engine_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = make_config(engine=engine_dir, model_name="v3.2", allow_ungated=True, num_threads=1)
    engine = EmbeddedEngine(settings.pool.engine)
    logging.getLogger("ray.serve").propagate = True
    with caplog.at_level(logging.WARNING, logger="ray.serve"):
        engines = LocalEngines(engine)
        await engines.info()
    assert f"at most {TOPK} tokens of context, not the model's 256" in caplog.text
    service = Service(
        settings,
        HfTokenizer(engine_dir, read_engine(engine_dir).documents),
        engines,
        Telemetry(None),
    )
    try:
        async with client_of(service) as client:
            body = {"model": "v3.2", "prompt": "w1 w2 w3", "max_tokens": 4, "ignore_eos": True}
            answer = (await client.post("/v1/completions", json=body)).json()
            assert answer["usage"]["completion_tokens"] == 4
            assert (await client.get("/health")).json()["max_model_len"] == TOPK
            refused = await client.post("/v1/completions", json=body | {"prompt": [5] * TOPK})
    finally:
        await engine.shutdown()
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert refused.json()["error"]["message"] == (
        f"the prompt has {TOPK} tokens and the dense context (index_topk; this engine has no "
        f"sparse attention) holds {TOPK}, completion included; shorten the prompt"
    )
