"""Serves on this machine: starts Ray, Serve and the application, drains and stops them again.

`python -m serve_app` and the benchmarks call it. A cluster runs `serve deploy` with
`serve_app.app:build` instead; this module refuses to touch a cluster where Serve already runs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any

from cluster.connect import connect
from deepseek.errors import DeployError
from serve_app.config import ServeConfig
from serve_app.load_watch import LoadWatch
from serve_app.proxy_environment import ProxyPlace, check_port, proxy_environment

__all__ = ["APP_NAME", "check_port", "drain", "serve_running", "serving"]

log = logging.getLogger(__name__)

APP_NAME = "intserve"

#: Seconds between two looks at what is still in flight, or at what starts.
_LOOK_S = 0.1
#: Seconds for an ingress to answer a call, and for clients to read that their requests end here.
_CALL_S = 5.0
_CUT_S = 3.0
#: Seconds for the proxies to be ready, as Serve itself gives them.
_PROXIES_S = 60
#: Seconds for the proxy to pass on the last bytes, which the ingress has already given away.
_PROXY_S = 0.5


@contextmanager
def serving(
    config: ServeConfig, *, report: Callable[[str], None] = lambda line: None
) -> Iterator[str]:
    """Start the service and give its URL once it is healthy. Leaving the context stops what was
    started; `drain` lets open streams end before. `report` gets lines that say how far engines are
    which take long to load.

    Raises:
        DeployError: as `serve_running`; or the engine did not start; says why.
    """
    with _serve_starting(config) as proxies_ready:
        with LoadWatch(_loading_replicas, report):
            _deploy(config, proxies_ready)
        http = config.http
        host = f"[{http.host}]" if ":" in http.host else http.host
        yield f"http://{host}:{http.port}/v1"


@contextmanager
def serve_running(config: ServeConfig, *, num_cpus: int | None = None) -> Iterator[None]:
    """Ray and Serve with the configured proxy, and no application; both are stopped at the end.
    `num_cpus` is for a Ray that is started here.

    Raises:
        DeployError: Serve runs on this cluster already, or Ray, Serve or its proxy did not start.
    """
    with _serve_starting(config, num_cpus=num_cpus) as proxies_ready:
        with _telling_why():
            proxies_ready()
        yield


@contextmanager
def _serve_starting(
    config: ServeConfig, *, num_cpus: int | None = None
) -> Iterator[Callable[[], None]]:
    """As `serve_running`, but its proxies may still be starting: what it gives waits for them, and
    raises what Serve raises where they do not start. An application may be deployed meanwhile."""
    with (
        proxy_environment(config, attached=_is_attached(), import_later=True) as place,
        connect(num_cpus=num_cpus, meanwhile=partial(_import, place)) as ray_connection,
        _quiet_serve(),
    ):
        import ray
        from ray import serve

        log.info(ray_connection.describe())
        status = serve.status()
        if status.applications or status.proxies:
            raise DeployError(
                "Serve already runs on this Ray cluster; deploy there with "
                "`serve deploy` and import_path serve_app.app:build"
            )
        node_id = ray.get_runtime_context().get_node_id()
        try:
            with _telling_why(), _not_awaiting_proxies() as ready:
                serve.start(
                    proxy_location="HeadOnly",
                    http_options={"host": place.serve_host, "port": config.http.port},
                    logging_config={"log_level": "WARNING", "enable_access_log": False},
                )
            yield partial(_await_proxies, ready)
        finally:
            # Serve 2.60 kills its controller while the controller still answers the call to shut
            # down; Ray prints that as a failure, on stdout.
            with redirect_stdout(io.StringIO()):
                serve.shutdown()
                ray_connection.close()
            place.clean(node_id)


def _import(place: ProxyPlace) -> None:
    """Import Serve and the application, which takes as long as Ray's processes do to answer."""
    place.import_serve()
    import serve_app.app  # noqa: F401


@contextmanager
def _not_awaiting_proxies() -> Iterator[list[Any]]:
    """`serve.start` within starts the proxies and does not wait for them; gives what to wait for.
    Serve 2.60 has no such option, and starting proxies and replicas in turn takes a second more."""
    from ray.serve._private import api

    create = api._create_controller_and_proxy_refs
    ready: list[Any] = []

    def create_only(*arguments: Any, **options: Any) -> tuple[Any, list[Any]]:
        controller, proxies = create(*arguments, **options)
        ready.extend(proxies)
        return controller, []

    api._create_controller_and_proxy_refs = create_only
    try:
        yield ready
    finally:
        api._create_controller_and_proxy_refs = create


def _await_proxies(ready: list[Any]) -> None:
    import ray

    try:
        ray.get(ready, timeout=_PROXIES_S)
    except ray.exceptions.GetTimeoutError:
        raise DeployError(f"Serve's proxies were not ready after {_PROXIES_S} s") from None


@contextmanager
def _quiet_serve() -> Iterator[None]:
    """What Serve says in this process is warnings only; afterwards its logger is as before."""
    import ray.serve  # noqa: F401 (its import sets the level)

    logger = logging.getLogger("ray.serve")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _is_attached() -> bool:
    """Whether the service will run on a Ray that was there before."""
    import ray

    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))


