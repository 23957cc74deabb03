"""The adapter of an engine that runs in a process of its own: implements `Engine`.

Tokens come as ids and everything else of an answer is made here (text.py). A request is aborted
once, when its client leaves or a stop string ends it; what the engine still sends of it is dropped.
When the worker, one of its ranks or the engine in it dies or hangs (health.py), every request ends
in a retryable error, the processes are killed, and `check` raises: the replica ends and is replaced.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from deepseek.engine.limits import RequestLimits
from deepseek.engine.logprob_names import LogprobNamer
from serve_app.engine_sections import RemoteOptions
from serve_app.engines.protocol import Done, EngineInfo, Event, LoadProgress
from serve_app.engines.remote.counts import Counts
from serve_app.engines.remote.health import Pulse
from serve_app.engines.remote.launch import Deadlines, Launch, Plan
from serve_app.engines.remote.loading import Loader, Worker
from serve_app.engines.remote.options import launch_of, plan_of
from serve_app.engines.remote.text import Answer
from serve_app.engines.stall import StallClock
from serve_app.engines.worker import processes

log = logging.getLogger("ray.serve")

#: Seconds between two looks at the pulse, at most.
_LOOK_S = 0.5
#: Seconds for the engine's first figures to come after the first requests.
_FIGURES_S = 3.0
#: Prompts of the requests before the first one of a client, in tokens, and their answers.
_WARM_UP = ((1, 1), (512, 4))


@dataclass(slots=True)
class _Request:
    """One request in the worker. `ended`: its client has been told its end; `aborted`: so has the
    worker. `answer` None is a request of our own."""

    number: int
    answer: Answer | None = None
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    ended: bool = False
    aborted: bool = False

    def put(self, items: Iterable[Event | Exception]) -> None:
        """Tell the client, unless it has been told the end."""
        for item in items:
            if self.ended:
                return
            self.ended = isinstance(item, Done | Exception)
            self.events.put_nowait(item)


class RemoteEngine:
    """One engine behind a worker. `launch` and `plan` are made from the options by default; tests
    pass a worker of their own. All methods run on the loop that awaited `start`.

    `GenerateRequest.output_ids` go to the engine as the end of its prompt. A greedy answer goes on
    as it would have, up to the engine's own arithmetic; a sampled one is drawn anew from there.
    """

    def __init__(
        self,
        options: RemoteOptions,
        launch: Launch | None = None,
        *,
        plan: Callable[[RemoteOptions], Plan] = plan_of,
        deadlines: Deadlines | None = None,
    ) -> None:
        self._options = options
        self._launch = launch_of(options) if launch is None else launch
        self._make_plan = plan
        self._deadlines = deadlines or Deadlines(load_s=options.load_timeout_s)
        self._loader: Loader | None = None
        self._worker: Worker | None = None
        self._open: dict[int, _Request] = {}
        self._named: dict[str, _Request] = {}
        self._numbers = itertools.count(1)
        self._stall = StallClock()
        self._counts = Counts()
        self._failure: str | None = None
        self._stopping = False
        self._kill: asyncio.Task[None] | None = None
        self._monitor: asyncio.Task[None] | None = None
        self._canary_salt = f"intserve-canary-{secrets.token_hex(8)}"
        self._canary: int | None = None

    # Loading.

    async def start(self) -> EngineInfo:
        plan = self._plan = await asyncio.to_thread(self._make_plan, self._options)
        self._loader = Loader(plan, self._launch, self._deadlines)
        self._worker, ready = await self._loader.load()
        self._pulse = Pulse(self._deadlines, time.monotonic())
        self._pids = {pid: processes.start_of(pid) for pid in ready.pids}
        self._max_model_len = min(plan.max_model_len, ready.max_model_len or plan.max_model_len)
        self._limits = RequestLimits(
            max_model_len=self._max_model_len,
            vocab_size=plan.vocab_size,
            has_tokenizer=plan.tokenizer is not None,
            is_cut_to_dense=False,
        )
        self._namer = LogprobNamer(plan.tokenizer)
        self._counts.ready(plan, ready)
        listener = asyncio.create_task(self._listen(self._worker))
        self._loader.progress = LoadProgress("warming up")
        try:
            await self._warm_up()
        except BaseException:
            listener.cancel()
            raise
        self._monitor = asyncio.create_task(self._watch())
        self._listener = listener
        return self._info(plan, ready)

    def loading(self) -> LoadProgress | None:
        return None if self._loader is None else self._loader.progress
