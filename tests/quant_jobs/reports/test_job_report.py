"""The account of a run: what it adds up, what it says of a resumed run, and the page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.pages import check_self_contained

from deepseek.artifact.input_maxima import LayerMaxima
from deepseek.artifact.manifest import Fallback
from quant_jobs.reports.figures import ERROR_GROUPS, error_group, errors_by_group
from quant_jobs.reports.job_page import render, show_seconds
from quant_jobs.reports.job_record import (
    CalibrationAccount,
    JobRecord,
    LayerAccount,
    WorkerAccount,
)
from quant_jobs.reports.job_report import PAGE_FILE, REPORT_FILE, write_job_report

STEPS = {"attend": 1.0, "solve": 2.0, "write": 0.5, "carry": 1.0}


def make_record(
    *, layers: int = 3, experts: int = 8, workers: int = 2, **changes: Any
) -> JobRecord:
    """One dense layer, then MoE; expert 3 of the last layer is starved."""
    prefix = "model.layers.{}.mlp.experts.{}.{}_proj"
    accounts = [
        LayerAccount(
            layer="globals", seconds={"write": 0.1}, errors={}, coverage=(), num_bytes=50,
            source_bytes=50,
        ),
        LayerAccount(
            layer=0, seconds=STEPS, errors={"model.layers.0.self_attn.o_proj": 0.05}, coverage=(),
            num_bytes=100, source_bytes=200,
        ),
    ]  # fmt: skip
    for layer in range(1, layers):
        starved = layer == layers - 1
        accounts.append(
            LayerAccount(
                layer=layer,
                seconds=STEPS,
                errors={
                    prefix.format(layer, expert, role): 0.01 * (expert + 1) + 0.001 * layer
                    for expert in range(experts)
                    for role in ("gate", "up", "down")
                },
                coverage=tuple(
                    3 if starved and expert == 3 else 100 + expert for expert in range(experts)
                ),
                num_bytes=100,
                source_bytes=200,
            )
        )
    content: dict[str, Any] = {
        "recipe": "int4 <gptq>",
        "model": "models/v3",
        "num_workers": workers,
        "num_nodes": 1,
        "started_at_layer": 0,
        "workers_lost": 0,
        "wall_s": 125.0,
        "floor_tokens": 16,
        "calibration": CalibrationAccount(
            num_tokens=1000, num_blocks=10, block_tokens=100, digest="d" * 64, sources=()
        ),
        "layers": tuple(accounts),
        "workers": tuple(
            WorkerAccount(
                index=index, node="n1", pid=7, seconds={"read": 1.0, "solve": 3.0, "wait": 0.1},
                peak_rss_bytes=1 << 30, bytes_read=200, bytes_written=300,
            )
            for index in range(workers)
        ),
        "driver_peak_rss_bytes": 1 << 28,
        "driver_bytes_read": 50,
        "driver_bytes_written": 50,
        "fallbacks": (Fallback(kind="starved_expert", layer=2, module="m", count=3),),
    }  # fmt: skip
    return JobRecord.model_validate(content | changes)


def test_it_adds_up_what_workers_and_driver_moved() -> None:
    record = make_record()
    assert (record.bytes_read, record.bytes_written) == (450, 650)
    assert record.starved == {2: {3: 3}}
    assert len(record.errors) == 1 + 2 * 8 * 3
    assert {group: sorted(layers) for group, layers in errors_by_group(record.errors).items()} == {
        "attention": [0],
        "routed gate and up": [1, 2],
        "routed down": [1, 2],
    }


@pytest.mark.parametrize(
    ("module", "group"),
    [
        ("model.layers.3.self_attn.kv_b_proj", "attention"),
        ("model.layers.0.mlp.down_proj", "dense MLP, shared expert"),
        ("model.layers.3.mlp.shared_experts.up_proj", "dense MLP, shared expert"),
        ("model.layers.3.mlp.experts.12.up_proj", "routed gate and up"),
        ("model.layers.3.mlp.experts.12.down_proj", "routed down"),
    ],
)
def test_every_linear_has_its_group(module: str, group: str) -> None:
    assert error_group(module) == group
    assert group in ERROR_GROUPS


@pytest.mark.heavy
@pytest.mark.parametrize("module", ["quant_jobs.quantize", "quant_jobs.job.driver"])
def test_a_job_loads_what_draws_its_page_only_when_it_writes_it(module: str) -> None:
    code = f"import sys, {module}; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.heavy
def test_both_files_are_written_and_the_json_reads_back(tmp_path: Path) -> None:
    record = make_record()
    write_job_report(tmp_path, record)
    assert {path.name for path in tmp_path.iterdir()} == {REPORT_FILE, PAGE_FILE}
    text = (tmp_path / REPORT_FILE).read_text("utf-8")
    assert JobRecord.model_validate_json(text) == record
    assert '"format_version": 3' in text  # 3: input_maxima by layer
    with pytest.raises(ValidationError, match="surprise"):
        JobRecord.model_validate_json(text.replace('"recipe"', '"surprise": 1,\n "recipe"', 1))


@pytest.mark.heavy
def test_the_page_shows_every_plot_and_names_what_went_wrong() -> None:
    page = check_self_contained(render(make_record()))
    assert page.figures == ["errors", "coverage", "layers", "workers", "bytes"]
    text = " ".join(page.text)
    assert "int4 <gptq>" in text  # and check_self_contained saw no such element
    assert "2 min 05 s" in text
    assert "3 (3)" in text  # expert 3 saw 3 tokens
    assert "starved_expert" in text
    assert "Resumed" not in text


@pytest.mark.heavy
def test_the_page_shows_the_largest_inputs_and_names_the_outliers() -> None:
    record = make_record()
    values = (2.0, 2.0, 2.0, 2.0, 2.0, 0.0, 2.0, 50.0)
    maxima = LayerMaxima(gate_up=(1.0,) * 8, down=values)
    layers = [
        entry.model_copy(update={"input_maxima": maxima if entry.layer == 2 else None})
        for entry in record.layers
    ]
    record = record.model_copy(update={"layers": tuple(layers)})
    (outlier,) = record.input_outliers
    assert (outlier.layer, outlier.input, outlier.expert, outlier.ratio) == (2, "down", 7, 25.0)
    page = check_self_contained(render(record))
    assert page.figures == ["errors", "coverage", "maxima", "layers", "workers", "bytes"]
    text = " ".join(" ".join(page.text).split())
    assert "2 down 7 50 25 107" in text  # the row of the table, with its calibration tokens
    assert "Input outliers 1 up to 25 x the median" in text


@pytest.mark.heavy
def test_a_resumed_run_says_whose_times_these_are() -> None:
    whole = make_record()
    earlier = [entry.model_copy(update={"seconds": {}}) for entry in whole.layers[:2]]
    record = make_record(layers=3).model_copy(
        update={"layers": (*earlier, *whole.layers[2:]), "started_at_layer": 1}
    )
    text = " ".join(check_self_contained(render(record)).text)
    assert "Resumed at layer 1: 2 of 4 files were published by an earlier run" in text


@pytest.mark.heavy
def test_a_run_that_only_finished_has_a_page_too() -> None:
    """Killed just before the manifest: every file was published, no worker ever asked."""
    idle = [entry.model_copy(update={"seconds": {}}) for entry in make_record().layers]
    record = make_record(workers=1).model_copy(
        update={
            "layers": tuple(idle),
            "workers": (),
            "driver_bytes_read": 0,
            "driver_bytes_written": 0,
        }
    )
    page = check_self_contained(render(record))
    assert page.figures == ["errors", "coverage", "workers", "bytes"]


def test_a_recipe_that_quantizes_nothing_has_no_errors_to_show() -> None:
    bare = [
        entry.model_copy(update={"errors": {}, "coverage": ()}) for entry in make_record().layers
    ]
    page = check_self_contained(render(make_record().model_copy(update={"layers": tuple(bare)})))
    assert page.figures == ["layers", "workers", "bytes"]


@pytest.mark.heavy
def test_the_page_bears_the_full_model() -> None:
    record = make_record(layers=61, experts=256, workers=32)
    html = render(record)
    assert len(html) < 2_000_000
    assert check_self_contained(html).figures == [
        "errors",
        "coverage",
        "layers",
        "workers",
        "bytes",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.345, "12.3 s"), (245.0, "4 min 05 s"), (7620.0, "2 h 07 min")]
)
def test_times_are_in_the_unit_that_one_thinks_in(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text
