"""What is deployed of a configuration, as Serve would get it; nothing is started."""

from __future__ import annotations

from typing import Any

from ray.serve._private.build_app import build_app
from support.configs import make_config

from serve_app.app import build_with
from serve_app.config import EchoOptions, ServeConfig
from serve_app.engines.echo import EchoEngine


def deployments(config: ServeConfig) -> dict[str, Any]:
    """What Serve makes of the application, by name."""
    app = build_with(config, lambda: EchoEngine(EchoOptions()))
    built = build_app(app, name="x", make_deployment_handle=lambda one, _: f"handle of {one.name}")
    return {one.name: one for one in built.deployments}


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
