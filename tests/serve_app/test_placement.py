"""GPUs, nodes and the plan's verdict, from a configuration and a table of nodes; without Ray."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from support.configs import make_config
from support.trtllm_builds import build, make_buildable
from support.vllm_builds import build_vllm_engine, make_vllm_artifact

from cluster.reservation import Holder, NodeRoom
from deepseek.artifact.engine_manifest import (
    EnginePlan,
    RankLayout,
    read_engine_manifest,
    write_engine_manifest,
)
from deepseek.errors import ConfigError, DeployError
from serve_app.config import ServeConfig
from serve_app.placement import check_python, check_room, released, reserved

H800 = {"hardware": "H800-80GB"}

pytestmark = pytest.mark.heavy  # two small models are built


@pytest.fixture(scope="module")
def trtllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine for TensorRT-LLM, of four ranks."""
    root = tmp_path_factory.mktemp("trtllm")
    make_buildable(root, "w4a8")
    build(root / "artifact", root / "engine")
    return root / "engine"


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine for vLLM, of two ranks."""
    root = tmp_path_factory.mktemp("vllm")
    make_vllm_artifact(root, "int8")
    build_vllm_engine(root / "int8", root / "engine", tp=2)
    return root / "engine"


def config(kind: str, directory: Path, engine: dict[str, Any] | None = None, **pool: Any) -> Any:
    section = {"kind": kind, "directory": str(directory), "python": "/x/python", **(engine or {})}
    given = {"engine": section, **pool}
    return ServeConfig.model_validate({"pools": {"default": given}})


def need(given: ServeConfig) -> Any:
    return reserved("default", given.pool)


def node(name: str, gpus: float = 8, free: float | None = None, **labels: str) -> NodeRoom:
    total = {"GPU": gpus, "CPU": 64.0}
    return NodeRoom(
        name, "10.0.0.1", labels, total, total | ({} if free is None else {"GPU": free})
    )


def with_ranks(directory: Path, ranks: int, target: Path) -> Path:
    """A directory whose engine.json, which is all of it, says another number of ranks."""
    manifest = read_engine_manifest(directory)
    weights = sum(manifest.plan.rank_weight_bytes) // ranks
    target.mkdir()
    changed = {
        "ranks": RankLayout(tp=ranks, ep=1),
        "plan": EnginePlan(rank_weight_bytes=(weights,) * ranks),
    }
    write_engine_manifest(target, manifest.model_copy(update=changed))
    return target


def test_a_replica_of_tensorrt_llm_reserves_a_gpu_for_each_rank_on_one_node(trtllm: Path) -> None:
    found = need(config("trtllm", trtllm, cpus=4, labels=H800))
    assert found.deployment_options({"num_cpus": 4.0}) == {
        "ray_actor_options": {"num_cpus": 4.0, "num_gpus": 4.0},
        "placement_group_bundles": [{"GPU": 4.0, "CPU": 4.0}],
        "placement_group_strategy": "STRICT_PACK",
        "placement_group_bundle_label_selector": [H800],
    }
    bare = need(config("trtllm", trtllm, cpus=0)).deployment_options({"num_cpus": 0})
    assert bare["placement_group_bundles"] == [{"GPU": 4.0}]
    assert "placement_group_bundle_label_selector" not in bare


def test_an_engine_without_gpus_is_an_actor_alone_and_may_want_a_label(trtllm: Path) -> None:
    echo = {"engine": {"kind": "echo"}, "labels": {"disk": "fast"}}
    found = need(ServeConfig.model_validate({"pools": {"default": echo}}))
    options = found.deployment_options({"num_cpus": 0.5})
    expected = {"num_cpus": 0.5, "label_selector": {"disk": "fast"}}
    assert options == {"ray_actor_options": expected}
    without = need(config("trtllm", trtllm, gpus=0)).deployment_options({"num_cpus": 0.5})
    assert without == {"ray_actor_options": {"num_cpus": 0.5}}


def test_vllm_has_as_many_ranks_as_it_was_built_for_or_is_told(vllm: Path) -> None:
    assert need(config("vllm", vllm)).gpus == 2
    assert need(config("vllm", vllm, {"tensor_parallel_size": 4})).gpus == 4
    assert need(config("vllm", vllm, {"pipeline_parallel_size": 2})).gpus == 4
    assert need(config("vllm", vllm, {"cpu": True})).gpus == 0


def test_vllm_over_two_nodes_has_a_bundle_on_each_and_tensorrt_llm_none(
    trtllm: Path, vllm: Path, tmp_path: Path
) -> None:
    found = need(config("vllm", vllm, {"tensor_parallel_size": 16}, cpus=2, labels=H800))
    options = found.deployment_options({"num_cpus": 2.0})
    assert options["placement_group_bundles"] == [{"GPU": 8.0, "CPU": 2.0}] * 2
    assert options["placement_group_strategy"] == "STRICT_SPREAD"
    assert options["placement_group_bundle_label_selector"] == [H800, H800]
    assert options["ray_actor_options"]["num_gpus"] == 8.0
    large = with_ranks(trtllm, 16, tmp_path / "sixteen")
    with pytest.raises(DeployError) as caught:
        need(config("trtllm", large))
    told = str(caught.value)
    assert told.startswith(
        f"pools.default.engine: {large} was built for 16 ranks, and a replica of TensorRT-LLM runs "
        "on one node of at most 8 GPUs: its ranks talk by MPI, which is not carried over nodes"
    )
    assert "The cost: no recipe that one node cannot hold, as INT8 on 8 x 80 GB" in told
    assert told.endswith("build for vllm, whose replicas may have several nodes")


@pytest.mark.parametrize(
    ("engine", "pool", "says"),
    [
        ({}, {"gpus": 8}, "pools.default.gpus is 8, and the engine in {} has 2 ranks, each on a G"),
        ({"cpu": True}, {"gpus": 2}, "pools.default.gpus is 2, and engine.cpu says that its envi"),
        ({"tensor_parallel_size": 12}, {}, "pools.default: 12 GPUs are neither part of one node"),
        (
            {"tensor_parallel_size": 16, "staged": "/local/engine"},
            {},
            "pools.default.engine.staged is for replicas on one node, and these have 2; remove it",
        ),
    ],
)
def test_a_number_of_gpus_that_cannot_be_is_refused(
    engine: dict[str, Any], pool: dict[str, Any], says: str, vllm: Path
) -> None:
    with pytest.raises(DeployError) as caught:
        need(config("vllm", vllm, engine, **pool))
    assert str(caught.value).startswith(says.format(vllm))


def test_the_python_of_an_engine_is_looked_for_before_anything_starts(
    trtllm: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_python("default", config("trtllm", trtllm).pool.engine)
    assert str(caught.value) == (
        "pools.default.engine.python: /x/python is no program here; make the engine's environment "
        "with `make engine-env TARGET=trtllm`, which prints its Python"
    )
    python = tmp_path / "python"
    python.touch(mode=0o755)
    check_python("default", config("trtllm", trtllm, {"python": str(python)}).pool.engine)


def test_room_is_checked_with_labels_and_holders(trtllm: Path) -> None:
    given = config("trtllm", trtllm, labels=H800, replicas=2)
    check_room(given, [node("n1", **H800)], [])
    with pytest.raises(DeployError, match="no node of the cluster is labeled hardware=H800-80GB"):
        check_room(given, [node("n1", hardware="H20-96GB")], [])
    held = Holder("n1", "actor Trainer", {"GPU": 4.0})
    with pytest.raises(DeployError, match=r"needs 8 GPUs .*actor Trainer holds 4 GPUs on node n1"):
        check_room(given, [node("n1", free=4, **H800)], [held])
    # What an update replaces is free for what replaces it.
    check_room(given, [released(node("n1", free=4, **H800), [held])], [])


def test_a_service_without_gpus_asks_for_no_room(trtllm: Path) -> None:
    check_room(make_config(engine=trtllm), [], [])


def test_the_plans_verdict_is_checked_for_the_nodes_that_are_there(trtllm: Path) -> None:
    with pytest.raises(DeployError) as caught:
        check_room(config("trtllm", trtllm), [node("n1", hardware="A100-80GB")], [])
    told = str(caught.value)
    assert told.startswith(f"pool default: {trtllm} on 4xA100-80GB (pools.default.labels none): ")
    assert "trtllm cannot load" in told


def test_nodes_that_do_not_say_what_they_are_are_no_error(
    trtllm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_room(config("trtllm", trtllm), [node("n1")], [])
    assert "pool default: no node says what GPUs it has" in caplog.text


def test_heads_that_ranks_cannot_share_are_told_by_their_key(vllm: Path) -> None:
    given = config("vllm", vllm, {"tensor_parallel_size": 8})
    with pytest.raises(DeployError, match=r"pools.default.engine.tensor_parallel_size: 4 attent"):
        check_room(given, [node("n1", **H800)], [])


def test_a_pool_that_may_outgrow_the_cluster_starts_with_a_warning(
    trtllm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="ray.serve")
    scaled = {"min_replicas": 1, "max_replicas": 3}
    check_room(config("trtllm", trtllm, autoscaling=scaled), [node("n1", **H800)], [])
    assert "as many replicas as autoscaling.max_replicas: pool default needs 12 GPUs" in caplog.text
    caplog.clear()
    two = config("trtllm", trtllm, replicas=2, surge_percent=10)
    check_room(two, [node("n1", **H800)], [])
    assert "an update with this surge_percent would not end: pool default needs 12" in caplog.text
