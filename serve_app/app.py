"""Builds the Serve application from a ServeConfig: the ingress, and a deployment for each pool.

Serve calls `build` for a `serve deploy` file with `import_path: serve_app.app:build`
(examples/serve/fleet.yaml). `python -m serve_app` calls it through local.py. It only describes the
deployments; engines are made, and gates checked, inside the replicas.
"""

# No `from __future__ import annotations` here: Serve reads the class in `build`'s annotation to
# turn a deploy file's `args` into a ServeConfig, and does not resolve a string.

from collections.abc import Mapping
from functools import partial
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from cluster.connect import check_cluster, is_own_ray
from deepseek.artifact.engine_manifest import read_engine_manifest
from serve_app.autoscaling.serve_policy import autoscaling_options
from serve_app.config import (
    EchoOptions,
    EmbeddedOptions,
    PoolSection,
    ServeConfig,
    VllmOptions,
)
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Engine
from serve_app.openai.ingress import Ingress
from serve_app.placement import check_this_cluster, reserved, tensor_ranks
from serve_app.replica.replica import EngineFactory, EngineReplica
from serve_app.replica.staged import EngineOf
from serve_app.routing.candidates import INGRESS, engine_deployment
from serve_app.routing.router import ByTicket
from serve_app.telemetry.travel import traveling_variables

#: The ingress never queues: it must stay free to answer 429. Serve's own cap is a last resort.
_INGRESS_MAX_ONGOING = 4096

#: Seconds beyond `drain_s` for an engine replica to notice that it stops, and to end the streams
#: that are left.
_STOP_S = 5.0

#: Constructors of an engine on GPUs that may fail before the service counts as failed.
_HEAVY_TRIES = 2

#: Serve's access log repeats for every request what the metrics count.
_LOGGING = {"enable_access_log": False}

#: Seconds that an ingress outlives the engines that Serve stops together with it.
_TELL_CLIENTS_S = 5.0


def engine_factory(pool: PoolSection, num_nodes: int = 1) -> EngineFactory:
    """The function that makes a replica's engine; it is pickled, and called in the replica. An
    engine of `num_nodes` has as many bundles of a placement group.

    Raises:
        ArtifactError: vLLM's number of ranks is that of a directory which is no engine.
    """
    options = pool.engine
    if isinstance(options, EchoOptions):
        return partial(EchoEngine, options)
    if isinstance(options, EmbeddedOptions):
        return EngineOf(partial(_embedded, cpus=pool.cpus), options)
    from serve_app.engines.remote.engine import RemoteEngine

    if isinstance(options, VllmOptions):
        ranks = tensor_ranks(options, read_engine_manifest(options.directory))
        options = options.model_copy(update={"tensor_parallel_size": ranks})
        if num_nodes > 1:
            from serve_app.replica.spread import SpreadEngine, node_address, ray_nodes

            spread = partial(SpreadEngine, count=num_nodes, address=node_address, others=ray_nodes)
            return EngineOf(spread, options)
    return EngineOf(RemoteEngine, options)


def _embedded(options: EmbeddedOptions, *, cpus: float) -> Engine:
    """Imports the engine in the replica: torch takes seconds, and who deploys needs none."""
    from serve_app.engines.embedded import EmbeddedEngine

    return EmbeddedEngine(options, cpus=cpus)


def build(config: ServeConfig) -> Application:
    """The application of one configuration; Serve parses the `args` of a deploy file into it. Where
    it replaces one that runs, what that one's replicas hold counts as free.

    Raises:
        ArtifactError, DeployError: the cluster has several nodes and asks nobody for a token, or
            its nodes have no room for the replicas (placement.py).
    """
    check_cluster()
    check_this_cluster(config)
    factories = {
        name: engine_factory(pool, reserved(name, pool).num_nodes)
        for name, pool in config.pools.items()
    }
    return _build(config, factories)


def build_with(config: ServeConfig, make_engine: EngineFactory) -> Application:
    """`build` with engines of the caller's in every pool; tests pass one that fails on purpose. An
    engine directory in `config` must be gated, whatever `make_engine` makes."""
    return _build(config, dict.fromkeys(config.pools, make_engine))


