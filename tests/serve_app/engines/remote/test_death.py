"""A remote engine that dies or hangs: noticed, told to every client, and no process survives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.remote_engines import SUPPORT, answer_of, eventually, journal, running, scripted
from support.serving import make_request

from serve_app.engines.protocol import Done, Tokens
from serve_app.engines.remote.engine import RemoteEngine
from serve_app.engines.remote.launch import Deadlines
from serve_app.engines.worker import processes
from serve_app.errors import EngineUnavailable

#: What each fault is noticed by, in less than its seconds in service.
PINGS = Deadlines(ping_every_s=0.1, pong_s=0.6, health_s=0.2)
CANARIES = Deadlines(quiet_s=0.4, canary_every_s=0.5, canary_s=0.6)


def pids_of(engine: RemoteEngine) -> set[int]:
    """The guardian and every process below it."""
    assert engine._worker is not None
    guardian = engine._worker.process.pid
    return {guardian, *(process.pid for process in processes.descendants(guardian))}


async def dies(engine: RemoteEngine, hurt: Callable[[], None], words: str) -> None:
    """Hurt it while it answers: the stream ends in a retryable error, `check` raises, and all of
    its processes end."""
    pids = pids_of(engine)
    events = engine.generate(make_request("a long answer", max_tokens=900, temperature=0.0))
    first = await anext(events)
    assert isinstance(first, Tokens)
    hurt()
    rest = [event async for event in events]
    done = rest[-1]
    assert isinstance(done, Done)
    assert (done.reason, done.retryable) == ("error", True)
    tokens = [t for e in (first, *rest) if isinstance(e, Tokens) for t in e.token_ids]
    assert done.completion_tokens == len(tokens)
    with pytest.raises(EngineUnavailable, match="being replaced"):
        await engine.check()
    with pytest.raises(EngineUnavailable):
        await answer_of(engine, make_request("later"))
    await eventually(lambda: words in str(engine._failure), 2.0)
    await eventually(lambda: not any(processes.is_alive(pid) for pid in pids), 5.0)


@pytest.mark.parametrize("who", ["worker", "outer guardian", "inner guardian", "rank"])
async def test_a_process_that_is_killed_ends_the_engine_at_once(tmp_path: Path, who: str) -> None:
    async with running(scripted(tmp_path, ranks=2, step_s=0.01)) as engine:
        assert engine._worker is not None
        outer = engine._worker.process.pid
        inner = processes.descendants(outer)[0].pid
        worker = journal(tmp_path, "start")[0]["pid"]
        victim = {
            "worker": worker,
            "outer guardian": outer,
            "inner guardian": inner,
            "rank": max(engine._pids),
        }[who]
        words = f"process {victim}" if who == "rank" else "SIGKILL"
        await dies(engine, lambda: os.kill(victim, signal.SIGKILL), words)


async def test_an_engine_that_raises_is_dead_for_all_its_requests(tmp_path: Path) -> None:
    async with running(scripted(tmp_path, step_s=0.01)) as engine:
        await dies(
            engine,
            lambda: asyncio.get_running_loop().create_task(_ask(engine, "dead at once")) and None,
            "RuntimeError: the executor is gone",
        )


async def _ask(engine: RemoteEngine, text: str) -> None:
    await answer_of(engine, make_request(text, "killer"))


async def test_what_the_engine_says_of_its_health_counts(tmp_path: Path) -> None:
    control = tmp_path / "control"
    engine = scripted(tmp_path, deadlines=PINGS, control=str(control), step_s=0.01)
    async with running(engine):
        await dies(engine, lambda: control.write_text("unhealthy") and None, "it says so")


async def test_a_health_check_that_does_not_return_counts_as_a_fault(tmp_path: Path) -> None:
    control = tmp_path / "control"
    engine = scripted(tmp_path, deadlines=PINGS, control=str(control), step_s=0.01)
    async with running(engine):
        await dies(engine, lambda: control.write_text("silent") and None, "has not returned")


async def test_a_worker_that_is_stopped_misses_its_ping(tmp_path: Path) -> None:
    engine = scripted(tmp_path, deadlines=PINGS, step_s=0.01, ranks=1)
    async with running(engine):
        worker = journal(tmp_path, "start")[0]["pid"]
        await dies(engine, lambda: os.kill(worker, signal.SIGSTOP), "has not answered for")


@pytest.mark.parametrize("busy", [True, False])
async def test_an_engine_that_computes_nothing_fails_its_canary(tmp_path: Path, busy: bool) -> None:
    """Its loop answers and its health is well."""
    frozen = tmp_path / "frozen"
    async with running(
        scripted(tmp_path, deadlines=CANARIES, step_s=0.01, frozen=str(frozen))
    ) as engine:
        if busy:
            await dies(engine, frozen.touch, "not even the one token")
        else:
            frozen.touch()
            await eventually(lambda: engine._failure, 5.0)
            assert "not even the one token" in str(engine._failure)


async def test_a_busy_engine_is_not_asked_for_a_canary_while_it_goes_on(tmp_path: Path) -> None:
    deadlines = Deadlines(quiet_s=1.0, canary_every_s=60.0)
    async with running(scripted(tmp_path, deadlines=deadlines, step_s=0.02)) as engine:
        _, done = await answer_of(engine, make_request("a long answer", max_tokens=70))
        assert done.reason == "length"
        await engine.check()
    assert "intserve-canary" not in (tmp_path / "journal").read_text()


async def test_idle_engines_are_asked_with_a_salt_of_their_own_each_time(tmp_path: Path) -> None:
    deadlines = Deadlines(canary_every_s=0.2)
    async with running(scripted(tmp_path, deadlines=deadlines)) as engine:
        await eventually(lambda: (tmp_path / "journal").read_text().count("intserve-canary") >= 2)
        await engine.check()
        assert engine.stalled_s() == 0.0
    asked = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
    canaries = [line for line in asked if line.get("cache_salt", "").startswith("intserve-canary")]
    assert len({line["cache_salt"] for line in canaries}) == len(canaries)
    assert {line["priority"] for line in canaries} == {1.0}
    assert {line["max_tokens"] for line in canaries} == {1}


@pytest.mark.parametrize("how", ["ok", "hang", "abort"])
async def test_shutdown_ends_every_process_whatever_the_engine_does(
    tmp_path: Path, how: str
) -> None:
    engine = scripted(
        tmp_path, deadlines=Deadlines(shutdown_s=0.5), shutdown=how, ranks=2, step_s=0.01
    )
    await engine.start()
    pids = pids_of(engine)
    events = engine.generate(make_request("a long answer", max_tokens=900))
    await anext(events)
    await engine.shutdown()
    assert not any(processes.is_alive(pid) for pid in pids)
    assert len(journal(tmp_path, "shutdown")) == 1
    with pytest.raises(EngineUnavailable, match="stopping"):
        async for _ in events:
            pass
    with pytest.raises(EngineUnavailable, match="stopping"):
        await answer_of(engine, make_request("later"))
    await engine.shutdown()  # once more does nothing


_REPLICA = """
import asyncio, os, sys
from pathlib import Path
from support.remote_engines import scripted
from serve_app.engines.worker import processes

async def main():
    engine = scripted(Path(sys.argv[1]), **eval(sys.argv[2]))
    asyncio.get_running_loop().create_task(engine.start())
    while len(below := [p.pid for p in processes.descendants(os.getpid())]) < 6:
        await asyncio.sleep(0.01)
    print(*below, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.heavy
@pytest.mark.parametrize(("constructor", "guardian"), [("ok", None), ("hang", 0), ("ok", 1)])
def test_no_process_survives_the_replica_that_is_killed(
    tmp_path: Path, root: Path, constructor: str, guardian: int | None
) -> None:
    """Serving or loading, alone or together with one of its guardians: Ray kills the children of an
    actor that it kills."""
    arguments = {"ranks": 3, "constructor": constructor}
    replica = subprocess.Popen(
        [sys.executable, "-c", _REPLICA, str(tmp_path), repr(arguments)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{root}:{SUPPORT.parent}"},
    )
    with replica:
        assert replica.stdout is not None
        pids = [int(pid) for pid in replica.stdout.readline().split()]
        assert len(pids) == 6  # two guardians, the worker, three ranks
        if guardian is not None:
            os.kill(pids[guardian], signal.SIGKILL)
        replica.kill()
    deadline = time.monotonic() + 5.0
    while any(processes.is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)
