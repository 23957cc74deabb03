"""int4-a8, whose head is INT8: quantized, built, judged and loaded on the example model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek.artifact.reader import ArtifactReader
from deepseek.engine.engine import LLMEngine
from deepseek.recipe import load_recipe, parse_recipe
from quant_jobs.build import run_build
from quant_jobs.evaluate import Settings, run_evaluate
from quant_jobs.gate import run_gate
from quant_jobs.quantize import run_quantize
from quant_jobs.reports.job_report import PAGE_FILE
from serve_app.gating import admit

pytestmark = pytest.mark.heavy


def test_int4_a8_is_quantized_built_judged_and_admitted(tiny_model: Path, tmp_path: Path) -> None:
    few = {"num_blocks": 4, "block_tokens": 128}
    content = load_recipe("int4-a8").model_dump(mode="json") | {"calibration": few}
    recipe = parse_recipe(content, where="test")
    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"
    run_quantize(tiny_model, recipe, tiny_model / "calibration.txt", checkpoint, workers=0)
    errors = ArtifactReader(checkpoint).manifest.record("globals").errors
    assert 0 < errors["lm_head"] < 0.03
    assert "head, behind all layers:" in (checkpoint / PAGE_FILE).read_text(encoding="utf-8")

    run_build(checkpoint, "embedded", engine)
    settings = Settings(num_blocks=5, block_tokens=512, decode_tokens=0)
    result = run_evaluate(
        engine, tiny_model, tiny_model / "heldout.txt", tmp_path / "evaluation", settings
    )
    sizes = {row.group: row for row in result.sizes}
    embedding, head = 2048 * 256 * 2, 2048 * 256 + 2048 * 4
    assert sizes["embeddings"].artifact_bytes == embedding + head
    outcome = run_gate(engine, tmp_path / "evaluation")
    assert outcome.verdict.passed
    assert 0.005 < result.kl.mean.value < 0.06

    admitted = admit(engine, kv_cache=None)
    loaded = LLMEngine.load(engine)
    assert loaded.identity.engine_digest == admitted.engine_digest
    assert loaded.score(torch.arange(5, 40)).isfinite().all()
