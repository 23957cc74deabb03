"""What is deployed of a configuration, as Serve would get it; nothing is started."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle as cloudpickle
from ray.serve._private.build_app import build_app
from support.configs import make_config
from support.vllm_builds import build_vllm_engine, make_vllm_artifact

from serve_app.app import build_with, engine_factory
from serve_app.config import EchoOptions, EmbeddedOptions, ServeConfig, VllmOptions
from serve_app.engines.echo import EchoEngine
from serve_app.replica.staged import EngineOf


def deployments(config: ServeConfig) -> dict[str, Any]:
    """What Serve makes of the application, by name."""
    app = build_with(config, lambda: EchoEngine(EchoOptions()))
    built = build_app(app, name="x", make_deployment_handle=lambda one, _: f"handle of {one.name}")
    return {one.name: one for one in built.deployments}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine for vLLM, of two ranks."""
    root = tmp_path_factory.mktemp("vllm")
    make_vllm_artifact(root, "int8")
    build_vllm_engine(root / "int8", root / "engine", tp=2)
    return root / "engine"


def pool(**more: Any) -> dict[str, Any]:
    return {"engine": {"kind": "echo"}, **more}


def test_each_pool_is_a_deployment_with_limits_of_its_own() -> None:
    scaled = {"autoscaling": {"min_replicas": 0, "max_replicas": 5}, "replicas": 2}
    config = make_config(
        echo=EchoOptions(),
        pools={
            "standard": pool(replicas=3, max_ongoing_requests=40, drain_s=7.0, cpus=2.0),
            "long": pool(**scaled, max_ongoing_requests=4, drain_s=90.0, surge_percent=50),
        },
    )
    made = deployments(config)
    assert set(made) == {"ingress", "engine-standard", "engine-long"}
    handles = {name: f"handle of engine-{name}" for name in ("standard", "long")}
    assert made["ingress"].init_args == (config, handles)
    standard, long = made["engine-standard"], made["engine-long"]
    assert standard.num_replicas == 3
    assert (standard.max_ongoing_requests, long.max_ongoing_requests) == (60, 20)
    assert standard.ray_actor_options["num_cpus"] == 2.0
    for one, pool_name, drain_s in ((standard, "standard", 7.0), (long, "long", 90.0)):
        assert one.init_kwargs["pool"] == pool_name
        assert one.init_kwargs["drain_s"] == drain_s
        config_of = one._deployment_config
        assert config_of.graceful_shutdown_timeout_s > drain_s
        routed = config_of.request_router_config.request_router_kwargs
        assert routed == {"deployment": f"engine-{pool_name}"}
    assert long._deployment_config.max_surge_percent == 50
    scaling = long._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (0, 2, 5)
    assert standard._deployment_config.autoscaling_config is None
    # The ingress outlives the longest drain of an engine.
    assert made["ingress"]._deployment_config.graceful_shutdown_timeout_s > (
        long._deployment_config.graceful_shutdown_timeout_s
    )


def test_a_replica_with_gpus_is_a_placement_group_and_its_constructor_fails_twice_at_most(
    vllm: Path,
) -> None:
    engine = {"kind": "vllm", "directory": str(vllm), "python": "/p", "staged": "/local/{node}"}
    given = {"engine": engine, "cpus": 2, "labels": {"hardware": "H800-80GB"}}
    config = ServeConfig.model_validate({"pools": {"default": given}})
    made = deployments(config)["engine-default"]
    replica = made._replica_config
    assert replica.ray_actor_options == {"num_cpus": 2.0, "num_gpus": 2.0}
    assert replica.placement_group_bundles == [{"GPU": 2.0, "CPU": 2.0}]
    assert replica.placement_group_strategy == "STRICT_PACK"
    assert replica.placement_group_bundle_label_selector == [{"hardware": "H800-80GB"}]
    assert made._deployment_config.max_constructor_retry_count == 2
    assert made.init_kwargs["staged"] == Path("/local/{node}")
    echo = deployments(make_config(echo=EchoOptions()))["engine-default"]
    assert echo._replica_config.placement_group_bundles is None
    assert echo._deployment_config.max_constructor_retry_count > 2


def test_what_makes_an_engine_knows_its_directory_and_travels_to_the_replica(vllm: Path) -> None:
    from serve_app.engines.embedded import EmbeddedEngine
    from serve_app.engines.remote.engine import RemoteEngine
    from serve_app.replica.spread import SpreadEngine

    def factory(engine: dict[str, Any], num_nodes: int = 1) -> Any:
        config = ServeConfig.model_validate({"pools": {"default": {"engine": engine}}})
        return cloudpickle.loads(cloudpickle.dumps(engine_factory(config.pool, num_nodes)))

    options = EmbeddedOptions(directory=Path("e"))
    made = factory({"kind": "embedded", "directory": "e"})
    assert isinstance(made, EngineOf)
    assert made.options == options
    engine = made()
    assert isinstance(engine, EmbeddedEngine)
    assert engine._cpus == 0.5
    remote = {"kind": "vllm", "directory": str(vllm), "python": "/p"}
    made = factory(remote)
    assert made.make is RemoteEngine
    assert isinstance(made.options, VllmOptions)
    assert made.options.tensor_parallel_size == 2, "as it was built"
    trtllm = factory({"kind": "trtllm", "directory": "d", "python": "/p"})
    assert trtllm.make is RemoteEngine
    spread = factory(remote | {"tensor_parallel_size": 16}, 2)
    assert isinstance(spread.make, partial)
    assert (spread.make.func, spread.make.keywords["count"]) == (SpreadEngine, 2)
