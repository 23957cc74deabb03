"""What operators and their machines ask: is it up, which version, what is it doing.

    GET, HEAD /health    200 or 503; recipe, digest and replicas for those who may see details
    GET, POST /ping      the same for platforms that call it so (SageMaker, vLLM's clients)
    GET, HEAD /live      200 while this ingress answers, whatever the engines do
    GET /version         details
    GET /metrics         details: Prometheus text

/health and /ping say whether a request would find an engine; while engines load they are a 503
that says how far those are. Nothing needs to be restarted then: that is what /live is for.

Details are for clients with a key, and by default for clients on this machine
(`http.details_access`). Without any key configured they are for everybody. routes.py adds
these endpoints to the application.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from deepseek import __version__
from serve_app.engines.protocol import ReplicaStatus
from serve_app.errors import ApiError, EngineUnavailable
from serve_app.openai.pool_details import describe_engines, describe_loading
from serve_app.openai.service import Service
from serve_app.routing.admission_client import AdmissionClient
from serve_app.routing.admission_stats import PoolStats
from serve_app.routing.keys import is_loopback
from serve_app.telemetry.metrics import AdmissionGauges, render

log = logging.getLogger("ray.serve")

#: Gives the metrics text of every ingress by its id.
Snapshots = Callable[[], Awaitable[dict[str, str]]]

#: Seconds that a scrape waits for the owner of admission.
_OWNER_S = 2.0
_BREAKERS = {"open": 1.0, "half_open": 0.5}


def check_details(service: Service, request: Request) -> None:
    """Raises Unauthorized or TooManyFailedKeys unless the client may see details."""
    access = service.config.http.details_access
    if access == "open" or (access == "loopback" and _is_local(service, request)):
        return
    service.check_key(request)


def add_operations(app: FastAPI, service: Service, snapshots: Snapshots | None) -> None:
    """Add the endpoints. `snapshots` None means that this ingress is alone."""

    async def health(request: Request) -> Response:
        told: dict[str, Any] = {"status": "ok"}
        down: EngineUnavailable | None = None
        ready: list[ReplicaStatus] = []
        try:
            ready = await service.engines.statuses()
        except EngineUnavailable as error:
            down, told = error, error.body()
        try:
            check_details(service, request)
        except ApiError:
            return _health(told, down)
        told |= _not_ready(service)
        if down is not None:
            return _health(told, down)
        order = list(service.config.pools)
        ready.sort(key=lambda s: order.index(s.pool) if s.pool in order else len(order))
        info = ready[0].info
        told |= {
            "engine_replicas": len(ready),
            "engine": info.engine,
            "recipe": info.recipe,
            "artifact_digest": info.artifact_digest,
            "engine_digest": info.engine_digest,
            "kv_cache": info.kv_cache,
            "gated": all(status.gated for status in ready),
            "emulated": any(status.emulated for status in ready),
            "max_model_len": info.max_model_len,
            "pools": describe_engines(
                service.config, await service.engines.infos(wait=False), ready
            ),
        }
        if isinstance(service.admission, AdmissionClient):
            told["admission"] = service.admission.describe()
        return _health(told, None)

    async def ping() -> Response:
        await service.engines.statuses()
        return JSONResponse({"status": "ok"})

    async def live() -> Response:
        return JSONResponse({"status": "ok"})

    async def tell_version(request: Request) -> Response:
        check_details(service, request)
        return JSONResponse({"version": __version__})

    async def metrics(request: Request) -> Response:
        check_details(service, request)
        try:
            replicas = await service.engines.statuses()
        except EngineUnavailable:
            replicas = []  # the request metrics are still worth a scrape
        texts = await snapshots() if snapshots else {"0": service.metrics.snapshot()}
        gauges = await _admission_gauges(service)
        text = render(texts, replicas, gauges, service.loading.reports())
        return Response(text, media_type="text/plain; version=0.0.4")

    app.add_api_route("/health", health, methods=["GET", "HEAD"])
    app.add_api_route("/ping", ping, methods=["GET", "HEAD", "POST"])
    app.add_api_route("/live", live, methods=["GET", "HEAD"])
    app.add_api_route("/version", tell_version, methods=["GET"])
    app.add_api_route("/metrics", metrics, methods=["GET"])


def _health(told: dict[str, Any], down: EngineUnavailable | None) -> Response:
    if down is None:
        return JSONResponse(told)
    return JSONResponse(told, down.status, down.headers())


def _not_ready(service: Service) -> dict[str, Any]:
    """The replicas that load, and why the last one of a pool gave up; nothing where all is well."""
    told: dict[str, Any] = {}
    if reports := service.loading.reports():
        told["loading"] = [describe_loading(report) for report in reports]
    if service.loading.failures:
        told["load_failures"] = dict(service.loading.failures)
    return told


async def _admission_gauges(service: Service) -> AdmissionGauges | None:
    """What the owner of admission says of itself, None while it does not answer."""
    if service.admission_stats is None:
        return None
    try:
        async with asyncio.timeout(_OWNER_S):
            stats = await service.admission_stats()
    except Exception as error:
        log.debug("the owner of admission tells no metrics: %s", error)
        return None
    sequences, kv_tokens = Counter[int](), Counter[int]()
    for queued in stats.queued:
        sequences[queued.priority] += queued.sequences
        kv_tokens[queued.priority] += queued.kv_tokens
    return AdmissionGauges(
        sequences=sequences,
        kv_tokens=kv_tokens,
        oldest_wait_s=stats.oldest_wait_s,
        drain_tokens_per_s=stats.drain_tokens_per_s,
        pools={pool.pool: _pool_gauges(pool) for pool in stats.pools},
        breakers={use.replica_id: _BREAKERS.get(use.breaker, 0.0) for use in stats.replicas},
    )


def _pool_gauges(pool: PoolStats) -> dict[str, float | None]:
    return {
        "replicas_ready": pool.ready,
        "waiting_sequences": pool.waiting,
        "waiting_kv_tokens": pool.waiting_tokens,
        "oldest_wait_seconds": pool.oldest_wait_s,
        "running_sequences": pool.running,
        "kv_share": pool.kv_share,
        "places_share": pool.places_share,
        "ttft_p90_seconds": pool.ttft_p90_s,
        "itl_p90_seconds": pool.itl_p90_s,
    }


def _is_local(service: Service, request: Request) -> bool:
    """Whether the client is a program on this machine that addressed it as such.

    The `Host` must name this machine too: a web page whose name was made to point here (DNS
    rebinding) comes from the loopback address, but under its own name.
    """
    if not is_loopback(service.client_host(request)):
        return False
    host = request.headers.get("host", "").lower()
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
