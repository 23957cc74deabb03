"""An engine with ranks on several nodes: its own process here, one on each other node.

The replica's placement group has a bundle on every node. On each but the first, a Ray actor holds
the GPUs of the bundle and starts that node's process; it is this replica's child, so that Ray ends
it with the replica, however that ends, and its process ends with it. All load at once, and the end
of one is the end of all: the replica gives up the engine, and Serve makes another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol

from deepseek.engine.options import EngineLoad
from deepseek.errors import DeployError, IntServeError
from serve_app.engine_sections import VllmOptions
from serve_app.engines.protocol import EngineInfo, Event, GenerateRequest, LoadProgress
from serve_app.engines.remote.engine import RemoteEngine
from serve_app.engines.remote.launch import Deadlines, Launch, Plan
from serve_app.engines.remote.loading import Loader, Worker
from serve_app.engines.remote.nodes import Nodes, here, launch_on_node, plan_over_nodes
from serve_app.engines.remote.options import launch_of, plan_of
from serve_app.engines.worker.messages import Fatal, Pong, Stop
from serve_app.errors import EngineUnavailable

log = logging.getLogger("ray.serve")

Planner = Callable[[VllmOptions], Plan]


class OtherNode(Protocol):
    """The process on one of the other nodes. `name` is for people."""

    name: str

    async def load(self) -> None:
        """Start it; returns when its ranks have loaded.

        Raises:
            IntServeError: they have not; says why.
        """
        ...

    async def ended(self) -> str:
        """Wait until it has ended; says how."""
        ...

    async def end(self) -> None:
        """End it, however far it is."""
        ...


#: Makes the other nodes of an engine.
Others = Callable[[VllmOptions, Nodes], Sequence[OtherNode]]


class SpreadEngine:
    """Implements `Engine` for vLLM on `count` nodes. `address` gives this node's, `others` makes
    the other ones; tests pass their own, and a `launch` and a `plan`."""

    def __init__(
        self,
        options: VllmOptions,
        *,
        count: int,
        address: Callable[[], str],
        others: Others,
        launch: Launch | None = None,
        plan: Planner = plan_of,
        deadlines: Deadlines | None = None,
    ) -> None:
        self._options = options
        self._make_others = others
        self._nodes = nodes = here(count, address())
        self._engine = RemoteEngine(
            options,
            launch_on_node(launch or launch_of(options), nodes.address, first=True),
            plan=lambda given: plan_over_nodes(plan(given), nodes, 0),  # type: ignore[arg-type]
            deadlines=deadlines,
        )
        self._others: Sequence[OtherNode] = ()
        self._watches: list[asyncio.Task[None]] = []
        self._failure: str | None = None

    async def start(self) -> EngineInfo:
        self._others = self._make_others(self._options, self._nodes)
        first = asyncio.create_task(self._engine.start())
        tasks: set[asyncio.Task[Any]] = {first}
        tasks |= {asyncio.create_task(_loaded(other)) for other in self._others}
        try:
            done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()  # raises what went wrong first
            assert not left
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._end_others()
            raise
        self._watches = [asyncio.create_task(self._watch(other)) for other in self._others]
        return first.result()

    def loading(self) -> LoadProgress | None:
        return self._engine.loading()

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        return self._engine.generate(request)

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._engine.abort(request_ids)

    def load(self) -> EngineLoad:
        return self._engine.load()

    async def check(self) -> None:
        if self._failure is not None:
            raise EngineUnavailable("the engine has failed and is being replaced; retry later")
        await self._engine.check()

    def stalled_s(self) -> float:
        return self._engine.stalled_s()

    async def shutdown(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await self._engine.shutdown()
        await self._end_others()

    async def _end_others(self) -> None:
        await asyncio.gather(*(other.end() for other in self._others), return_exceptions=True)

    async def _watch(self, other: OtherNode) -> None:
        how = await other.ended()
        self._failure = f"{other.name}: {how}"
        log.error("the engine has lost the ranks of %s: %s", other.name, how)


async def _loaded(other: OtherNode) -> None:
    try:
        await other.load()
    except IntServeError as error:
        raise DeployError(f"{other.name}: {error}") from error


class NodeProcess:
    """One of the other nodes' processes, started by whoever is on that node. Not for requests."""

    def __init__(
        self,
        options: VllmOptions,
        nodes: Nodes,
        rank: int,
        address: str,
        *,
        launch: Launch | None = None,
        plan: Planner = plan_of,
        deadlines: Deadlines | None = None,
    ) -> None:
        self._options, self._nodes, self._rank = options, nodes, rank
        self._launch = launch_on_node(launch or launch_of(options), address, first=False)
        self._plan = plan
        self._deadlines = deadlines or Deadlines(load_s=options.load_timeout_s)
        self._worker: Worker | None = None
        self._over = asyncio.Event()
        self._how = ""

    async def load(self) -> None:
        """As `OtherNode.load`."""
        plan = await asyncio.to_thread(self._plan, self._options)
        plan = plan_over_nodes(plan, self._nodes, self._rank)
        self._worker, _ = await Loader(plan, self._launch, self._deadlines).load()
        self._worker.listen(self._receive)

    async def ended(self) -> str:
        """As `OtherNode.ended`."""
        await self._over.wait()
        return self._how

    async def end(self) -> None:
        """As `OtherNode.end`."""
        if self._worker is not None:
            self._worker.channel.send(Stop())
            await self._worker.process.wait(self._deadlines.kill_s)
            await self._worker.end(self._deadlines.kill_s)

    def _receive(self, message: object) -> None:
        if isinstance(message, Fatal):
            message = message.why
        if isinstance(message, Pong) and not message.healthy:
            message = message.why or "it says that it is not healthy"
        if isinstance(message, str) and not self._over.is_set():
            self._how = message
            self._over.set()


