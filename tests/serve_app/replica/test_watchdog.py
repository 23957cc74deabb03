"""When a replica gives up its engine, and that it does so once."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.errors import EngineUnavailable
from serve_app.replica.watchdog import Watchdog


class Engine(EchoEngine):
    """An echo that stalls, or fails its check, as told."""

    stalled = 0.0
    failure: Exception | None = None

    def stalled_s(self) -> float:
        return self.stalled

    async def check(self) -> None:
        if self.failure is not None:
            raise self.failure


async def given_up(engine: Engine, max_step_s: float = 1.0) -> tuple[Watchdog, list[str]]:
    """The watchdog once it has run for a while, and what it gave up with."""
    told: list[str] = []

    async def give_up(failure: EngineUnavailable) -> None:
        told.append(str(failure))

    watchdog = Watchdog(engine, max_step_s=max_step_s)
    task = asyncio.create_task(watchdog.run(give_up))
    await asyncio.wait({task}, timeout=0.1)
    task.cancel()
    return watchdog, told


async def test_a_step_within_the_limit_is_no_reason() -> None:
    engine = Engine(EchoOptions())
    engine.stalled = 1.0
    watchdog, told = await given_up(engine)
    assert told == []
    await watchdog.check()


async def test_a_step_beyond_the_limit_is_given_up_once_and_for_good() -> None:
    engine = Engine(EchoOptions())
    engine.stalled = 1.01
    watchdog, told = await given_up(engine)
    assert len(told) == 1
    assert "no step" in told[0]
    engine.stalled = 0.0  # the clients have been told by now
    with pytest.raises(EngineUnavailable, match="no step"):
        await watchdog.check()


@pytest.mark.parametrize("failure", [KeyError("secret"), TimeoutError(), EngineUnavailable("x")])
async def test_whatever_an_engines_check_raises_gives_it_up(failure: Exception) -> None:
    engine = Engine(EchoOptions())
    engine.failure = failure
    watchdog, told = await given_up(engine)
    assert len(told) == 1
    assert "secret" not in told[0]
    assert watchdog.failure is not None


GUARDED = """
import sys, time
from serve_app.replica.watchdog import guard_event_loop
rearm = guard_event_loop(1.0)
for _ in range(3):
    time.sleep(0.5)
    rearm()
print("alive", flush=True)
if sys.argv[1] == "block":
    __import__("ctypes").PyDLL(None).sleep(60)  # keeps the interpreter's lock
"""


@pytest.mark.heavy
@pytest.mark.parametrize(("then", "code"), [("block", 1), ("end", 0)])
def test_a_loop_that_is_held_up_by_native_code_ends_the_process(then: str, code: int) -> None:
    command = [sys.executable, "-c", GUARDED, then]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.stdout == "alive\n"
    assert done.returncode == code
    assert ("Timeout" in done.stderr) == (then == "block")
