"""vllm.yaml says what the plan decided, in names that are a closed set."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.errors import DeployError
from deepseek.vllm.launch import Launch, faults, launch_of, launch_yaml, make_launch


def made(tp: int = 8, ep: int = 8, **changes: Any) -> Launch:
    given: dict[str, Any] = {
        "kv_cache": "fp8",
        "max_model_len": 4096,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 8192,
        "memory_fraction": 0.92,
        "mtp": False,
    }
    return make_launch(RankLayout(tp=tp, ep=ep), **(given | changes))


@pytest.mark.parametrize("mtp", [True, False])
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (8, 8), (8, 1), (16, 16)])
def test_what_is_written_reads_back_and_fits_its_engine(tp: int, ep: int, mtp: bool) -> None:
    launch = made(tp, ep, mtp=mtp)
    data = launch_yaml(launch, "0.32.0", has_tiles=True)
    assert launch_of(data, where="vllm.yaml") == launch
    ranks = RankLayout(tp=tp, ep=ep)
    assert not list(faults(launch, ranks, kv_cache="fp8", mtp=mtp, context=4096))
    assert data == launch_yaml(launch, "0.32.0", has_tiles=True)


def test_ranks_over_nodes_run_in_ray_and_the_file_says_to_start_it() -> None:
    data = launch_yaml(made(16, 16), "0.32.0", has_tiles=False).decode()
    assert yaml.safe_load(data)["distributed-executor-backend"] == "ray"
    assert "start that first" in data
    assert "distributed" not in launch_yaml(made(), "0.32.0", has_tiles=False).decode()


def test_fp8_tiles_ask_for_the_variable_that_keeps_them() -> None:
    assert b"VLLM_USE_DEEP_GEMM_E8M0=0 before" in launch_yaml(made(), "0", has_tiles=True)
    assert b"E8M0" not in launch_yaml(made(), "0", has_tiles=False)


def test_a_batch_is_never_wider_than_the_tokens_of_a_step() -> None:
    assert made(max_num_seqs=9000).max_num_batched_tokens == 9000


def test_a_kv_format_that_it_has_not_is_refused() -> None:
    with pytest.raises(DeployError, match="vLLM has no int8 KV cache"):
        made(kv_cache="int8")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"dtype: bfloat16\ndtype: bfloat16\n", "vllm.yaml"),
        (b"model: /etc\n", "Field required"),
        (b"- a\n", "vllm.yaml"),
        (b"\xff", "vllm.yaml"),
        (
            launch_yaml(made(), "0", has_tiles=False).replace(b": 8\n", b": '8'\n"),
            "tensor-parallel",
        ),
        (launch_yaml(made(), "0", has_tiles=False) + b"model: /etc\n", "model"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_in_one_sentence(data: bytes, words: str) -> None:
    with pytest.raises(DeployError) as refusal:
        launch_of(data, where="vllm.yaml")
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
