"""The bench of engines for TensorRT-LLM: every tensor is exact on every rank, and no input scale
has a gain error that the runtime's rounding would add."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.outliers import OUTLIER_EXPERT, OUTLIER_LAYER, outlier_small_model
from support.quantizing import small_recipe

from bench.trtllm_ranks import HEADINGS, HEADS, LAYOUTS, WIDTH, Row, gains, layout_name, run_layouts
from deepseek.artifact.reader import ArtifactReader
from deepseek.source.synthetic import Size, synthetic_config
from quant_jobs.calibration.token_blocks import CalibrationSource
from quant_jobs.quantize import run_quantize


def check_rows(rows: list[Row], folder: Path) -> None:
    """All of the artifact's tensors were compared on all ranks, whose bytes are the plan's."""
    artifact = ArtifactReader(folder / "artifact")
    tensors = {
        name
        for record in artifact.manifest.layers
        for name in record.tensors
        if not name.endswith("weight_shape")
    }
    for row in rows:
        assert row.checked.compared == len(tensors)
        assert len(row.checked.ranks) == row.built.tp
        assert row.built.planned_rank_bytes == pytest.approx(
            row.built.rank_weight_bytes[0], rel=0.001
        )
        for rank in row.checked.ranks:
            assert rank.read_bytes == pytest.approx(row.built.rank_weight_bytes[0], rel=0.001)
        assert len(row.cells()) == len(HEADINGS)


@pytest.mark.heavy
def test_a_model_with_v3s_head_dims_is_exact_on_every_rank(tmp_path: Path) -> None:
    """As the bench runs it, but for one MoE layer, half the hidden width, and one layout."""
    size = replace(HEADS, layers=2, hidden=512, vocab=512)
    rows = list(run_layouts("heads", size, tmp_path, layouts=((4, 2),)))
    assert [row.built.dialect for row in rows] == ["mixed", "single"]
    check_rows(rows, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [HEADS, WIDTH], ids=["heads", "width"])
def test_true_head_dims_and_a_layer_of_true_width_are_exact_on_every_rank(
    tmp_path: Path, size: Size
) -> None:
    rows = list(run_layouts("model", size, tmp_path))
    assert len(rows) == 2 * len(LAYOUTS)
    check_rows(rows, tmp_path)


def test_the_models_are_those_that_the_tables_name() -> None:
    heads, width = synthetic_config(HEADS), synthetic_config(WIDTH)
    assert (heads.hidden_size, heads.num_hidden_layers, heads.num_attention_heads) == (1024, 3, 16)
    assert (heads.n_routed_experts, heads.n_group, heads.moe_intermediate_size) == (8, 4, 1024)
    for config in (heads, width):
        assert config.qk_nope_head_dim == config.v_head_dim == 128
        assert (config.qk_rope_head_dim, config.q_lora_rank, config.kv_lora_rank) == (64, 1536, 512)
    assert (width.hidden_size, width.moe_intermediate_size) == (7168, 2048)
    assert (width.num_attention_heads, width.n_routed_experts) == (128, 16)
    names = [layout_name(*layout) for layout in LAYOUTS]
    assert names == ["TP8 x EP8", "TP8 x MoE-TP8", "TP4 x EP2 x MoE-TP2"]


@pytest.mark.heavy
def test_scales_have_no_gain_error_left_and_the_outlier_is_reported(tmp_path: Path) -> None:
    model = outlier_small_model(tmp_path)
    text = [CalibrationSource(model.text)]
    run_quantize(
        model.directory, small_recipe("int4"), text, tmp_path / "artifact", 0, lambda _: None
    )
    artifact = ArtifactReader(tmp_path / "artifact")
    found = gains("outlier", artifact)
    assert [gain.layer for gain in found] == [1, 2]
    assert all(gain.after == (0.0, 0.0) for gain in found)
    assert max(error for gain in found for error in gain.before) > 1e-4
    (outlier,) = artifact.manifest.input_outliers
    assert (outlier.layer, outlier.expert) == (OUTLIER_LAYER, OUTLIER_EXPERT)
    assert found[1].spread[1] == pytest.approx(outlier.ratio, rel=0.2)
    assert found[1].chosen.down > 16 * found[0].chosen.down