class RayNode:
    """`OtherNode` of an actor that holds one bundle of this replica's placement group."""

    def __init__(self, actor: Any, name: str) -> None:
        self._actor = actor
        self.name = name

    async def load(self) -> None:
        from ray.exceptions import RayError, RayTaskError

        try:
            await self._actor.load.remote()
        except RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, IntServeError) else DeployError(str(cause)) from error
        except RayError as error:
            raise DeployError(f"its process did not start ({type(error).__name__})") from error

    async def ended(self) -> str:
        from ray.exceptions import RayError

        try:
            return str(await self._actor.ended.remote())
        except RayError as error:
            return f"the node or its actor has gone ({type(error).__name__})"

    async def end(self) -> None:
        import ray
        from ray.exceptions import RayError

        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(_END_S):
                await self._actor.end.remote()
        ray.kill(self._actor)


#: Seconds for a process of another node to end in an orderly way.
_END_S = 10.0


class _NodeActor(NodeProcess):
    """`NodeProcess` in the actor that holds its node's GPUs."""

    def __init__(self, options: VllmOptions, nodes: Nodes, rank: int, **more: Any) -> None:
        super().__init__(options, nodes, rank, node_address(), **more)


def node_address() -> str:
    """The address of the node that this process is on, as Ray knows it."""
    import ray

    return str(ray.util.get_node_ip_address())


def ray_nodes(options: VllmOptions, nodes: Nodes, **more: Any) -> list[RayNode]:
    """An actor in each bundle of this replica's placement group but the first; `more` are arguments
    of `NodeProcess`.

    Raises:
        DeployError: the group has another number of bundles.
    """
    import ray
    from ray.util.placement_group import get_current_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = get_current_placement_group()
    bundles = [] if group is None else group.bundle_specs
    if len(bundles) != nodes.count:
        raise DeployError(
            f"the engine has ranks on {nodes.count} nodes, and Ray has reserved {len(bundles)} for "
            "this replica; deploy again"
        )
    made = []
    for rank, bundle in enumerate(bundles[1:], start=1):
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        actor = (
            ray.remote(_NodeActor)
            .options(num_cpus=0, num_gpus=bundle.get("GPU", 0), scheduling_strategy=strategy)
            .remote(options, nodes, rank, **more)
        )
        made.append(RayNode(actor, f"the node of bundle {rank}"))
    return made
