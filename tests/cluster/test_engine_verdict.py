"""What the plan says of a built engine on the machines that a node's labels name."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.engine_verdict import hardware_of, plan_engine, verdict
from cluster.hardware import GPUS
from deepseek.artifact.built_engine import BuiltEngine
from deepseek.artifact.engine_manifest import UNQUANTIZED
from deepseek.models import DEEPSEEK_V3

#: DeepSeek-V3 as it was released, built for TensorRT-LLM: 671 GB.
RELEASED = BuiltEngine(
    directory=Path("/data/v3"),
    digest="d",
    target="trtllm",
    artifact_digest="a",
    source_fingerprint="f",
    recipe=UNQUANTIZED,
    kv_cache="bf16",
    num_bytes=0,
    config=DEEPSEEK_V3,
    schemes={},
    manifest=None,
    documents={},
)


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        ({"hardware": "H800-80GB"}, "H800-80GB"),
        ({"hardware": "h20-96gb", "ray.io/accelerator-type": "H100"}, "H20-96GB"),
        ({"hardware": "rack 7", "ray.io/accelerator-type": "H100"}, "H100-80GB"),
        ({"ray.io/accelerator-type": "H200"}, "H200-141GB"),
        ({"ray.io/accelerator-type": "H20"}, None),  # with 96 or 141 GB
        ({"ray.io/accelerator-type": "B300"}, None),
        ({}, None),
    ],
)
def test_a_nodes_labels_name_its_gpus_or_nobody_guesses(
    labels: dict[str, str], name: str | None
) -> None:
    found = hardware_of(labels)
    assert (found and found.name) == name


@pytest.mark.heavy
def test_an_engine_is_refused_where_it_does_not_fit_or_does_not_load() -> None:
    told = verdict(plan_engine(RELEASED, GPUS["H800-80GB"], 8, context=4096), "hardware=H800-80GB")
    assert told is not None
    assert told.startswith("8xH800-80GB (hardware=H800-80GB): one request of 4096 tokens needs ")
    assert "and 78.7 GB can be used; 16xH800-80GB would hold it: lower max_model_len" in told
    assert verdict(plan_engine(RELEASED, GPUS["H200-141GB"], 8, context=4096), "x") is None
    assert verdict(plan_engine(RELEASED, GPUS["H20-96GB"], 16), "x") is None
    told = verdict(plan_engine(RELEASED, GPUS["A100-80GB"], 16), "x")
    assert told is not None
    assert "trtllm cannot load" in told


def test_a_context_beyond_the_model_is_planned_as_the_models() -> None:
    plan = plan_engine(RELEASED, GPUS["H200-141GB"], 8, context=10**9)
    assert plan.context == DEEPSEEK_V3.max_position_embeddings
