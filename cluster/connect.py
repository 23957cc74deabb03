"""How a job or the server gets a Ray, and where on it their actors go.

A Ray that somebody else runs (`ray start`, `ray up`, KubeRay, `ray job submit`) is used and left
running; where there is none, one is started on this machine and stopped by whoever started it:

    with connect(num_cpus=4) as ray_connection:
        log(ray_connection.describe())

Placement is two pure functions that return bundles; nothing is reserved here. Not a deployment
tool: `cluster.yaml` and `manifests/` bring machines up.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from cluster.hardware import GPUS_PER_NODE
from deepseek.errors import DeployError

#: How long a Ray head may take to accept a connection.
PROBE_TIMEOUT_S = 10.0

Strategy = Literal["SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


class RayConnection:
    """A connected Ray. `started` says whether closing it stops a Ray of our own."""

    def __init__(self, address: str, *, started: bool, attached: bool) -> None:
        self.address = address
        self.started = started
        self._attached = attached

    def describe(self) -> str:
        """One line for the log: which Ray this is."""
        if self.started:
            return f"started a local Ray at {self.address}"
        return f"using the Ray at {self.address}"

    def close(self) -> None:
        """Stop what `connect` started: a local Ray, or our own attachment to a foreign one. A Ray
        that was connected before stays so. Closing twice does nothing."""
        import ray

        if self._attached:
            self._attached = False
            ray.shutdown()

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
) -> RayConnection:
    """Attach to `address` or $RAY_ADDRESS; without either, start a Ray on this machine.

    A process that is connected already keeps its connection. `num_cpus` (default: all) and
    `include_dashboard` (the job server) shape only a Ray that is started here. A Ray that happens
    to run on this machine is not used unless it is named: what a command does must not depend on
    what somebody left behind.

    Raises:
        DeployError: nothing answers at the address, or a local Ray cannot start.
    """
    # Ray reads these once, when it is imported: no usage reports, and CPU actors see no GPU
    # warnings on hosts without one.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return RayConnection(_current_address(), started=False, attached=False)
    address = address or os.environ.get("RAY_ADDRESS") or None
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None or address == "local":
        # A raylet adds 15 to the niceness of its workers unless its environment says otherwise: on
        # a machine that others use too, the job would get what they leave.
        os.environ.setdefault("RAY_worker_niceness", "0")
        try:
            ray.init(
                "local",
                num_cpus=num_cpus,
                include_dashboard=include_dashboard,
                **quiet,
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise DeployError(f"a local Ray did not start: {_first_line(error)}") from error
        return RayConnection(_current_address(), started=True, attached=True)
    _probe(address)
    try:
        ray.init(address, **quiet)
    except (RuntimeError, OSError, ValueError) as error:
        raise _unreachable(address, _first_line(error)) from error
    return RayConnection(_current_address(), started=False, attached=True)


@dataclass(frozen=True, slots=True)
class Placement:
    """Arguments of `ray.util.placement_group`, or of a Serve deployment's placement group."""

    bundles: tuple[dict[str, float], ...]
    strategy: Strategy


def worker_placement(num_workers: int, *, cpus: float = 1, gpus: float = 0) -> Placement:
    """One bundle per quantize worker, spread over the nodes: each reads its own share of the
    source over its own link, and a lost node costs as few workers as possible."""
    assert num_workers > 0, "a job has at least one worker"
    bundle = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
    return Placement(tuple(dict(bundle) for _ in range(num_workers)), "SPREAD")


def engine_placement(num_gpus: int, *, cpus_per_node: float = 8) -> Placement:
    """Bundles of one engine replica: one per node, with all the GPUs that it takes there.

    Tensor parallelism up to 8 stays inside one node (STRICT_PACK), on NVLink. Above, whole nodes
    are taken, each bundle on its own (STRICT_SPREAD): TP-16 is two bundles of 8 GPUs. The replica's
    actor sits in bundle 0. Without GPUs it is one CPU bundle.
    """
    if num_gpus <= GPUS_PER_NODE:
        gpus = {"GPU": float(num_gpus)} if num_gpus else {}
        return Placement(({**gpus, "CPU": float(cpus_per_node)},), "STRICT_PACK")
    assert num_gpus % GPUS_PER_NODE == 0, "more than one node is whole nodes"
    bundle = {"GPU": float(GPUS_PER_NODE), "CPU": float(cpus_per_node)}
    num_nodes = num_gpus // GPUS_PER_NODE
    return Placement(tuple(dict(bundle) for _ in range(num_nodes)), "STRICT_SPREAD")


def _probe(address: str) -> None:
    """Refuse at once what Ray itself would try for minutes."""
    if address == "auto":
        return
    found = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d{1,5})", address)
    if not found:
        raise _unreachable(address, "it is not HOST:PORT of a Ray head")
    try:
        socket.create_connection((found[1], int(found[2])), timeout=PROBE_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, _first_line(error)) from error


def _unreachable(address: str, reason: str) -> DeployError:
    return DeployError(
        f"no Ray answers at {address!r} ({reason}); correct --address or RAY_ADDRESS, or unset it "
        "to start a Ray on this machine"
    )


def _current_address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