def _build(config: ServeConfig, factories: Mapping[str, EngineFactory]) -> Application:
    variables = traveling_variables(config.telemetry.otlp_headers_file, inherited=is_own_ray())
    pools = config.pools.values()
    drain_s = config.longest_drain_s
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        num_replicas=config.ingress.replicas,
        user_config=config.live.model_dump(mode="json"),
        max_ongoing_requests=_INGRESS_MAX_ONGOING,
        ray_actor_options=_actor_options(config.ingress.cpus, variables),
        # An update starts the new ingress before the old one drains: there is always one to ask.
        max_surge_percent=100,
        # Where both stop, engines go first: their ingresses then tell the clients that are left.
        graceful_shutdown_timeout_s=drain_s + _STOP_S + _TELL_CLIENTS_S,
        graceful_shutdown_wait_loop_s=min(0.2, drain_s),
        health_check_period_s=min(pool.health_check_period_s for pool in pools),
        health_check_timeout_s=max(pool.health_check_timeout_s for pool in pools),
        logging_config=_LOGGING,
    )
    engines = {name: _engines(name, config, factories[name], variables) for name in config.pools}
    app: Application = ingress.bind(config, engines)
    return app


def _engines(
    name: str, config: ServeConfig, make_engine: EngineFactory, variables: dict[str, str]
) -> Application:
    """The engine replicas of one pool."""
    pool, deployment = config.pools[name], engine_deployment(name)
    need = reserved(name, pool)
    drain_s = config.drain_s(pool)
    engine = serve.deployment(
        EngineReplica,
        name=deployment,
        **_autoscaling(name, pool),
        # The owner of admission counts places and queues. Serve counts a request a moment longer,
        # and must neither queue nor refuse one that has a place.
        max_ongoing_requests=pool.max_ongoing_requests + _places_to_spare(pool),
        max_queued_requests=_INGRESS_MAX_ONGOING,
        request_router_config=RequestRouterConfig(
            request_router_class=ByTicket, request_router_kwargs={"deployment": deployment}
        ),
        **need.deployment_options(_actor_options(pool.cpus, variables)),
        # A load of minutes that failed is tried once more, not twice for each replica.
        **({"max_constructor_retry_count": _HEAVY_TRIES} if need.gpus else {}),
        # A deploy file may say more or less here, over what the replica gets below (live.py).
        user_config=pool.replica_limits.model_dump(),
        max_surge_percent=pool.surge_percent,
        graceful_shutdown_timeout_s=drain_s + _STOP_S,
        graceful_shutdown_wait_loop_s=min(0.2, drain_s),
        health_check_period_s=pool.health_check_period_s,
        health_check_timeout_s=pool.health_check_timeout_s,
        logging_config=_LOGGING,
    )
    replicas: Application = engine.bind(
        make_engine,
        pool.directory,
        served_name=config.served_name,
        kv_cache=pool.kv_cache,
        allow_ungated=pool.gate.allow_ungated,
        require_signature=pool.gate.require_signature,
        staged=pool.staged,
        max_step_s=pool.max_step_s,
        drain_s=drain_s,
        limits=pool.replica_limits,
        pool=name,
    )
    return replicas


def _autoscaling(pool_name: str, pool: PoolSection) -> dict[str, Any]:
    """The options of a pool's deployment that say how many replicas it has."""
    if pool.autoscaling is None:
        return {"num_replicas": pool.replicas}
    return autoscaling_options(
        pool_name,
        pool.autoscaling,
        initial_replicas=pool.replicas,
        places=pool.max_ongoing_requests,
    )


def _places_to_spare(pool: PoolSection) -> int:
    return max(16, pool.max_ongoing_requests // 2)


def _actor_options(num_cpus: float, variables: dict[str, str]) -> dict[str, Any]:
    """Resources, and variables that a worker of a cluster that runs already would otherwise lack;
    Ray shows them to all who use the cluster."""
    options: dict[str, Any] = {"num_cpus": num_cpus}
    if variables:
        options["runtime_env"] = {"env_vars": variables}
    return options