def drain(
    config: ServeConfig, *, hurried: Callable[[], bool], report: Callable[[str], None]
) -> bool:
    """Refuse newcomers and let what is in flight finish, for up to `shutdown_s` or until
    `hurried()`. What is left then is told so in-band. Call it inside `serving`. `report` gets one
    line at the start.

    Serve itself would take its proxy down at once, and the streams with it.

    Returns whether everything finished by itself.
    """
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    limit_s = config.shutdown_s
    end = time.monotonic() + limit_s
    try:
        in_flight = _ask_ingresses("drain")
        report(f"draining: {in_flight} requests in flight, up to {limit_s:g} seconds")
        while in_flight and time.monotonic() < end and not hurried():
            time.sleep(_LOOK_S)
            in_flight = _ask_ingresses("drain")
        finished = not in_flight
        if not finished:
            end = time.monotonic() + _CUT_S
            in_flight = _ask_ingresses("cut")
            while in_flight and time.monotonic() < end:
                time.sleep(_LOOK_S)
                in_flight = _ask_ingresses("drain")
        time.sleep(_PROXY_S)
        return finished
    except (RayError, RayServeException, TimeoutError) as error:
        report(f"cannot drain ({type(error).__name__}); stopping at once")
        return False


def _ask_ingresses(method: str) -> int:
    """Call a method of every ingress that gives its number of requests in flight; their sum."""
    from ray import serve

    from serve_app.routing.candidates import INGRESS

    handle: Any = serve.get_deployment_handle(INGRESS, APP_NAME)
    answers = handle.broadcast(method).results(timeout_s=_CALL_S, return_exceptions=True)
    return sum(answer for answer in answers if isinstance(answer, int))


def _loading_replicas() -> list[Any]:
    """The engine replicas that load, as the ingresses know; none while there is no ingress."""
    from ray import serve

    from serve_app.routing.candidates import INGRESS

    handle: Any = serve.get_deployment_handle(INGRESS, APP_NAME)
    answers = handle.broadcast("loading").results(timeout_s=_CALL_S, return_exceptions=True)
    return next((answer for answer in answers if isinstance(answer, list)), [])


def _deploy(config: ServeConfig, proxies_ready: Callable[[], None]) -> None:
    """Deploy the application, and wait until it answers. Its replicas start beside the proxies."""
    from ray import serve
    from ray.serve.context import _get_global_client

    from serve_app.app import build

    target = serve.RunTarget(target=build(config), name=APP_NAME, route_prefix="/")
    with _telling_why(), _looking_often():
        # What `serve.run` does in one call, which waits for the replicas before it looks at
        # proxies that may have failed.
        serve.run_many(
            [target],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        proxies_ready()
        client = _get_global_client()
        client._wait_for_application_running(APP_NAME)
        client.wait_for_proxies_serving()


@contextmanager
def _looking_often() -> Iterator[None]:
    """Serve 2.60 looks once a second whether an application runs, and offers no other interval."""
    from ray.serve._private import client

    before = client.CLIENT_POLLING_INTERVAL_S
    client.CLIENT_POLLING_INTERVAL_S = _LOOK_S
    try:
        yield
    finally:
        client.CLIENT_POLLING_INTERVAL_S = before


@contextmanager
def _telling_why() -> Iterator[None]:
    """Turn Serve's failures into a DeployError that gives the reason in one line."""
    from ray.exceptions import RayError

    try:
        yield
    except (RuntimeError, RayError) as error:
        messages: list[str] = []
        with contextlib.suppress(RuntimeError, RayError):
            messages = _deployment_messages()
        raise DeployError(f"the service did not start: {_reason(str(error), messages)}") from error


def _deployment_messages() -> list[str]:
    """What Serve says of each deployment; of one whose constructor failed, with the traceback."""
    from ray import serve

    application = serve.status().applications.get(APP_NAME)
    return [] if application is None else [d.message for d in application.deployments.values()]


#: The line of a traceback that names the exception; one whose text is a traceback says nothing.
_EXCEPTION = r"^(?:\w+\.)*(?:\w*Error|\w*Exception): (?!Traceback)(.+)$"


#: The first of HAProxy's complaints; the last ones only count them.
_ALERT = r"\[ALERT\]\s+\(\d+\) : (?:\[[^\]]*\] ?: ?)?(?:config : )?(.+)"


def _reason(message: str, deployment_messages: Sequence[str]) -> str:
    """What HAProxy says against its start; else the last exception line of a traceback in Serve's
    message, else in a deployment's; without any traceback, the last line of Serve's message."""
    if "HAProxy crashed" in message and (alert := re.search(_ALERT, message)):
        return f"HAProxy: {alert[1].strip()}"
    for text in (message, *deployment_messages):
        exceptions = re.findall(_EXCEPTION, text, re.MULTILINE)
        if exceptions:
            return str(exceptions[-1])
    return message.strip().splitlines()[-1]
