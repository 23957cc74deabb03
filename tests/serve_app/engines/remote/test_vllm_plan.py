"""What vLLM is started with, from the directory of `build --target vllm` and the options."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.quantizing import add_text
from support.synthetic import write_checkpoint
from support.trtllm_directories import redigest
from support.vllm_builds import SHAPE, build_vllm_engine, make_vllm_artifact

from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import IntServeError
from quant_jobs.targets.embedded import pack_engine
from serve_app.engine_sections import VllmOptions
from serve_app.engines.remote.options import launch_of, plan_of

PYTHON = Path(sys.executable)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT4 engine for two ranks."""
    root = tmp_path_factory.mktemp("vllm")
    write_checkpoint(root / "source", **SHAPE)
    add_text(root / "source", root / "text.txt")  # with a tokenizer
    checkpoint = make_vllm_artifact(root, "int4").directory
    build_vllm_engine(checkpoint, root / "engine", kv_cache="fp8")
    return root / "engine"


def options(directory: Path, **changes: Any) -> VllmOptions:
    return VllmOptions(directory=directory, python=PYTHON, **changes)


def test_the_files_arguments_are_kept_and_what_the_adapter_relies_on_is_said(engine: Path) -> None:
    plan = plan_of(options(engine))
    given = dict(plan.arguments)
    assert (given["tensor_parallel_size"], given["kv_cache_dtype"]) == (2, "fp8")
    assert given["enable_expert_parallel"] is True
    assert given["skip_tokenizer_init"] is True
    assert (given["generation_config"], given["scheduling_policy"]) == ("vllm", "priority")
    assert given["trust_remote_code"] is False
    assert not [name for name in given if "-" in name]
    assert (plan.engine, plan.kv_cache, plan.engine_version) == ("vllm", "fp8", "0.32.0")
    assert plan.max_model_len == given["max_model_len"]
    assert plan.less_memory is not None
    first, second = (a["gpu_memory_utilization"] for a in (given, plan.less_memory))
    assert second == round(first * 0.9, 4)
    assert plan.memory == tuple(f"gpu_memory_utilization {share:g}" for share in (first, second))


def test_options_win_over_the_file_and_another_kv_format_is_told(engine: Path) -> None:
    chosen = options(engine, kv_cache="bf16", max_model_len=128, max_batch_size=4, cpu=True)
    plan = plan_of(chosen)
    given = plan.arguments
    assert (plan.kv_cache, given["kv_cache_dtype"]) == ("bf16", "bfloat16")
    assert (given["max_model_len"], given["max_num_seqs"], plan.max_running) == (128, 4, 4)
    assert (given["enforce_eager"], given["kv_cache_memory_bytes"]) == (True, 1 << 30)
    assert "gpu_memory_utilization" not in given
    assert plan.less_memory is not None
    assert plan.less_memory["kv_cache_memory_bytes"] == 1 << 29


def test_fewer_ranks_than_it_was_built_for_are_checked_against_its_formats(engine: Path) -> None:
    plan = plan_of(options(engine, tensor_parallel_size=1))
    assert plan.arguments["tensor_parallel_size"] == 1
    assert plan.arguments["enable_expert_parallel"] is False
    with pytest.raises(IntServeError, match="8 ranks|--tp 8|heads"):
        plan_of(options(engine, tensor_parallel_size=8))


def test_its_process_waits_as_long_as_the_configuration_says(engine: Path) -> None:
    launch = launch_of(options(engine, load_timeout_s=1234.5))
    assert launch.backend == "vllm"
    assert launch.env["VLLM_ENGINE_READY_TIMEOUT_S"] == "1235"


def test_a_longer_context_than_the_file_has_is_refused(engine: Path) -> None:
    with pytest.raises(
        IntServeError, match=r"max_model_len 9999 exceeds .*vllm.yaml.*--context 9999"
    ):
        plan_of(options(engine, max_model_len=9999))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("swap-space: 4\n", "swap-space"),
        ("max-num-seqs: many\n", "max-num-seqs"),
        ("tensor-parallel-size: 4\n", "tensor-parallel-size is 4"),
    ],
)
def test_an_edited_file_of_arguments_is_refused_before_vllm_reads_it(
    engine: Path, tmp_path: Path, change: str, sentence: str
) -> None:
    copy = shutil.copytree(engine, tmp_path / "engine")
    path = copy / "vllm.yaml"
    name = change.partition(":")[0]
    lines = [line for line in path.read_text().splitlines() if not line.startswith(name)]
    path.write_text("\n".join(lines) + "\n" + change)
    redigest(copy)
    with pytest.raises(IntServeError, match=sentence) as refused:
        plan_of(options(copy))
    assert "\n" not in str(refused.value)


def test_a_directory_of_another_target_is_refused(tmp_path: Path, engine: Path) -> None:
    pack_engine(ArtifactReader(engine.parent / "int4"), tmp_path / "embedded")
    with pytest.raises(
        IntServeError, match=r"is an engine for embedded.*build one with --target vllm"
    ):
        plan_of(options(tmp_path / "embedded"))
