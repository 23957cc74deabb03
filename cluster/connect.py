"""Connects a job or the server to a Ray cluster, and says where on it their actors are placed.

A running cluster (`ray start`, `ray up`, KubeRay, `ray job submit`) is used and left running.
Without one, a local Ray is started on this machine, for this process alone: it listens on the
loopback address only, wants a token of its own (access.py), and is stopped by who started it:

    with connect(num_cpus=4) as ray_connection:
        log(ray_connection.describe())

Placement is two pure functions that return bundles; the caller reserves them. This is no deployment
tool: `cluster.yaml` and `manifests/` start machines.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from cluster.access import LocalToken, check_welcome, private_folder, refuse_open_cluster
from deepseek.errors import DeployError, first_line

#: How long a Ray head may take to accept a connection.
PROBE_TIMEOUT_S = 10.0


class RayConnection:
    """A connection to Ray. `started` says whether `connect` started that Ray; closing stops it."""

    def __init__(
        self, address: str, *, started: bool, attached: bool, token: LocalToken | None = None
    ) -> None:
        self.address = address
        self.started = started
        self._attached = attached
        self._token = token

    def describe(self) -> str:
        """One line for the log: the address, and whether the Ray was started here."""
        if self.started:
            return f"started a local Ray at {self.address}"
        return f"using the Ray at {self.address}"

    def close(self) -> None:
        """Disconnect, and stop the Ray if `connect` started it. A process that was connected before
        `connect` stays connected. Closing twice does nothing."""
        import ray

        if self._attached:
            self._attached = False
            ray.shutdown()
            if self._token is not None:
                self._token.withdraw()

    def __enter__(self) -> RayConnection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def connect(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    include_dashboard: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> RayConnection:
    """Connect to `address` or $RAY_ADDRESS; without either, start a Ray on this machine.

    A process that is connected already keeps its connection. `num_cpus` (default: all) and
    `include_dashboard` (the job server) apply only to a Ray that is started here. A Ray that runs
    on this machine is not used unless it is named, so that a command does the same whatever was
    left running. A Ray that is named is used with the user's token; one that is started here has
    its own, which is in the environment of this process and its children until `close`.

    `meanwhile` is called once: in a thread while a local Ray starts, whose processes have their
    environment by then, or else before it connects. What it imports must be what `ray.init` does
    not. Its errors are raised here.

    Raises:
        DeployError: nothing answers at the address, it has several nodes and asks for no token, or
            the user's token is unusable; or a local Ray cannot start.
    """
    # Ray reads these once, when it is imported: no usage reports, and CPU actors see no GPU
    # warnings on hosts without one.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        meanwhile()
        return RayConnection(_current_address(), started=False, attached=False)
    address = address or os.environ.get("RAY_ADDRESS") or None
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None or address == "local":
        # A raylet adds 15 to the niceness of its workers unless its environment says otherwise. On
        # a shared machine the job would then get only the CPU time that others leave.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # A raylet that finds its own object store not listening yet looks again after a second.
        os.environ.setdefault("RAY_raylet_client_connect_timeout_milliseconds", "20")
        os.environ.setdefault("RAY_raylet_client_num_connect_attempts", "500")
        folder = private_folder()
        token = LocalToken(folder)
        try:
            with (
                _same_sigterm(),
                _on_loopback(),
                _without_unused(include_dashboard),
                _beside_the_start(meanwhile),
            ):
                ray.init(
                    "local",
                    num_cpus=num_cpus,
                    include_dashboard=include_dashboard,
                    # Of this folder Ray opens the mode to all; the one around it stays closed.
                    _temp_dir=str(folder / "ray"),
                    **quiet,
                )
        except BaseException as error:
            ray.shutdown()  # it may have started, and `meanwhile` failed
            token.withdraw()
            if isinstance(error, Exception) and not isinstance(error, DeployError):
                # Ray raises that itself when its node is late
                raise DeployError(f"a local Ray did not start: {first_line(error)}") from error
            raise
        return RayConnection(_current_address(), started=True, attached=True, token=token)
    meanwhile()
    _probe(address)
    if address != "auto":
        check_welcome(address)
    try:
        with _same_sigterm():
            ray.init(address, **quiet)
    except (RuntimeError, OSError, ValueError) as error:
        raise _unreachable(address, first_line(error)) from error
    ray_connection = RayConnection(_current_address(), started=False, attached=True)
    try:
        refuse_open_cluster(address if address != "auto" else ray_connection.address)
    except BaseException:
        ray_connection.close()
        raise
    return ray_connection


def is_own_ray() -> bool:
    """Whether this process started the Ray that it uses, whose workers inherit its environment."""
    import ray

    node = ray._private.worker._global_node  # None for Ray Client
    return bool(ray.is_initialized() and node is not None and node.head)


def check_cluster() -> None:
    """Refuse the cluster that this process is connected to, if it is, in the way of `connect`: for
    code that Ray itself runs, as `serve deploy` does.

    Raises:
        DeployError: it has several nodes and asks for no token.
    """
    import ray

    if ray.is_initialized() and not is_own_ray():
        refuse_open_cluster(_current_address())


@contextlib.contextmanager
def _same_sigterm() -> Iterator[None]:
    """Leave the process's handler of SIGTERM as it was: `ray.init` puts one in its place that ends
    the process with exit code 15."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray started within gives its node the address 127.0.0.1, and its servers then listen there
    alone. On Linux it takes the host's outward address and listens on all interfaces otherwise,
    also when it is told `_node_ip_address`; on macOS and Windows this is what it does by itself."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


#: The methods of Ray's node that start what nobody asks on one machine: the autoscaler of a
#: cluster, the reader of logs for `log_to_driver`, and the API server, for whose start `ray.init`
#: waits a second though it serves no page.
_UNUSED = ("start_monitor", "start_log_monitor", "start_api_server")


@contextlib.contextmanager
def _without_unused(include_dashboard: bool) -> Iterator[None]:
    """Ray started within has its head, its raylet and the agents of that, and no further process;
    with a dashboard it has all."""
    from ray._private.node import Node

    before = {name: getattr(Node, name) for name in (() if include_dashboard else _UNUSED)}
    for name in before:
        setattr(Node, name, lambda node, **options: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


@contextlib.contextmanager
def _beside_the_start(work: Callable[[], None]) -> Iterator[None]:
    """Call `work` in a thread as soon as the processes of the Ray that starts within are launched:
    they take a second or two to answer. It has ended when this does; what it raises is raised."""
    from ray._private.node import Node

    launch = Node.start_ray_processes
    running: list[Future[None]] = []

    with ThreadPoolExecutor(1, thread_name_prefix="beside-ray") as pool:

        def launch_and_work(node: Node) -> None:
            launch(node)
            running.append(pool.submit(work))

        Node.start_ray_processes = launch_and_work
        try:
            yield
        finally:
            Node.start_ray_processes = launch
    for future in running:
        future.result()


def _probe(address: str) -> None:
    """Open a TCP connection to the head, because Ray itself would retry for minutes.

    Raises:
        DeployError: the address is malformed, or nothing accepts a connection there.
    """
    if address == "auto":
        return
    match = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d{1,5})", address)
    if not match:
        raise _unreachable(address, "it is not HOST:PORT of a Ray head")
    try:
        socket.create_connection((match[1], int(match[2])), timeout=PROBE_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, first_line(error)) from error


def _unreachable(address: str, reason: str) -> DeployError:
    return DeployError(
        f"no Ray answers at {address!r} ({reason}); correct --address or RAY_ADDRESS, or unset it "
        "to start a Ray on this machine"
    )


def _current_address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)
